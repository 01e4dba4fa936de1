"""Real images: Fashion-MNIST from Debian's package, or else scikit-learn's digits."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["FASHION", "Images", "batches", "load_images"]

NDArray = npt.NDArray[Any]

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where ``apt-get install dataset-fashion-mnist`` puts 70,000 images of 28 × 28 (MIT licence)."""


@dataclass(frozen=True)
class Images:
    """Images of ten classes, standardised by the statistics of the training images.

    Args:
        name: of the data set.
        train: (images, height, width).
        train_labels: (images,) in 0 … 9.
        test: images that are not trained on.
        test_labels: their classes.
        patch: side of the squares that images of this size are cut into.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    patch: int

    def part(self, count: int) -> Images:
        """The first ``count`` images of either kind, for a quick look."""
        return replace(
            self,
            train=self.train[:count],
            train_labels=self.train_labels[:count],
            test=self.test[:count],
            test_labels=self.test_labels[:count],
        )


def load_images(folder: Path = FASHION, *, holdout: bool = False) -> Images:
    """Fashion-MNIST if ``folder`` holds it, or else the digits.

    Args:
        folder: of the four IDX files.
        holdout: take a sixth of the training images for the test images, to choose settings by.
    """
    if (folder / "train-images-idx3-ubyte.gz").is_file():
        name, patch = "Fashion-MNIST", 4
        train, labels = _idx(folder, "train-images-idx3"), _idx(folder, "train-labels-idx1")
        test, test_labels = _idx(folder, "t10k-images-idx3"), _idx(folder, "t10k-labels-idx1")
    else:
        name, patch = "digits", 2
        train, test, labels, test_labels = _digits()
    if holdout:
        cut = len(train) * 5 // 6
        train, test, labels, test_labels = train[:cut], train[cut:], labels[:cut], labels[cut:]
    mean, scale = float(train.mean()), float(train.std())
    pixels = [torch.from_numpy((part - mean) / scale).float() for part in (train, test)]
    classes = [torch.from_numpy(part.astype("int64")) for part in (labels, test_labels)]
    return Images(name, pixels[0], classes[0], pixels[1], classes[1], patch)


def _idx(folder: Path, name: str) -> NDArray:
    """An array of the IDX format: 0, 0, type, dimensions; their sizes, big-endian; the bytes."""
    data = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, "u1", -1, 4 + 4 * dimensions).reshape(shape)


def _digits() -> list[NDArray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split: list[NDArray] = train_test_split(
        images.reshape(-1, 8, 8), labels, test_size=0.2, random_state=0, stratify=labels
    )
    return split


def batches(images: Images, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images with their classes, shuffled anew in every epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images.train), generator=generator)
        for picked in order.split(batch):
            if len(picked) == batch or len(order) < batch:
                yield images.train[picked], images.train_labels[picked]

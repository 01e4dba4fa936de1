"""scikit-learn's digits: 1797 real images of 8 × 8 pixels, part of its wheel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NDArray = npt.NDArray[Any]

CLASSES, PIXELS = 10, 64
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """The images, split once and for all, whatever the seed of the training.

    Args:
        train: (images, 64), standardised by the training images' statistics.
        train_labels: the digit of each.
        test: images that no training sees.
        test_labels: the digit of each.
        pictures: (images, 8, 8), the test images as they are, from 0 to 16.
    """

    train: NDArray
    train_labels: NDArray
    test: NDArray
    test_labels: NDArray
    pictures: NDArray


def load() -> Digits:
    """The digits, every class with the same share in both parts."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split: Any = train_test_split(
        images, labels, test_size=_TEST_SHARE, random_state=0, stratify=labels
    )
    train, test, train_labels, test_labels = split
    mean = train.mean(axis=0)
    # pixels of the margin hardly ever vary: their noise is not blown up
    scale = np.maximum(train.std(axis=0), 1.0)
    parts = [((part - mean) / scale).astype("float32") for part in (train, test)]
    return Digits(parts[0], train_labels, parts[1], test_labels, test.reshape(-1, 8, 8))

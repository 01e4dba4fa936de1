"""Real text that comes with Python: the reference behind ``help()``, or sources where it is cut."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

__all__ = ["Text", "batches", "load_text", "reference", "split", "windows"]

# prose among code, in every installation
_MODULES = (
    "argparse",
    "ast",
    "codecs",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "inspect",
    "logging",
    "pathlib",
    "shutil",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "threading",
    "typing",
    "unittest.mock",
    "zipfile",
)
_EVERY = 8


@dataclass(frozen=True)
class Text:
    """Characters, or words, as ids.

    Args:
        name: where the text is from.
        train: (tokens,) ids.
        test: those of documents that are not trained on.
        symbols: the character or word of every id.
    """

    name: str
    train: Tensor
    test: Tensor
    symbols: Sequence[str]


def load_text(source: str = "pydoc_data.topics", *, holdout: bool = False) -> Text:
    """Every eighth document is test text; paragraphs that are also in it are not trained on.

    Args:
        source: a module with a mapping ``topics``; the sources of other modules if it is missing.
        holdout: leave out the test documents, and test on every eighth of the others instead, to
            choose settings by.
    """
    name, documents = reference(source)
    joined = split(documents, holdout=holdout)
    symbols = "".join(sorted(set("".join(joined))))
    ids = {symbol: place for place, symbol in enumerate(symbols)}
    encoded = [torch.tensor([ids[symbol] for symbol in part]) for part in joined]
    return Text(name, encoded[0], encoded[1], symbols)


def split(documents: Mapping[str, str], *, holdout: bool) -> tuple[str, str]:
    """Training and test text, as :func:`load_text` divides them."""
    titles = sorted(documents)
    if holdout:
        titles = [title for place, title in enumerate(titles) if place % _EVERY != _EVERY - 1]
    test = _paragraphs(documents, titles[_EVERY - 1 :: _EVERY])
    rest = [title for place, title in enumerate(titles) if place % _EVERY != _EVERY - 1]
    train = {each: None for each in _paragraphs(documents, rest) if each not in test}
    return "\n\n".join(train), "\n\n".join(test)


def reference(source: str) -> tuple[str, Mapping[str, str]]:
    """Documents by title, and where they are from."""
    try:
        topics: Mapping[str, str] = import_module(source).topics
    except ModuleNotFoundError:
        sources = {name: inspect.getsource(import_module(name)) for name in _MODULES}
        return "sources of the standard library", sources
    return f"the language reference in {source}", topics


def _paragraphs(documents: Mapping[str, str], titles: list[str]) -> dict[str, None]:
    """Each paragraph once, in order: some topics repeat others."""
    parts = (part for title in titles for part in re.split(r"\n{2,}", documents[title].strip("\n")))
    return dict.fromkeys(parts)


def batches(text: Text, context: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows at random places and the characters that follow each of theirs, without end."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(context)
    while True:
        starts = torch.randint(len(text.train) - context, (batch, 1), generator=generator)
        yield text.train[starts + steps], text.train[starts + steps + 1]


def windows(ids: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The whole text in windows side by side, and the characters that follow: two (windows, T)."""
    count = (len(ids) - 1) // context
    return (
        ids[: count * context].reshape(count, context),
        ids[1 : count * context + 1].reshape(count, context),
    )

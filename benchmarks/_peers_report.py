"""Table and notes of the benchmark against peers."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from _peers import NOTES
from _peers_measure import Measured

MIB, GIB = 2**20, 2**30

PACKAGES = (
    "tensorly-torch",
    "tensorly",
    "st-moe-pytorch",
    "mixture-of-experts",
    "soft-moe-pytorch",
)


@dataclass(frozen=True)
class Line:
    """Results for one layer and batch; a text in place of a figure says why there is none.

    Args:
        title: the comparison.
        layer: its name.
        ours: whether it is tensormoe's.
        experts: N, or None for a layer without experts.
        batch: tokens.
        parameters: stored entries, the gate's included.
        forward: one call in eval mode.
        step: one training step.
    """

    title: str
    layer: str
    ours: bool
    experts: int | None
    batch: int
    parameters: int
    forward: Measured | str
    step: Measured | str

    @property
    def total_memory(self) -> int | None:
        """Bytes of parameters and of the worst moment of a training step together."""
        if isinstance(self.step, str):
            return None
        return 4 * self.parameters + self.step.memory


def print_head() -> None:
    """Versions and settings."""
    found = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    print(
        f"peers on PyTorch {torch.__version__}, float32, {threads} thread{plural}, "
        f"Python {platform.python_version()}, {platform.machine()}\n{found}",
        flush=True,
    )


def print_block(title: str, experts: int, lines: Sequence[Line]) -> None:
    """The lines of one comparison for one number of experts."""
    print(f"\n{title}: {experts} experts")
    head = f"{'batch':>5} {'layer':<22} {'parameters':>11}"
    for name in ("forward", "step"):
        head += f" {name + ' ms':>11} {'× plain':>7} {'MiB':>7}"
    print(head)
    for line in lines:
        text = f"{line.batch:5} {line.layer:<22} {line.parameters:11,}"
        for found in (line.forward, line.step):
            if isinstance(found, str):
                text += f" {found:<27}"
                if line.forward == line.step:
                    break
            else:
                ratio = f"{found.ratio:7.1f}" if found.ratio < 10 else f"{found.ratio:7.0f}"
                text += f" {found.seconds * 1e3:11.3f} {ratio} {found.memory / MIB:7.1f}"
        print(text.rstrip(), flush=True)


def notes(lines: Sequence[Line]) -> Iterator[str]:
    """Differences between the layers, and everything in which a layer beats ours."""
    yield "\nwhat differs:"
    for note in NOTES:
        yield f"- {note}"
    for title in dict.fromkeys(line.title for line in lines):
        here = [line for line in lines if line.title == title]
        names = dict.fromkeys(line.layer for line in here if line.ours)
        for name in names:
            yield f"\nwhere {name} loses by more than 5 %, with the factor ({title}):"
            for rival in dict.fromkeys(line.layer for line in here if not line.ours):
                found = list(_losses(here, name, rival))
                if not found:
                    yield f"- to {rival}: nowhere"
                for k, each in enumerate(found):
                    yield f"- to {rival}: {each}" if k == 0 else f"    {each}"


def _losses(lines: Sequence[Line], name: str, rival: str) -> Iterator[str]:
    """One text for each figure and batch in which ``rival`` is ahead, for any number of experts."""
    mine = {(line.experts, line.batch): line for line in lines if line.layer == name}
    theirs = {(line.experts, line.batch): line for line in lines if line.layer == rival}
    for figure in ("forward", "step", "memory"):
        for batch in dict.fromkeys(line.batch for line in lines):
            behind = []
            for (experts, tokens), line in mine.items():
                # a layer without experts meets every number of them
                other = theirs.get((experts, tokens)) or theirs.get((None, tokens))
                factor = _factor(figure, line, other) if other and tokens == batch else None
                if factor is not None and factor > 1.05:
                    behind.append(f"{factor:.1f} at {experts}")
            if behind:
                called = "memory of a step" if figure == "memory" else figure
                tokens = "token" if batch == 1 else "tokens"
                yield f"{called}, {batch} {tokens}: {', '.join(behind)} experts"


def _factor(figure: str, mine: Line, other: Line) -> float | None:
    if figure == "memory":
        ours, theirs = mine.total_memory, other.total_memory
        return None if ours is None or theirs is None else ours / theirs
    pair = (mine.forward, other.forward) if figure == "forward" else (mine.step, other.step)
    if isinstance(pair[0], str) or isinstance(pair[1], str):
        return None
    return pair[0].ratio / pair[1].ratio


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"

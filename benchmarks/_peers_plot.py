"""Picture of the benchmark against peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _peers_measure import Measured
from _peers_report import MIB, Line

from tensormoe.plotting import COLOURS, INK, MUTED, figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH = 1024

# one look a kind of layer, in both comparisons
_STYLES: dict[str, dict[str, object]] = {
    "plain": {"color": INK, "linestyle": "--", "linewidth": 1.6},
    "plain on oneDNN": {"color": INK, "linestyle": "-.", "linewidth": 1.2},
    "tensorly-torch Tucker": {"color": MUTED, "linestyle": ":", "linewidth": 1.8},
    "CP": {"color": COLOURS[0], "marker": "o", "linewidth": 2.6, "markersize": 7},
    "tensor ring": {"color": COLOURS[1], "marker": "s", "linewidth": 2.6, "markersize": 7},
    "dense MoE": {"color": COLOURS[2], "marker": "D"},
    "st-moe-pytorch": {"color": COLOURS[3], "marker": "^"},
    "mixture-of-experts": {"color": COLOURS[4], "marker": "v"},
    "soft-moe-pytorch": {"color": COLOURS[5], "marker": "P"},
}
_LABELS = {
    "plain": "no experts: nn.Linear, MLP",
    "plain on oneDNN": "the same on oneDNN, as ours",
    "CP": "MuMoE CP",
    "tensor ring": "MuMoE tensor ring",
}

Figure = Callable[[Line], float | None]


def draw(path: Path, lines: Sequence[Line]) -> None:
    """Write the picture: times and memory against experts, one row a comparison."""
    columns: tuple[tuple[str, Figure], ...] = (
        ("forward, ms", lambda line: _milliseconds(line.forward)),
        ("training step, ms", lambda line: _milliseconds(line.step)),
        ("parameters and training step, MiB", _mebibytes),
    )
    titles = list(dict.fromkeys(line.title for line in lines))
    with figure(path, 12.0, 4.1 * len(titles) + 0.9) as drawn:
        grid = drawn.subplots(len(titles), len(columns), squeeze=False, sharex=True)
        for row, title in zip(grid, titles, strict=True):
            here = [line for line in lines if line.title == title and line.batch == BATCH]
            for axes, (name, value) in zip(row, columns, strict=True):
                _panel(axes, here, value)
                axes.set_title(name, loc="left")
            row[0].set_ylabel(title)
        for axes in grid[-1]:
            axes.set_xlabel("experts")
        handles, labels = grid[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=5)
        drawn.suptitle(
            f"{BATCH} tokens, float32, CPU; lines end at 3 GiB of parameters or a minute a call",
            fontsize=11,
            x=0.01,
            ha="left",
        )


def _panel(axes: Axes, lines: Sequence[Line], value: Figure) -> None:
    tidy(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = sorted({line.experts for line in lines if line.experts is not None})
    for name in dict.fromkeys(line.layer for line in lines):
        here = [line for line in lines if line.layer == name]
        kind = _kind(name)
        if kind not in _STYLES:
            continue
        label = _LABELS.get(kind, kind)
        if here[0].experts is None:
            found = value(here[0])
            if found is not None:
                axes.axhline(found, label=label, **_STYLES[kind])  # type: ignore[arg-type]
            continue
        points = [(line.experts, value(line)) for line in here]
        points = [(count, found) for count, found in points if found is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), label=label, **_STYLES[kind])  # type: ignore[arg-type]
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")


def _kind(layer: str) -> str:
    if layer in ("nn.Linear", "MLP"):
        return "plain"
    if layer.endswith("on oneDNN"):
        return "plain on oneDNN"
    if layer.startswith("MuMoE"):
        return layer.partition(" ")[2]
    return layer


def _milliseconds(found: Measured | str) -> float | None:
    return None if isinstance(found, str) else found.seconds * 1e3


def _mebibytes(line: Line) -> float | None:
    total = line.total_memory
    return None if total is None else total / MIB

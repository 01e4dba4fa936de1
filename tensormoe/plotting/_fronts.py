"""Fronts of expert rank against expert span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensormoe._format import format_rank
from tensormoe.plotting._figure import COLOURS, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tensormoe.selection import RankChoice

_MARKERS = "osD^vP"


def plot_fronts(
    axes: Axes,
    fronts: Mapping[str, Sequence[RankChoice]],
    chosen: Mapping[str, RankChoice] | None = None,
) -> None:
    """Plot what a budget buys: how much one expert can do against how different experts can be.

    Args:
        axes: of matplotlib.
        fronts: by factorization, as :func:`tensormoe.rank_front` returns them.
        chosen: the rank that is taken of each, marked and named in the legend.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from tensormoe import rank_front
    >>> from tensormoe.plotting import figure
    >>> fronts = {name: rank_front(name, 64, 64, 32) for name in ("cp", "tensor_ring")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with figure(Path(folder, "fronts.png")) as drawn:
    ...         plot_fronts(drawn.add_subplot(), fronts)
    """
    tidy(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for index, (name, front) in enumerate(fronts.items()):
        colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
        taken = (chosen or {}).get(name)
        x, y = [each.expert_rank for each in front], [each.expert_span for each in front]
        label = name if chosen is None else None
        look: dict[str, Any] = {"color": colour, "marker": marker}
        axes.plot(x, y, **look, markersize=3.5, linewidth=1.3, alpha=0.75, label=label)
        if taken is not None:
            axes.plot(
                [taken.expert_rank],
                [taken.expert_span],
                **look,
                markersize=11,
                markeredgecolor="white",
                markeredgewidth=1.5,
                linestyle="",
                label=name if taken.rank is None else f"{name}, rank {format_rank(taken.rank)}",
                zorder=3,
            )
    axes.set_xlabel("expert rank: how much one expert can do")
    axes.set_ylabel("expert span: how different experts can be")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.margins(0.08)
    if fronts:
        axes.legend(loc="best", fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center")

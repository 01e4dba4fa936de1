"""The fronts of expert rank against expert span as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tensormoe.cli._console import format_rank
from tensormoe.cli._figures import Figures
from tensormoe.cli._picture import COLOURS, MUTED, picture, tidy
from tensormoe.selection import RankChoice

__all__ = ["draw_front"]

_MARKERS = "osD^vP"


def draw_front(
    path: Path,
    title: str,
    subtitle: str,
    fronts: Mapping[str, tuple[Figures | None, Sequence[RankChoice]]],
) -> None:
    """Write the picture of what a budget buys.

    Args:
        path: of the picture.
        title: the layer.
        subtitle: the budget.
        fronts: by factorization, the rank that was chosen and the front it lies on.
    """
    with picture(path, 8.0, 5.4) as figure:
        axes = figure.add_subplot()
        tidy(axes)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for place, (name, (chosen, front)) in enumerate(fronts.items()):
            colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)]
            x, y = [each.expert_rank for each in front], [each.expert_span for each in front]
            label = name if chosen is None else f"{name}, rank {format_rank(chosen.rank)}"
            if chosen is not None and chosen.rank is None:
                label = name
            axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.3, alpha=0.75)
            if chosen is None or chosen.expert_rank is None or chosen.expert_span is None:
                continue
            axes.plot(
                [chosen.expert_rank],
                [chosen.expert_span],
                color=colour,
                marker=marker,
                markersize=11,
                markeredgecolor="white",
                markeredgewidth=1.5,
                linestyle="",
                label=label,
                zorder=3,
            )
        axes.set_title(f"What a budget buys: {title}\n", loc="left", fontsize=12.5)
        said = f"{subtitle}; large marks are the ranks chosen"
        axes.text(0.0, 1.02, said, transform=axes.transAxes, fontsize=9.5, color=MUTED)
        axes.set_xlabel("expert rank: how much one expert can do")
        axes.set_ylabel("expert span: how different experts can be")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.margins(0.08)
        if fronts:
            axes.legend(loc="best", fontsize=9)
        else:
            axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center")

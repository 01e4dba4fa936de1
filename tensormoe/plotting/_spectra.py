"""Scores against the share of singular values that matrices keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tensormoe.errors import ShapeError
from tensormoe.plotting._figure import COLOURS, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tensormoe.analysis import RankCurve

_MARKERS = "osD^vPX*"


def plot_rank_curves(axes: Axes, curves: Mapping[str, Sequence[RankCurve]]) -> None:
    """Plot scores over the share of singular values that is kept, one line per name.

    A line goes through the means of a name's curves, one per seed for instance, in a band from the
    lowest to the highest.

    Args:
        axes: of matplotlib.
        curves: from :func:`tensormoe.analysis.rank_curve`; those of a name have the same shares.

    Raises:
        ShapeError: a name without a curve, or with curves of different shares.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from tensormoe.analysis import RankCurve
    >>> from tensormoe.plotting import figure
    >>> seeds = [RankCurve((0.1, 1.0), scores) for scores in ((0.5, 0.9), (0.7, 0.9))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with figure(Path(folder, "curves.svg")) as drawn:
    ...         plot_rank_curves(drawn.add_subplot(), {"dense": seeds})
    """
    for index, (name, seeds) in enumerate(curves.items()):
        if len({each.shares for each in seeds}) != 1:
            raise ShapeError(
                f"curves of a name must have the same shares, and be one at least; got "
                f"{[each.shares for each in seeds]} for {name!r}. Compute them alike."
            )
        shares = [100 * share for share in seeds[0].shares]
        columns = [*zip(*(each.scores for each in seeds), strict=True)]
        colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
        means = [sum(each) / len(each) for each in columns]
        axes.plot(shares, means, color=colour, marker=marker, markersize=4.0, label=name)
        lows, highs = [min(each) for each in columns], [max(each) for each in columns]
        axes.fill_between(shares, lows, highs, color=colour, alpha=0.15, linewidth=0.0)
    axes.set_xlabel("singular values kept, %")
    tidy(axes)

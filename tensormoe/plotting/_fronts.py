"""Fronts of expert rank against expert span."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, log2
from typing import TYPE_CHECKING, Any, Protocol

from tensormoe._format import format_rank
from tensormoe.plotting._figure import COLOURS, MUTED, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_MARKERS = "osD^vPX*"
_LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_SIZES = {"*": 15.0, "P": 11.0, "X": 11.0, "D": 9.0}
_SPREAD = 13.0
"""Points between the centres of marks that would hide one another."""

_FEWEST_TICKS = 4
_MARGIN = 0.1


class FrontPoint(Protocol):
    """A rank with its two figures, such as a :class:`tensormoe.selection.RankChoice`."""

    @property
    def rank(self) -> int | tuple[int, ...] | None:
        """Bond sizes."""

    @property
    def expert_rank(self) -> int:
        """The rank of one expert's matrix."""

    @property
    def expert_span(self) -> int:
        """The dimension of the space that experts span."""


def plot_fronts(
    axes: Axes,
    fronts: Mapping[str, Sequence[FrontPoint]],
    chosen: Mapping[str, FrontPoint] | None = None,
) -> None:
    """Plot what a budget buys: how much one expert can do against how different experts can be.

    Marks of ranks that coincide stand side by side, each joined to its point; lines that coincide
    differ in width and dashes.

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
    names = list(dict.fromkeys([*fronts, *(chosen or {})]))
    looks = {name: _look(index) for index, name in enumerate(names)}
    for index, (name, front) in enumerate(fronts.items()):
        x, y = [each.expert_rank for each in front], [each.expert_span for each in front]
        axes.plot(
            x,
            y,
            **looks[name],
            markersize=3.0,
            # the later, the thinner: what lies below shows at both sides
            linewidth=max(3.2 - 0.5 * index, 1.0),
            linestyle=_LINES[index % len(_LINES)],
            label=name if chosen is None else None,
        )
    points = [*(chosen or {}).values(), *(each for front in fronts.values() for each in front)]
    _set_scale(axes, points)
    offsets = _offsets(axes, chosen or {})
    for name, taken in (chosen or {}).items():
        _mark(axes, name, taken, offsets[name], looks[name])
    axes.set_xlabel("expert rank: how much one expert can do")
    axes.set_ylabel("expert span: how different experts can be")
    if names:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, borderaxespad=0.0)
    else:
        axes.text(0.5, 0.5, "nothing fits", transform=axes.transAxes, ha="center")


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _mark(axes: Axes, name: str, taken: FrontPoint, offset: float, look: Mapping[str, Any]) -> None:
    from matplotlib.transforms import ScaledTranslation

    x, y = taken.expert_rank, taken.expert_span
    assert axes.figure is not None
    moved = axes.transData + ScaledTranslation(offset / 72, 0.0, axes.figure.dpi_scale_trans)
    if offset:
        axes.annotate(
            "",
            (x, y),
            (offset, 0.0),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkB": 0},
            zorder=2,
        )
    axes.plot(
        [x],
        [y],
        **look,
        transform=moved,
        markersize=_SIZES.get(look["marker"], 10.0),
        markeredgecolor="white",
        markeredgewidth=1.2,
        linestyle="",
        label=name if taken.rank is None else f"{name}, rank {format_rank(taken.rank)}",
        zorder=3,
    )


def _offsets(axes: Axes, chosen: Mapping[str, FrontPoint]) -> dict[str, float]:
    """Points to the right by which each mark moves, so that none hides another."""
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    width, height = (72 * float(size) for size in drawn.get_size_inches())
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    # about two thirds of a figure are axes
    across, up = 0.66 * width / log2(right / left), 0.66 * height / log2(high / low)
    places = {
        name: (across * log2(each.expert_rank), up * log2(each.expert_span))
        for name, each in chosen.items()
    }
    found: dict[str, float] = {}
    for name in places:
        if name in found:
            continue
        group = [name]
        for member in group:
            group += [
                other
                for other in places
                if other not in group and other not in found and _near(places, member, other)
            ]
        # in the order in which their points lie
        group.sort(key=lambda each: places[each][0])
        middle = sum(places[each][0] for each in group) / len(group)
        for index, each in enumerate(group):
            wanted = middle + _SPREAD * (index - (len(group) - 1) / 2)
            found[each] = wanted - places[each][0] if len(group) > 1 else 0.0
    return found


def _near(places: Mapping[str, tuple[float, float]], one: str, other: str) -> bool:
    return all(abs(a - b) < _SPREAD for a, b in zip(places[one], places[other], strict=True))


def _set_scale(axes: Axes, points: Iterable[FrontPoint]) -> None:
    """Limits around all points, and ticks with labels however close they are."""
    listed = list(points)
    for axis, limits, values in (
        (axes.xaxis, axes.set_xlim, [each.expert_rank for each in listed]),
        (axes.yaxis, axes.set_ylim, [each.expert_span for each in listed]),
    ):
        least, most = (min(values), max(values)) if values else (1, 1)
        # room for what stands side by side
        room = 2.0 ** (_MARGIN * max(log2(most / least), 1.0))
        low, high = least / room, most * room
        limits(low, high)
        _set_ticks(axis, low, high)


def _set_ticks(axis: Axis, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks: list[float] = []
    for steps in _steps(low, high):
        ticks = [step for step in steps if low <= step <= high]
        if len(ticks) >= _FEWEST_TICKS:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,g}")


def _steps(low: float, high: float) -> Iterable[list[float]]:
    """Candidates for ticks, coarse ones first."""
    yield [4.0**power for power in range(16)]
    yield [2.0**power for power in range(31)]
    for parts in ((1, 1.5, 2, 3, 4, 5, 6, 8), [each / 4 for each in range(4, 40)]):
        yield sorted({float(part * 10**power) for part in parts for power in range(9)})
    # so close that whole numbers are few
    yield [float(step) for step in range(ceil(low), floor(min(high, 4 * low)) + 1)]

"""A tensor network as a picture: arrays are nodes, legs are edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import cos, hypot, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormoe._drawing._text import Array, Role, is_core
from tensormoe.factorizations import OUTPUT, Leg
from tensormoe.plotting._figure import INK, MUTED, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_network_picture"]

Point = tuple[float, float]

_FILL: Mapping[Role, str] = {"data": "#cfe3f3", "factor": "#fde3c8", "result": "#d3efe2"}
_EDGE: Mapping[Role, str] = {"data": "#0072b2", "factor": "#d55e00", "result": "#009e73"}
_MEANING: Mapping[Role, str] = {"data": "data", "factor": "factors", "result": "result"}

# distances: neighbours on a chain, a factor to its data, and the terms of a sum
_PITCH, _REACH, _GAP = 2.1, 1.55, 2.4


def draw_network_picture(
    path: Path,
    title: str,
    subtitle: str,
    terms: Sequence[Sequence[Array]],
    sizes: Mapping[Leg, int],
) -> None:
    """Write the picture of a network.

    Args:
        path: of the picture.
        title: the layer.
        subtitle: what else there is to say.
        terms: nodes with their legs, for every term of a sum.
        sizes: of the legs.
    """
    placed: list[dict[str, Point]] = []
    signs: list[float] = []
    for arrays in terms:
        places = _places(arrays)
        if placed:
            end = max(x for x, _ in placed[-1].values())
            shift = end + _GAP - min(x for x, _ in places.values())
            signs.append(end + _GAP / 2)
            places = {name: (x + shift, y) for name, (x, y) in places.items()}
        placed.append(places)
    dotted = [_hyperedges(*pair) for pair in zip(terms, placed, strict=True)]
    points = [point for each in (*placed, *dotted) for point in each.values()]
    left, right = (pick(x for x, _ in points) for pick in (min, max))
    low, high = (pick(y for _, y in points) for pick in (min, max))
    width, height = right - left + 2.6, high - low + 1.7
    scale = min(1.0, 15.0 / width)
    with picture(path, max(width * scale, 6.0), height * scale + 1.1) as figure:
        axes = figure.add_subplot()
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_xlim(left - 1.3, right + 1.3)
        axes.set_ylim(low - 0.85, high + 0.85)
        for arrays, places, dots in zip(terms, placed, dotted, strict=True):
            _draw_edges(axes, arrays, sizes, places, dots)
            for array in arrays:
                _draw_node(axes, array, places[array.name])
        for sign in signs:
            axes.text(sign, 0.0, "+", ha="center", va="center", fontsize=20, color=INK)
        figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
        axes.set_title(subtitle, fontsize=9.5, fontweight="normal", color=MUTED)
        _legend(figure, any(dotted))


def _places(arrays: Sequence[Array]) -> dict[str, Point]:
    """Factors on a line or around a circle, and data and result outside of them."""
    factors = [each for each in arrays if each.role == "factor"]
    around = [each for each in factors if not is_core(each.legs)]
    places: dict[str, Point] = {}
    outward: dict[str, Point] = {}
    if _is_chain(around) and len(around) == len(factors):
        for k, each in enumerate(around):
            places[each.name], outward[each.name] = (k * _PITCH, 0.0), (0.0, -1.0)
    else:
        count = len(around)
        radius = 0.0 if len(factors) == 1 else max(1.45, 0.62 * _PITCH / sin(pi / max(count, 3)))
        for k, each in enumerate(around):
            angle = pi / 2 - 2 * pi * k / count + (pi / 4 if count == 2 else 0.0)
            outward[each.name] = (cos(angle), sin(angle))
            places[each.name] = (radius * cos(angle), radius * sin(angle))
        places |= {each.name: (0.0, 0.0) for each in factors if is_core(each.legs)}
    holders = {
        each.name: [factor for factor in around if each.legs[0] in factor.legs]
        for each in arrays
        if each.role != "factor"
    }
    taken: list[Point] = []
    alone = [name for name, found in holders.items() if not found]
    start = min((x for x, _ in places.values()), default=0.0)
    for name, found in holders.items():
        if not found:
            # summed, and only then a part of the product
            height = alone.index(name) - (len(alone) - 1) / 2
            places[name] = (start - 1.3 * _PITCH, 1.1 * height)
            continue
        if len(found) > 1:
            # a hyperedge: what it leads to goes where there is room
            best = _widest_gap([*outward.values(), *taken])
            taken.append(best)
            homes = [places[factor.name] for factor in found]
            x, y = (sum(values) / len(homes) for values in zip(*homes, strict=True))
            places[name] = (x + _REACH * best[0], y + _REACH * best[1])
            continue
        home, direction = places[found[0].name], outward[found[0].name]
        mates = [other for other, its in holders.items() if its == found]
        if len(mates) > 1:
            angle = pi / 2 - 2 * pi * mates.index(name) / len(mates)
            direction = (cos(angle), sin(angle))
        reach = _REACH * (1.3 if abs(direction[0]) > 0.5 else 1.0)
        places[name] = (home[0] + reach * direction[0], home[1] + reach * direction[1])
    return places


def _is_chain(factors: Sequence[Array]) -> bool:
    """Whether bonds join each factor to the next one, and nothing else."""
    shared = [
        (j, k)
        for k, right in enumerate(factors)
        for j, left in enumerate(factors[:k])
        for leg in left.legs
        if leg in right.legs
    ]
    return len(factors) > 1 and shared == [(k - 1, k) for k in range(1, len(factors))]


def _widest_gap(units: Sequence[Point]) -> Point:
    """The direction that is farthest from all of ``units``."""
    turns = [(cos(2 * pi * k / 48), sin(2 * pi * k / 48)) for k in range(48)]
    return max(turns, key=lambda c: min(hypot(c[0] - u[0], c[1] - u[1]) for u in units))


def _hyperedges(arrays: Sequence[Array], places: Mapping[str, Point]) -> dict[Leg, Point]:
    """A dot for every leg of three arrays or more, amid the factors that it joins."""
    dots: dict[Leg, Point] = {}
    for leg in dict.fromkeys(leg for array in arrays for leg in array.legs):
        ends = [array for array in arrays if leg in array.legs]
        if len(ends) > 2:
            inner = [places[each.name] for each in ends if each.role == "factor"]
            x, y = (sum(values) / len(inner) for values in zip(*inner, strict=True))
            outer = [places[each.name] for each in ends if each.role != "factor"]
            if len(inner) == 2 and outer:
                # off the line between the two, where other legs may run
                x, y = (0.62 * x + 0.38 * outer[0][0], 0.62 * y + 0.38 * outer[0][1])
            dots[leg] = (x, y)
    return dots


def _draw_edges(
    axes: Axes,
    arrays: Sequence[Array],
    sizes: Mapping[Leg, int],
    places: Mapping[str, Point],
    dots: Mapping[Leg, Point],
) -> None:
    for leg in dict.fromkeys(leg for array in arrays for leg in array.legs):
        ends = [places[array.name] for array in arrays if leg in array.legs]
        label = f"{leg}  {sizes[leg]}"
        colour = "#009e73" if leg == OUTPUT else MUTED
        if len(ends) == 1:
            # the leg of an array that is summed over it
            ((x, y),) = ends
            axes.plot([x, x + 0.45 * _PITCH], [y, y], color=colour, linewidth=1.8, zorder=1)
            _label(axes, (x + 0.5 * _PITCH, y + 0.3), f"Σ {label}")
            continue
        if leg not in dots:
            (x0, y0), (x1, y1) = ends
            axes.plot([x0, x1], [y0, y1], color=colour, linewidth=1.8, zorder=1)
            _label(axes, ((x0 + x1) / 2, (y0 + y1) / 2), label)
            continue
        x, y = dots[leg]
        for x0, y0 in ends:
            axes.plot([x0, x], [y0, y], color=colour, linewidth=1.8, zorder=1)
        axes.scatter([x], [y], s=42, color=INK, zorder=3)
        _label(axes, _beside((x, y), ends), label)


def _beside(dot: Point, ends: Sequence[Point]) -> Point:
    """A place next to a dot, in the widest gap between the edges that leave it."""
    directions = [(x - dot[0], y - dot[1]) for x, y in ends]
    units = [(x / hypot(x, y), y / hypot(x, y)) for x, y in directions if hypot(x, y) > 0]
    best = _widest_gap(units)
    return dot[0] + 0.55 * best[0], dot[1] + 0.33 * best[1]


def _label(axes: Axes, place: Point, text: str) -> None:
    axes.text(
        *place,
        text,
        ha="center",
        va="center",
        fontsize=9,
        color=INK,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _draw_node(axes: Axes, array: Array, place: Point) -> None:
    if array.role == "result":
        # an open leg: the network is not contracted there
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 3.0}
        bold: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "color": _EDGE["result"]}
        axes.text(*place, array.name, ha="center", va="center", zorder=5, bbox=plain, **bold)
        return
    axes.text(
        *place,
        array.name.replace("coefficients_", "coefficients\nof level "),
        ha="center",
        va="center",
        fontsize=9.5,
        color=INK,
        zorder=5,
        bbox={
            "boxstyle": "round,pad=0.45,rounding_size=0.35",
            "facecolor": _FILL[array.role],
            "edgecolor": _EDGE[array.role],
            "linewidth": 1.4,
        },
    )


def _legend(figure: object, hyperedges: bool) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    assert isinstance(figure, Figure)
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="s",
            markersize=9,
            markerfacecolor=_FILL[role],
            markeredgecolor=_EDGE[role],
            label=meaning,
        )
        for role, meaning in _MEANING.items()
        if role != "result"
    ]
    handles.append(Line2D([], [], color="#009e73", linewidth=1.8, label="open leg: the output"))
    if hyperedges:
        handles.append(
            Line2D([], [], linestyle="", marker="o", color=INK, label="leg of three arrays or more")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)

"""Fronts: no mark hides another, and axes have ticks however small their range is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from tensormoe import rank_front
from tensormoe.plotting import figure, plot_fronts


@dataclass(frozen=True)
class Point:
    rank: int | None
    expert_rank: int
    expert_span: int


def marks(axes: object) -> dict[str, tuple[float, float]]:
    """Where the marks of the legend stand, in points."""
    found = {}
    for line in axes.get_lines():  # type: ignore[attr-defined]
        name = str(line.get_label()).split(",")[0]
        if not name.startswith("_"):
            x, y = line.get_transform().transform(line.get_xydata()[0])
            found[name] = (float(x), float(y))
    return found


@pytest.mark.parametrize(
    "places",
    [
        [(768, 16)] * 8,
        [(768, 16), (768, 16), (700, 16), (1, 1), (2, 400)],
        [(100, 100), (101, 100), (102, 101)],
        [(1, 1)],
    ],
)
def test_marks_stand_apart_and_every_axis_has_ticks(
    tmp_path: Path, places: list[tuple[int, int]]
) -> None:
    chosen = {f"kind_{index}": Point(index + 1, *each) for index, each in enumerate(places)}
    with figure(tmp_path / "fronts.png", 9.6, 5.4) as drawn:
        axes = drawn.add_subplot()
        plot_fronts(axes, {name: [each] for name, each in chosen.items()}, chosen)
        drawn.draw_without_rendering()
        found = marks(axes)
        assert [*found] == [*chosen]
        size = 8 * drawn.dpi / 72
        for one, other in combinations(found.values(), 2):
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > size
        box = axes.get_window_extent()
        for x, y in found.values():
            assert box.x0 < x < box.x1
            assert box.y0 < y < box.y1
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            shown = [each.get_text() for each in axis.get_ticklabels() if each.get_text()]
            values = [float(each.replace(",", "")) for each in shown]
            inside = [each for each in values if limits[0] <= each <= limits[1]]
            assert inside
            if limits[1] > 2 * limits[0]:
                assert len(inside) >= 2
        looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines()}
        assert len(looks) == len(chosen)


def test_fronts_that_coincide_differ_in_width_and_dashes(tmp_path: Path) -> None:
    front = rank_front("tensor_ring", 64, 64, 32)
    with figure(tmp_path / "fronts.png") as drawn:
        axes = drawn.add_subplot()
        plot_fronts(axes, {"one": front, "two": front, "three": front})
        lines = axes.get_lines()
        assert len({line.get_linewidth() for line in lines}) == 3
        assert len({str(line.get_linestyle()) for line in lines}) >= 2
        widths = [line.get_linewidth() for line in lines]
        assert widths == sorted(widths, reverse=True)
        legend = axes.get_legend()
        assert legend is not None
        assert [each.get_text() for each in legend.get_texts()] == ["one", "two", "three"]
        # beside the axes, where it hides nothing
        drawn.draw_without_rendering()
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1

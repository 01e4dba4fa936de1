"""Pictures as values: shapes in groups, and SVG text made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from os import PathLike

from tensormoe._files import check_picture, write_file

# Contrast of at least 4.5 with white letters on top, and of 3 with light and dark grounds alike:
# a picture does not know what it is shown on.
FACTOR, DATA, RESULT = "#1f6fb2", "#b4540a", "#0f7a5c"
OPEN, BOND, INK = DATA, "#66717e", "#75808d"

PILL = 22.0
"""Height of a label on a ground of its own."""

_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_NARROW = frozenset("ijlrtfI.,:;'|()[] ")
# characters that no XML document may hold
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line of two or more points, or a cubic Bézier curve of four."""

    points: tuple[Point, ...]
    colour: str = BOND
    curved: bool = False
    dashed: bool = False
    width: float = 2.0

    def svg(self) -> str:
        start, *others = (f"{x:.1f} {y:.1f}" for x, y in self.points)
        path = f"M{start} {'C' if self.curved else 'L'}{' '.join(others)}"
        dashes = ' stroke-dasharray="3 3"' if self.dashed else ""
        return (
            f'<path d="{path}" fill="none" stroke="{self.colour}" '
            f'stroke-width="{self.width:g}"{dashes}/>'
        )


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with round corners, known by its middle."""

    middle: Point
    width: float
    height: float
    colour: str
    radius: float = 7.0

    def svg(self) -> str:
        x, y = self.middle[0] - self.width / 2, self.middle[1] - self.height / 2
        return (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{self.width:.1f}" '
            f'height="{self.height:.1f}" rx="{self.radius:g}" fill="{self.colour}"/>'
        )


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled circle."""

    middle: Point
    radius: float
    colour: str

    def svg(self) -> str:
        x, y = self.middle
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{self.radius:g}" fill="{self.colour}"/>'


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text; ``place`` is the middle of its height."""

    place: Point
    text: str
    colour: str = INK
    size: float = 13.0
    bold: bool = False
    anchor: str = "middle"

    def svg(self) -> str:
        x, y = self.place
        weight = ' font-weight="600"' if self.bold else ""
        return (
            # the baseline, since not every renderer knows dominant-baseline
            f'<text x="{x:.1f}" y="{y + 0.35 * self.size:.1f}" font-size="{self.size:g}" '
            f'text-anchor="{self.anchor}" fill="{self.colour}"{weight}>{_written(self.text)}</text>'
        )


Shape = Line | Box | Dot | Text


@dataclass(frozen=True, slots=True)
class Group:
    """Shapes that show one thing.

    Args:
        kind: of the thing, ``"factor"`` or ``"bond"`` for instance: its class in the SVG.
        name: of the thing, its ``data-name``.
        shapes: in the order in which they are painted.
    """

    kind: str
    name: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Drawing:
    """A picture as SVG text, which notebooks show.

    The ground is transparent, and the colours are read on light and on dark ones.

    Args:
        title: of the picture, for readers that do not see it.
        width: in pixels.
        height: in pixels.
        groups: what is drawn.

    >>> from tensormoe import CP, LayerSpec
    >>> drawing = LayerSpec(768, 768, 512, CP(64)).draw()
    >>> drawing
    Drawing('CP(rank=64)', 440 × 345)
    >>> drawing.svg[:4]
    '<svg'
    """

    title: str
    width: float
    height: float
    groups: tuple[Group, ...] = field(repr=False)

    def __repr__(self) -> str:
        return f"Drawing({self.title!r}, {self.width:.0f} × {self.height:.0f})"

    @cached_property
    def svg(self) -> str:
        """The picture as SVG text: one ``<g class="…" data-name="…">`` for each thing in it."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" '
            f'font-family="{_FONT}" style="max-width: 100%; height: auto">',
            f"<title>{_written(self.title)}</title>",
        ]
        for group in self.groups:
            lines.append(f'<g class="{_written(group.kind)}" data-name="{_written(group.name)}">')
            lines += [shape.svg() for shape in group.shapes]
            lines.append("</g>")
        return "\n".join([*lines, "</svg>", ""])

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | PathLike[str]) -> None:
        """Write the picture to a file; an interrupted save leaves the old file.

        Args:
            path: ends in ``.svg``, or in ``.png`` or ``.pdf``, which matplotlib paints.

        Raises:
            SpecError: another ending, or a file that cannot be written.
            MissingDependencyError: ``.png`` or ``.pdf`` without matplotlib.
        """
        target = check_picture(path)
        if target.suffix.lower() == ".svg":
            write_file(target, self.svg.encode())
        else:
            from tensormoe._drawing._paint import painted

            write_file(target, painted(self, target.suffix.lower()))

    def shapes(self) -> Iterator[Shape]:
        """The shapes of all groups."""
        for group in self.groups:
            yield from group.shapes


def pill(middle: Point, label: str, colour: str = BOND) -> tuple[Box, Text]:
    """A label on a ground of its own, which an edge may run behind."""
    box = Box(middle, text_width(label, 12.5) + 16, PILL, colour, PILL / 2)
    return box, Text(middle, label, "#ffffff", 12.5)


def text_width(text: str, size: float = 13.0) -> float:
    """The width of a text in pixels, of a wide font rather than of a narrow one."""
    return size * sum(0.38 if letter in _NARROW else 0.64 for letter in text)


def _written(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text))

"""Drawings in the formats that matplotlib writes."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from tensormoe._drawing._shapes import Box, Dot, Drawing, Line
from tensormoe._extras import require


def painted(drawing: Drawing, suffix: str) -> bytes:
    """The bytes of a file.

    Args:
        drawing: to paint.
        suffix: of the file: ``".png"`` or ``".pdf"``.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require(f"a picture in a {suffix} file", ("matplotlib",), "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a point is a pixel, so that sizes of letters are as they stand
    figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=72)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0.0, drawing.width), ylim=(drawing.height, 0.0))
    axes.set_axis_off()
    for order, shape in enumerate(drawing.shapes()):
        artist = _artist(shape)
        artist.set_zorder(order)
        axes.add_artist(artist)
    buffer = BytesIO()
    figure.savefig(buffer, format=suffix[1:], dpi=144, transparent=True)
    return buffer.getvalue()


def _artist(shape: Any) -> Any:
    from matplotlib.patches import BoxStyle, Circle, FancyBboxPatch, PathPatch
    from matplotlib.path import Path
    from matplotlib.text import Text

    if isinstance(shape, Line):
        codes = [Path.MOVETO] + [Path.CURVE4 if shape.curved else Path.LINETO] * (
            len(shape.points) - 1
        )
        style = (0, (3, 3)) if shape.dashed else "-"
        path = Path(shape.points, codes)
        return PathPatch(path, fill=False, ec=shape.colour, lw=shape.width, ls=style)
    if isinstance(shape, Dot):
        return Circle(shape.middle, shape.radius, color=shape.colour, lw=0)
    if isinstance(shape, Box):
        x, y = shape.middle[0] - shape.width / 2, shape.middle[1] - shape.height / 2
        corners = BoxStyle.Round(pad=0, rounding_size=min(shape.radius, shape.height / 2))
        return FancyBboxPatch(
            (x, y), shape.width, shape.height, boxstyle=corners, color=shape.colour, lw=0
        )
    anchors = {"start": "left", "middle": "center", "end": "right"}
    return Text(
        shape.place[0],
        shape.place[1],
        shape.text,
        color=shape.colour,
        fontsize=0.92 * shape.size,
        fontweight="bold" if shape.bold else "normal",
        ha=anchors[shape.anchor],
        va="center_baseline",
        parse_math=False,
    )

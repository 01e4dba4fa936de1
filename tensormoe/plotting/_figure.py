"""Charts in one style, written whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe._files import check_picture, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
"""Colour of letters and of reference lines on white."""

MUTED = "#7b8794"
"""Colour of what stands behind; also read on dark grounds."""

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#b08d00",
    "#56b4e9",
    "#661100",
    "#332288",
    "#117733",
)
"""Told apart by people who do not see red and green alike.

Okabe and Ito 2008, with a darker yellow; the last three are dark ones of Tol 2021.
"""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.alpha": 0.25,
    "grid.color": MUTED,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",
}
_LETTERS = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")


@contextmanager
def figure(
    path: str | PathLike[str],
    width: float = 7.2,
    height: float = 4.8,
    *,
    transparent: bool = False,
) -> Iterator[Figure]:
    """A figure of matplotlib to draw on, written to ``path`` at the end if nothing failed.

    Args:
        path: ends in ``.png``, ``.svg`` or ``.pdf``.
        width: in inches.
        height: in inches.
        transparent: no ground, and letters that are read on light and on dark pages.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SpecError: another ending, or a file that cannot be written.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "squares.svg")
    ...     with figure(path, transparent=True) as drawn:
    ...         axes = drawn.add_subplot(title="Squares")
    ...         _ = axes.plot([1, 2, 3], [1, 4, 9], color=COLOURS[0])
    ...         tidy(axes)
    ...     path.read_text()[:5]
    '<?xml'
    """
    target = check_picture(path)
    require("a chart", ("matplotlib",), "plot")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = _STYLE | dict.fromkeys(_LETTERS, MUTED if transparent else INK)
    with rc_context(style):  # type: ignore[arg-type]
        # no pyplot: nothing global, and no window system is looked for
        drawn = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(drawn)
        yield drawn
        buffer = BytesIO()
        kind = target.suffix[1:].lower()
        drawn.savefig(buffer, format=kind, dpi=150, transparent=transparent)
    write_file(target, buffer.getvalue())


def tidy(axes: Axes) -> None:
    """Take away the box around axes, and put a light grid behind.

    Args:
        axes: of matplotlib.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True)
    axes.set_axisbelow(True)

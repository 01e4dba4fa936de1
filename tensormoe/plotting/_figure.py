"""Pictures: one style, written whole."""

from __future__ import annotations

from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormoe._files import write_file
from tensormoe.cli._extras import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "MUTED", "picture", "tidy"]

INK, MUTED = "#1f2933", "#7b8794"

# told apart by people who don't see red and green alike (Okabe & Ito 2008, darker yellow; the last
# two are dark ones of Tol 2021)
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#b08d00",
    "#56b4e9",
    "#661100",
    "#332288",
)

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw on, written to ``path`` at the end if nothing failed.

    Args:
        path: its extension says the format.
        width: in inches.
        height: in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SpecError: the file can't be written.
    """
    require("matplotlib", "cli", "--plot")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        # no pyplot: nothing global, and no window system is looked for
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        buffer = BytesIO()
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    write_file(path, buffer.getvalue())


def tidy(axes: Axes) -> None:
    """Axes without a box, with a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)

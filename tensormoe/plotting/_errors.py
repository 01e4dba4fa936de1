"""What decompositions lost against what they kept, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tensormoe._files import PICTURE_SUFFIXES
from tensormoe.decomposition import ErrorCurve, ErrorPoint, control_curves
from tensormoe.errors import SpecError
from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.plotting._figure import COLOURS, INK, picture, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_errors", "plot_errors"]

# of each expert, and of the three unfoldings
_DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
# one more than colours, so that pairs repeat late
_MARKERS = "osD^vPX*h"
_SHARES = [digit * 10.0**power for power in range(-6, 0) for digit in (1, 2, 5)] + [1.0]


def draw_errors(
    path: str | Path, title: str, curves: Sequence[ErrorCurve], *, outputs: bool = False
) -> None:
    """Write a picture of error against parameters, a line a factorization.

    Lines go through the points that no smaller one beats; other points are faint. Dashed lines are
    truncated singular value decompositions with no more parameters, each at its own number of them:
    of the experts, one by one, and of all together.

    Args:
        path: of the picture; its extension is one of ``.png``, ``.svg`` and ``.pdf``.
        title: what was decomposed.
        curves: from :func:`tensormoe.decomposition.error_curves`.
        outputs: whether to draw the error of outputs, which reports know where samples of inputs
            were given, instead of that of the weights.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        SpecError: another extension, or a file that can't be written.

    >>> import numpy as np, tempfile
    >>> from tensormoe.decomposition import error_curves
    >>> experts = np.random.default_rng(0).standard_normal((4, 12, 10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     picture = Path(folder, "experts.svg")
    ...     draw_errors(picture, "4 experts, 12 → 10", error_curves(experts, ["cp", "tucker"]))
    ...     picture.read_text()[:5]
    '<?xml'
    """
    target = Path(path)
    if target.suffix.lower() not in PICTURE_SUFFIXES:
        listed = ", ".join(PICTURE_SUFFIXES)
        raise SpecError(f"path must end in one of {listed}; got {str(path)!r}. Rename the file.")
    with picture(target, 7.2, 4.8) as figure:
        axes = figure.add_subplot()
        plot_errors(axes, curves, outputs=outputs)
        axes.set_title(title, loc="left")
        if curves:
            axes.legend(fontsize=9)


def plot_errors(axes: Axes, curves: Sequence[ErrorCurve], *, outputs: bool = False) -> None:
    """Draw curves of relative error over the share of parameters on axes, and label these.

    Args:
        axes: of matplotlib.
        curves: to draw; SVDs come with the errors of weights.
        outputs: whether to draw the error of outputs.
    """
    for place, curve in enumerate(curves):
        colour, marker = _look(curve.name, place)
        front = curve.front(outputs=outputs)
        behind = [point for point in curve.points if point not in front]
        axes.plot(
            *_line(front, outputs), color=colour, marker=marker, markersize=5.0, label=curve.name
        )
        axes.plot(*_line(behind, outputs), marker, color=colour, markersize=4.0, alpha=0.3, mew=0.0)
    for control, dashes in zip(control_curves(curves), _DASHES, strict=False):
        # some are too large to keep anything of
        kept = [each for each in control.points if each.rank]
        if kept and not outputs:
            shares = [each.parameters / control.dense_parameters for each in kept]
            errors = [each.error for each in kept]
            name = f"SVD of {control.unfolding}"
            axes.plot(shares, errors, color=INK, linestyle=dashes, linewidth=1.2, label=name)
    tidy(axes)
    axes.set(xscale="log", xlabel="parameters, share of the dense experts'")
    axes.set_ylabel(f"relative error of the {'outputs' if outputs else 'weights'}")
    axes.set_xticks(_SHARES, [f"{100 * share:g} %" for share in _SHARES])
    axes.minorticks_off()
    # an error above one is worse than no weights at all
    axes.set_ylim(0.0, min(axes.get_ylim()[1], 1.05))
    # ticks have stretched what is shown
    low, high = axes.dataLim.intervalx
    if 0.0 < low <= high < float("inf"):
        axes.set_xlim(low / 1.1, high * 1.1)
    else:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center")


def _look(name: str, place: int) -> tuple[str, str]:
    """A factorization's colour and mark, the same in every picture."""
    names = list(FACTORIZATIONS)
    place = names.index(name) if name in names else len(names) + place
    return COLOURS[place % len(COLOURS)], _MARKERS[place % len(_MARKERS)]


def _line(points: Sequence[ErrorPoint], outputs: bool) -> tuple[list[float], list[float]]:
    """Shares of parameters, and errors."""
    shares, errors = [], []
    for point in points:
        error = point.report.output_error if outputs else point.report.error
        if error is not None:
            shares.append(point.report.ratio)
            errors.append(error)
    return shares, errors

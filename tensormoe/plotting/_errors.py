"""Errors of decompositions against the parameters that they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tensormoe.decomposition import ErrorCurve, ErrorPoint, control_curves
from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.plotting._figure import COLOURS, MUTED, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of each expert, and of the three unfoldings
_DASHES = ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
# one more than colours, so that pairs repeat late
_MARKERS = "osD^vPX*hp"
_SHARES = [digit * 10.0**power for power in range(-6, 0) for digit in (1, 2, 5)] + [1.0]


def plot_errors(axes: Axes, curves: Sequence[ErrorCurve], *, outputs: bool = False) -> None:
    """Plot relative error over the share of parameters, one line per factorization.

    Lines go through the points that no smaller one beats; other points are faint. Dashed lines are
    truncated singular value decompositions with no more parameters, each at its own number of them:
    of the experts, one by one, and of all together.

    Args:
        axes: of matplotlib.
        curves: from :func:`tensormoe.decomposition.error_curves`.
        outputs: whether to plot the error of outputs, which reports know where samples of inputs
            were given, instead of that of the weights.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from tensormoe.decomposition import error_curves
    >>> from tensormoe.plotting import figure
    >>> experts = np.random.default_rng(0).standard_normal((4, 12, 10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with figure(Path(folder, "errors.svg")) as drawn:
    ...         plot_errors(drawn.add_subplot(), error_curves(experts, ["cp", "tucker"]))
    """
    for index, curve in enumerate(curves):
        colour, marker = _look(curve.name, index)
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
            axes.plot(shares, errors, color=MUTED, linestyle=dashes, linewidth=1.2, label=name)
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

"""Maps of experts: which inputs each of them serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensormoe.plotting._figure import MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def plot_experts(
    axes: Axes,
    table: Any,
    *,
    labels: Sequence[str] | None = None,
    most: float | None = None,
) -> AxesImage:
    """Plot mean coefficients as a map: a row for each class, a column for each expert.

    Args:
        axes: of matplotlib.
        table: (classes, experts), mean coefficients of the inputs of every class.
        labels: names of the classes; their numbers by default.
        most: the coefficient that the darkest colour stands for; the largest of the table by
            default. Maps with the same one can be compared.

    Returns:
        The image, for a colour bar.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from tensormoe.plotting import figure
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with figure(Path(folder, "experts.png")) as drawn:
    ...         _ = plot_experts(drawn.add_subplot(), [[0.9, 0.1], [0.2, 0.8]])
    """
    from matplotlib.colors import PowerNorm

    rows = [[float(value) for value in row] for row in table]
    ceiling = max(max(row) for row in rows) if most is None else most
    # the square root shows small coefficients as well
    norm = PowerNorm(0.5, 0.0, ceiling)
    image = axes.imshow(rows, aspect="auto", cmap="magma_r", norm=norm, interpolation="nearest")
    used = sum(max(column) > 1e-3 for column in zip(*rows, strict=True))
    said = f"{used} of {len(rows[0])} in use"
    axes.set_title(said, loc="right", color=MUTED, size=9.5, weight="normal")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    return image

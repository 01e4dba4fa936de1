"""The demo's picture: loss curves, and which classes each expert serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tensormoe.cli._demo._training import History
from tensormoe.plotting import COLOURS, figure, plot_experts, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NDArray = npt.NDArray[Any]


def draw(
    path: Path, histories: Mapping[str, Sequence[History]], tables: Mapping[str, NDArray]
) -> None:
    """Write the picture.

    Args:
        path: of the picture.
        histories: by model, one a run.
        tables: mean coefficients (classes, experts) by model.
    """
    with figure(path, 11.0, 8.6) as drawn:
        drawn.get_layout_engine().set(h_pad=0.08, w_pad=0.08, hspace=0.05)  # type: ignore[union-attr,call-arg]
        top, bottom = drawn.subfigures(2, 1, height_ratios=(1.0, 1.15), squeeze=False)[:, 0]
        loss, accuracy = top.subplots(1, 2)
        _curves(loss, histories, "losses", 1.0)
        loss.set_yscale("log")
        loss.set_title("Training loss", loc="left")
        loss.set_ylabel("cross entropy")
        _curves(accuracy, histories, "accuracies", 100.0)
        accuracy.set_title("Accuracy on test images", loc="left")
        accuracy.set_ylabel("%")
        highest = max(100 * max(each.accuracies) for runs in histories.values() for each in runs)
        accuracy.set_ylim(max(0.0, min(86.0, highest - 10.0)), min(100.0, highest + 1.5))
        accuracy.legend(loc="lower right")
        panels = bottom.subplots(len(tables), 1, squeeze=False)[:, 0]
        ceiling = max(float(table.max()) for table in tables.values())
        for panel, (name, table) in zip(panels, tables.items(), strict=True):
            image = plot_experts(panel, table, most=ceiling)
            panel.set_title(f"{name}: which digits its experts serve", loc="left")
            panel.set_ylabel("digit")
        panels[-1].set_xlabel("experts, sorted by the digit that they serve most")
        # all have the same scale
        bar = bottom.colorbar(image, ax=list(panels), pad=0.015, aspect=28)
        bar.set_label("mean coefficient")
        bar.outline.set_visible(False)


def _curves(
    axes: Axes, histories: Mapping[str, Sequence[History]], figures: str, unit: float
) -> None:
    """The mean of the runs as a line, their range as a band."""
    for colour, (name, runs) in zip(COLOURS, histories.items(), strict=False):
        values = unit * np.array([getattr(each, figures) for each in runs])
        epochs = np.arange(1, values.shape[1] + 1)
        marker = "o" if len(epochs) == 1 else ""
        axes.fill_between(
            epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.13, linewidth=0
        )
        axes.plot(
            epochs, values.mean(axis=0), color=colour, linewidth=1.7, marker=marker, label=name
        )
    axes.set_xlabel("epoch")
    tidy(axes)

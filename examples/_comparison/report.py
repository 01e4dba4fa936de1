"""Figures as a table, a file and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
from _tables import make_console, make_table

from _comparison.outcome import Outcome, Task
from _comparison.training import Recipe, Run
from tensormoe.plotting import COLOURS, figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "save", "show"]

_MARKERS = ("o", "s", "^")
_NAMES = {"accuracy": "test accuracy, %", "loss": "test loss, nats"}
_UNITS = {"accuracy": 100.0, "loss": 1.0}
_DIGITS = {"accuracy": 2, "loss": 4}


def show(task: Task, recipe: Recipe, outcomes: Sequence[Outcome]) -> None:
    """Print what every variant costs and reached."""
    table = make_table(
        "model",
        "parameters",
        "of MLPs",
        "MLP FLOPs\na token",
        _NAMES[task.figure],
        "lowest",
        "highest",
        "difference to dense\nat the same seed",
        "CPU s\na run",
    )
    unit, digits = _UNITS[task.figure], _DIGITS[task.figure]
    dense = outcomes[0].finals(task.figure)
    for outcome in outcomes:
        found = outcome.finals(task.figure)
        gaps = [unit * (one - other) for one, other in zip(found, dense, strict=True)]
        spread = f"{mean(gaps):+.{digits}f} ({min(gaps):+.{digits}f} … {max(gaps):+.{digits}f})"
        table.add_row(
            outcome.name,
            f"{outcome.parameters:,}",
            f"{outcome.mlp_parameters:,}",
            f"{outcome.flops:,.0f}",
            *(f"{unit * value:.{digits}f}" for value in (mean(found), min(found), max(found))),
            "–" if outcome is outcomes[0] else spread,
            f"{outcome.seconds:.0f}",
        )
    console = make_console()
    console.print(f"\n{task.data}", style="bold", soft_wrap=True)
    console.print(
        f"{recipe.steps} steps of {recipe.batch}, learning rate {recipe.rate:g}, weight decay "
        f"{recipe.decay:g}, {len(dense)} seeds\n",
        soft_wrap=True,
    )
    console.print(table)
    console.print()
    for outcome in outcomes[1:]:
        for line in outcome.ranks:
            console.print(f"{outcome.name}, {line}", style="dim", soft_wrap=True)


def save(path: Path, task: Task, recipe: Recipe, outcomes: Sequence[Outcome]) -> None:
    """Write all figures, every step's loss included, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "data": task.data,
        "recipe": asdict(recipe),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(values))


def draw(path: Path, task: Task, outcomes: Sequence[Outcome]) -> None:
    """Draw training loss and score over the steps: means as lines, lowest to highest as bands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unit = _UNITS[task.figure]
    with figure(path, 11.0, 4.6) as drawn:
        loss, score = drawn.subplots(1, 2)
        _curves(loss, outcomes, lambda run: _smoothed(run.losses))
        loss.set_title("Training loss", loc="left")
        loss.set_ylabel("cross entropy, nats")
        _curves(
            score,
            outcomes,
            lambda run: (
                np.array(run.places),
                unit * np.array([getattr(each, task.figure) for each in run.scores]),
            ),
            marked=True,
        )
        score.set_title("On data that is not trained on", loc="left")
        score.set_ylabel(_NAMES[task.figure])
        score.legend(loc="lower right" if task.figure == "accuracy" else "upper right")
        drawn.suptitle(task.data, x=0.01, ha="left", fontsize=10)


def _smoothed(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means over stretches of a fortieth of the steps, each at its middle."""
    width = max(len(losses) // 40, 1)
    count = len(losses) // width
    places = width * (np.arange(count) + 0.5)
    return places, np.reshape(losses[: count * width], (count, width)).mean(axis=1)


def _curves(
    axes: Axes,
    outcomes: Sequence[Outcome],
    curve: Callable[[Run], tuple[np.ndarray, np.ndarray]],
    *,
    marked: bool = False,
) -> None:
    for colour, marker, outcome in zip(COLOURS, _MARKERS, outcomes, strict=False):
        curves = [curve(run) for run in outcome.runs]
        places, values = curves[0][0], np.stack([each for _, each in curves])
        axes.fill_between(
            places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(
            places,
            values.mean(axis=0),
            color=colour,
            linewidth=1.7,
            marker=marker if marked else "",
            markersize=4.5,
            label=outcome.name,
        )
    axes.set_xlabel("step")
    # the first steps fall from far above everything that is to be told apart
    ends = [curve(run)[1] for outcome in outcomes for run in outcome.runs]
    if not marked:
        axes.set_ylim(
            0.95 * min(each.min() for each in ends), 1.05 * max(each[2:].max() for each in ends)
        )
    tidy(axes)

"""Measures, tables and the picture of the fairness study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
from _fairness_data import Part, Task

from tensormoe.plotting import COLOURS, MUTED, figure, tidy

Run = dict[str, Any]
Values = npt.NDArray[np.float64]

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
LEVELS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Accuracies of the target subgroup at which the loss elsewhere is compared."""


def best_rate(runs: Mapping[float, Run]) -> float:
    """The rate of the smallest validation loss."""
    return min(runs, key=lambda rate: float(runs[rate]["loss"]))


def _sizes(part: Part) -> Values:
    return np.bincount(part.subgroup, minlength=4).astype(np.float64)


def overall(found: Values, sizes: Values) -> Values:
    """Accuracy over all inputs, from those of the subgroups (..., 4)."""
    made: Values = (found * sizes).sum(axis=-1) / sizes.sum()
    return made


def elsewhere(found: Values, sizes: Values) -> Values:
    """Accuracy over all inputs outside of the target subgroup."""
    return overall(found, sizes * np.array([1.0, 1.0, 1.0, 0.0]))


MEASURES: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": lambda found, sizes: float(overall(found, sizes)),
    "target subgroup": lambda found, sizes: float(found[3]),
    "gap of true positives": lambda found, sizes: float(abs(found[3] - found[2])),
    "deviation": lambda found, sizes: float(found.std()),
    "worst subgroup": lambda found, sizes: float(found.min()),
}
"""From accuracies by subgroup: equality of opportunity is the gap, max-min fairness the worst."""


def chosen(run: Run, technique: str) -> Values:
    """Test accuracies by subgroup at the shift with the best worst subgroup on validation data."""
    if technique == "none":
        return np.array(run["blind"]["test"][0])
    place = int(np.array(run[technique]["validation"]).min(axis=1).argmax())
    return np.array(run[technique]["test"][place])


def tables(task: Task, found: Mapping[tuple[str, str], tuple[float, list[Run]]]) -> str:
    """All measures of all models and techniques, and the loss elsewhere, as Markdown."""
    sizes = _sizes(task.test)
    lines, ranges = [], []
    for (kind, kept), (rate, runs) in found.items():
        for technique, name in _techniques(kept, runs):
            values = [chosen(run, technique) for run in runs]
            measured = {
                name: [100 * measure(each, sizes) for each in values]
                for name, measure in MEASURES.items()
            }
            ranges.append([max(each) - min(each) for each in measured.values()])
            shown = " | ".join(f"{mean(each):.1f}" for each in measured.values())
            lines.append(f"| {kind} | {rate:g} | {name} | {shown} |")
    sizes_of = {kind: runs[0]["parameters"] for (kind, _), (_, runs) in found.items()}
    spread = np.array(ranges).max(axis=0)
    return "\n".join(
        [
            f"### {task.title}",
            "",
            f"{len(task.train.x):,} inputs for training, {int(_sizes(task.train)[3]):,} of them in "
            f"the target subgroup; {len(task.test.x):,} for testing, {int(sizes[3]):,} in it. "
            "Parameters: " + ", ".join(f"{kind} {size:,}" for kind, size in sizes_of.items()) + ".",
            "",
            "| model | rate | technique | " + " | ".join(MEASURES) + " |",
            "| --- | ---: | --- |" + " ---: |" * len(MEASURES),
            *lines,
            "",
            f"Means over seeds ({len(next(iter(found.values()))[1])}), which differ by at most "
            + ", ".join(f"{each:.1f}" for each in spread)
            + " points.",
            "",
            *_losses(found, sizes),
            "",
        ]
    )


def _techniques(kept: str, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """A technique applied to the logits of a model, by name."""
    if kept == "oversampled":
        return [("none", "oversampling")]
    names = {
        "none": "none",
        "blind": "blind thresholding",
        "experts": "expert thresholding",
        "sex": "threshold by known sex",
    }
    return [(each, name) for each, name in names.items() if each == "none" or each in runs[0]]


def loss_at(curve: Values, sizes: Values, level: float) -> float:
    """Points of accuracy lost elsewhere when the target subgroup has come to a level.

    Between two shifts, the loss is that of the straight line. NaN where it starts above the
    level, or never gets there.
    """
    gained, lost = curve[:, 3], 100 * (elsewhere(curve[0], sizes) - elsewhere(curve, sizes))
    if level < gained[0] or level > gained.max():
        return float("nan")
    after = int((gained >= level).argmax())
    if after == 0:
        return 0.0
    step = (level - gained[after - 1]) / (gained[after] - gained[after - 1])
    return float(lost[after - 1] + step * (lost[after] - lost[after - 1]))


def _losses(found: Mapping[tuple[str, str], tuple[float, list[Run]]], sizes: Values) -> list[str]:
    lines = [
        "Points of accuracy lost elsewhere when the target subgroup has come to",
        "",
        "| model | technique | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |",
        "| --- | --- |" + " ---: |" * len(LEVELS),
    ]
    for (kind, kept), (_, runs) in found.items():
        for technique, name in _techniques(kept, runs):
            if technique == "none":
                continue
            cells = []
            for level in LEVELS:
                values = [loss_at(np.array(each[technique]["test"]), sizes, level) for each in runs]
                cells.append("–" if any(map(isnan, values)) else _spread(values))
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    moved = np.array([run["moved"] for _, runs in found.values() for run in runs if "moved" in run])
    active = [run["active"] for _, runs in found.values() for run in runs if "active" in run]
    lines += [
        "",
        f"Experts per input: {mean(active):.1f}. Where expert thresholding moves the target "
        "subgroup by 1, it moves the others of its label by "
        f"{moved[:, 2].mean():.2f}, and those of the other label by {moved[:, 1].mean():.2f} "
        f"(same sex) and {moved[:, 0].mean():.2f}.",
    ]
    return lines


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    middle = f"{mean(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({low:.1f} – {high:.1f})"


def draw(path: Path, drawn: Sequence[tuple[Task, list[Run], list[Run]]]) -> None:
    """Write the picture: accuracy of the target subgroup against accuracy elsewhere."""
    with figure(path, 3.6 * len(drawn), 3.9, transparent=True) as made:
        panels = made.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (task, experts, plain) in zip(panels, drawn, strict=True):
            sizes = _sizes(task.test)
            for runs, technique, label, colour, line in (
                (plain, "blind", "MLP, blind", MUTED, "--"),
                (experts, "blind", "CPμMoE, blind", COLOURS[1], "-"),
                (experts, "experts", "CPμMoE, experts", COLOURS[0], "-"),
                (experts, "sex", "CPμMoE, known sex", COLOURS[2], ":"),
            ):
                for run in runs:
                    curve = np.array(run[technique]["test"])
                    axes.plot(
                        100 * curve[:, 3],
                        100 * elsewhere(curve, sizes),
                        color=colour,
                        linestyle=line,
                        linewidth=1.4,
                        label=label if run is runs[0] else None,
                    )
            axes.set_title(task.title.replace(": ", ":\n"), loc="left")
            axes.set_xlabel("accuracy of the target subgroup, %")
            tidy(axes)
        panels[0].set_ylabel("accuracy of all others, %")
        panels[0].legend(loc="lower left")

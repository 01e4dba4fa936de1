"""Tables and a picture of what decompositions of the experts lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _tables import make_console, make_table
from matplotlib.ticker import PercentFormatter

from _stockfish.network import EXPERTS
from _stockfish.study import Evaluation, Study, best
from tensormoe.decomposition import ErrorCurve
from tensormoe.plotting import COLOURS, INK, MUTED, figure, plot_errors, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["controls", "draw", "show_evaluations", "show_experts", "show_layer", "verdict"]

# the experts are told to share something where shuffling loses this much more
_MARGIN = 1.05


def show_layer(study: Study, budgets: Sequence[float], budget: float) -> None:
    """Errors of one layer by factorization and budget, and what they say at one of these."""
    table = make_table("", *(f"{budget:.0%}" for budget in budgets))
    for curve in study.trained:
        table.add_row(curve.name, *_cells([curve], budgets))
    table.add_row("SVD of each expert", *_svd(study, budgets), style="dim")
    table.add_row("joint SVD", *_joint(study, budgets), style="dim")
    table.add_row("best for shuffled inputs", *_cells(study.shuffled, budgets), style="dim")
    table.add_row("best for noise", *_cells(study.noise, budgets), style="dim")
    if study.weighted:
        table.add_section()
        table.add_row("outputs, best", *_cells(study.trained, budgets, outputs=True))
        table.add_row("fitted to outputs, best", *_cells(study.weighted, budgets, outputs=True))
    console = make_console()
    rounding = study.layer.rounding
    console.print(f"\n{study.layer.name}, {EXPERTS} experts: relative error", style="bold")
    console.print(table)
    console.print(f"Rounding to int8 itself is off by {rounding:.3f}.")
    table = make_table(
        f"within {budget:.0%}", "parameters", "trained", "SVDs", "joint SVD", "shuffled", "noise"
    )
    for row in controls(study, budget):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(study, budget))


def controls(study: Study, budget: float) -> list[tuple[str, ...]]:
    """Of each factorization within a budget: its size, its error, and those it has to be below."""
    rows = []
    for curve in study.trained:
        point = best([curve], budget)
        if point is None:
            continue
        report = point.report
        apart = [
            *_cells([each for each in study.shuffled if each.name == curve.name], [budget]),
            *_cells([each for each in study.noise if each.name == curve.name], [budget]),
        ]
        joint = "–" if report.joint is None else f"{report.joint.error:.3f}"
        known = f"{report.ratio:.1%}", f"{report.error:.3f}", f"{report.svd_error:.3f}", joint
        rows.append((curve.name, *known, *apart))
    return rows


def verdict(study: Study, budget: float) -> str:
    """Whether the experts share something that saves parameters, in a sentence."""
    found = [best(curves, budget) for curves in (study.trained, study.shuffled, study.noise)]
    if any(point is None for point in found):
        return f"Nothing fits {budget:.0%}."
    trained, apart, noise = (point.report.error for point in found if point is not None)
    report = found[0].report if found[0] is not None else None
    svd = "–" if report is None or report.svd_error is None else f"{report.svd_error:.2f}"
    joint = "–" if report is None or report.joint is None else f"{report.joint.error:.2f}"
    said = (
        f"At {budget:.0%}: {trained:.2f}, SVD of each expert {svd}, joint SVD {joint}, shuffled "
        f"inputs {apart:.2f}, noise {noise:.2f}"
    )
    if apart >= _MARGIN * trained:
        return f"{said}. The experts share part of what they do with their inputs."
    within = (
        "each has a spectrum that falls, no more" if noise >= _MARGIN * trained else "nor alone"
    )
    return f"{said}. These experts do not compress together; {within}."


def show_experts(
    studies: Sequence[Study], budget: float, outputs: Mapping[str, Sequence[float]]
) -> None:
    """Errors expert by expert.

    Args:
        studies: of the layers.
        budget: share of parameters; of all factorizations, the one with the smallest error counts.
        outputs: more columns by their names.
    """
    chosen = [
        (
            study,
            best(study.trained, budget),
            best(study.shuffled, budget),
            best(study.noise, budget),
        )
        for study in studies
    ]
    columns: dict[str, Sequence[float]] = {}
    for study, *points in chosen:
        for name, point in zip(("trained", "shuffled", "noise"), points, strict=True):
            if point is not None:
                columns[f"{study.layer.name}\n{name}"] = point.report.expert_errors
    columns |= outputs
    table = make_table("expert", "pieces", *columns)
    for expert in range(EXPERTS):
        pieces = f"{4 * expert + 1}–{4 * expert + 4}"
        table.add_row(
            str(expert), pieces, *(f"{errors[expert]:.2f}" for errors in columns.values())
        )
    console = make_console()
    console.print(f"\nBy expert, best factorization within {budget:.0%}", style="bold")
    console.print(table)


def show_evaluations(found: Mapping[float, Sequence[Evaluation]], typical: float) -> None:
    """Changes of the evaluations on held-out positions."""
    table = make_table(
        "budget",
        "layers",
        "fitted to",
        "parameters",
        "median off, pawns",
        "same side ahead",
        left=3,
    )
    for budget, evaluations in found.items():
        for each in evaluations:
            table.add_row(
                f"{budget:.0%}",
                ", ".join(each.layers),
                "outputs" if each.weighted else "weights",
                f"{each.share:.1%}",
                f"{each.off:.2f}",
                f"{each.same_sign:.1%}",
            )
    console = make_console()
    console.print("\nEvaluations of held-out positions by the experts", style="bold")
    console.print(table)
    console.print(f"The median evaluation itself is {typical:.2f} pawns from zero.")


def draw(
    path: Path,
    studies: Sequence[Study],
    budgets: Sequence[float],
    budget: float,
    evaluations: Mapping[float, Sequence[Evaluation]],
    typical: float | None,
) -> None:
    """Error against parameters for every layer; below, by expert, for outputs and evaluations."""
    with figure(path, 13.0, 8.0) as drawn:
        above, below = drawn.subplots(2, len(studies))
        for axes, study in zip(above, studies, strict=True):
            plot_errors(axes, study.trained)
            for curves, style, name in (
                (study.shuffled, "-.", "best for shuffled inputs"),
                (study.noise, ":", "best for noise"),
            ):
                line = _line(curves, budgets)
                axes.plot(*line, style, color=MUTED, linewidth=1.6, label=name)
            axes.axhline(study.layer.rounding, color=INK, linewidth=0.8, label="rounding to int8")
            axes.set_title(study.layer.name)
            axes.set_ylim(0.0, 1.0)
        # one legend for all: there is no room for a dozen names among lines
        handles = {
            label: handle
            for axes in above
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(
            handles.values(),
            handles.keys(),
            fontsize=8.5,
            loc="outside upper center",
            ncols=-(-len(handles) // 2),
            handlelength=3.0,
        )
        _draw_experts(below[0], studies[0], budget)
        _draw_outputs(below[1], studies[:2], budgets)
        _draw_evaluations(below[2], evaluations, typical)


def _draw_experts(axes: Axes, study: Study, budget: float) -> None:
    """Bars expert by expert."""
    for place, (name, curves, colour) in enumerate(
        (
            ("trained", study.trained, COLOURS[0]),
            ("shuffled inputs", study.shuffled, COLOURS[5]),
            ("noise", study.noise, "#c5ccd3"),
        )
    ):
        point = best(curves, budget)
        if point is not None:
            errors = point.report.expert_errors
            axes.bar(
                np.arange(EXPERTS) + 0.27 * (place - 1), errors, 0.25, color=colour, label=name
            )
    tidy(axes)
    axes.set(xlabel="expert, by rising number of pieces", ylabel="relative error of the weights")
    axes.set_title(f"{study.layer.name}, best within {budget:.0%}")
    axes.set_xticks(range(EXPERTS))
    axes.set_ylim(0.0, 1.3)
    axes.legend(fontsize=8, ncols=3, loc="upper left")


def _draw_outputs(axes: Axes, studies: Sequence[Study], budgets: Sequence[float]) -> None:
    """Errors of outputs on held-out positions."""
    for study, colour in zip(studies, COLOURS, strict=False):
        for curves, style, name in (
            (study.trained, "-", "fitted to weights"),
            (study.weighted, "--", "fitted to outputs"),
        ):
            shares, errors = _line(curves, budgets, outputs=True)
            if errors:
                label = f"{study.layer.name}, {name}"
                axes.plot(shares, errors, style, marker="o", color=colour, label=label)
    _scale(axes, "relative error of the outputs")
    axes.set_title("outputs on held-out positions, best")
    axes.set_ylim(0.0, 1.0)


def _draw_evaluations(
    axes: Axes, found: Mapping[float, Sequence[Evaluation]], typical: float | None
) -> None:
    """How far evaluations are off."""
    series: dict[tuple[bool, bool], list[tuple[float, float]]] = {}
    for budget, evaluations in found.items():
        for each in evaluations:
            alone = len(each.layers) == 1
            series.setdefault((alone, each.weighted), []).append((budget, each.off))
    for (alone, weighted), points in sorted(series.items(), reverse=True):
        label = "first layer" if alone else "all layers that fit"
        axes.plot(
            *zip(*points, strict=True),
            "--" if weighted else "-",
            marker="o",
            color=COLOURS[0 if alone else 3],
            label=f"{label}, fitted to {'outputs' if weighted else 'weights'}",
        )
    if typical is not None:
        axes.axhline(typical, color=INK, linewidth=0.9, label="median evaluation itself")
    _scale(axes, "median error, pawns")
    axes.set_title("evaluations of held-out positions")
    axes.set_ylim(0.0, 1.6 * axes.get_ylim()[1])


def _scale(axes: Axes, label: str) -> None:
    tidy(axes)
    axes.set(xlabel="budget of parameters, share of the dense experts'", ylabel=label)
    if not axes.lines:
        axes.text(0.5, 0.5, "the engine does not run here", transform=axes.transAxes, ha="center")
        return
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_xlim(left=0.0)
    axes.legend(fontsize=7.5, loc="upper right", handlelength=4.0)


def _line(
    curves: Sequence[ErrorCurve], budgets: Sequence[float], *, outputs: bool = False
) -> tuple[list[float], list[float]]:
    """Budgets, and the smallest error within each."""
    errors = [_least(curves, budget, outputs) for budget in budgets]
    known = [(x, y) for x, y in zip(budgets, errors, strict=True) if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _cells(
    curves: Sequence[ErrorCurve], budgets: Sequence[float], *, outputs: bool = False
) -> list[str]:
    """The smallest error within each budget."""
    errors = (_least(curves, budget, outputs) for budget in budgets)
    return ["–" if error is None else f"{error:.3f}" for error in errors]


def _least(curves: Sequence[ErrorCurve], budget: float, outputs: bool) -> float | None:
    point = best(curves, budget, outputs=outputs)
    if point is None:
        return None
    return point.report.output_error if outputs else point.report.error


def _svd(study: Study, budgets: Sequence[float]) -> list[str]:
    """Truncated SVDs of the size of the best point within each budget."""
    points = [best(study.trained, budget) for budget in budgets]
    return ["–" if point is None else f"{point.report.svd_error:.3f}" for point in points]


def _joint(study: Study, budgets: Sequence[float]) -> list[str]:
    """The best truncated SVD of all experts together, of the same size."""
    points = [best(study.trained, budget) for budget in budgets]
    found = [None if point is None else point.report.joint for point in points]
    return ["–" if control is None else f"{control.error:.3f}" for control in found]

"""From coefficients, labels and a model that runs to an exploration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

from tensormoe._validation import brief, positive_int
from tensormoe.analysis._explorer._examples import LONGEST_CELL, Examples, Table, cut
from tensormoe.analysis._explorer._runs import Model, Run, Runs
from tensormoe.analysis._explorer._shown import Shown
from tensormoe.analysis._explorer._top import top_inputs, with_marks
from tensormoe.analysis._explorer._value import (
    Exploration,
    ExploredLevel,
    NearestExperts,
    RecordedInput,
    wanted_inputs,
)
from tensormoe.analysis._histograms import class_histogram
from tensormoe.analysis._inputs import checked_labels, dense_rows, host
from tensormoe.analysis._use import expert_load
from tensormoe.backend import Array, Backend, check_array
from tensormoe.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# entries of a grid of two levels
_GRID = 2**20


def explore_coefficients(
    coefficients: Any,
    labels: Any = None,
    *,
    experts: int | Sequence[int] | None = None,
    examples: Examples | None = None,
    class_names: Sequence[str] | None = None,
    classes: int | None = None,
    inputs: Any = None,
    run: Run | None = None,
    top: int = 8,
    threshold: float = 0.0,
    title: str = "Experts",
    path: str | PathLike[str] | None = None,
) -> Exploration:
    """Explore every expert, from coefficients or routing records of any model.

    Args:
        coefficients: one entry per level, or that of the only level: an array (..., N_e), a
            ``TopK``, or a routing record.
        labels: (...,) one class per input, or None.
        experts: N per level, which a ``TopK`` does not tell.
        examples: the inputs as people see them: :class:`Images`, :class:`Texts`, :class:`Tokens`
            or :class:`Table`.
        class_names: one per class; numbers by default.
        classes: C, where there are no names; batches that are added up need one number.
        inputs: (rows, ...), what ``run`` takes.
        run: the model with given coefficients, to logits (rows, C): for effects of experts. It runs
            once for every input and expert that the input uses.
        top: inputs that are shown per expert.
        threshold: an input uses an expert whose coefficient is larger.
        title: of the page.
        path: where the page (``.html``) or data file (``.json``) is written, if anywhere.

    Raises:
        ShapeError: labels, examples or inputs that are not one per row of the coefficients.
        SpecError: coefficients that are negative or not finite, or options that cannot be.

    >>> import numpy as np
    >>> found = explore_coefficients(np.eye(3)[[0, 0, 1, 2]], [0, 0, 1, 0], classes=2)
    >>> found
    Exploration(3 experts, 4 inputs, 2 classes, 4 recorded inputs)
    >>> found.levels[0].top.numbers[0, :3].tolist()
    [0, 1, -1]
    """
    if (run is None) != (inputs is None):
        raise SpecError("run and inputs must be given together, or neither. Pass both.")
    if run is not None and not callable(run):
        raise SpecError(f"run must be a function of inputs and coefficients; got {brief(run)}.")
    model = None if run is None else Model(inputs, run)
    shown = Shown(examples, class_names, classes, top, title)
    levels = listed(coefficients)
    if not levels:
        raise ShapeError("coefficients must be those of at least one level; got none.")
    counts: list[Any] = [experts] * len(levels)
    if isinstance(experts, list | tuple):
        counts = list(experts)
    counts = [None if each is None else positive_int(each, "experts") for each in counts]
    if len(counts) != len(levels):
        raise ShapeError(f"experts must be one per level, {len(levels)}; got {brief(experts)}.")
    return collect(levels, counts, labels, shown, threshold, model, path)


def listed(coefficients: Any) -> list[Any]:
    """One entry per level."""
    return list(coefficients) if isinstance(coefficients, list | tuple) else [coefficients]


def collect(
    coefficients: Sequence[Any],
    experts: Sequence[int | None],
    labels: Any,
    shown: Shown,
    threshold: float,
    model: Model | None,
    path: str | PathLike[str] | None,
    nearest: Sequence[NearestExperts | None] | None = None,
) -> Exploration:
    """The exploration of one batch, written if that is asked for."""
    if path is not None:
        from tensormoe.analysis._explorer._file import checked_path

        checked_path(path)  # before the work
    pairs = [dense_rows(each, count) for each, count in zip(coefficients, experts, strict=True)]
    given, backend = [each for each, _ in pairs], pairs[0][1]
    for each in given:
        check_array(each, backend, "coefficients")
        if not backend.namespace.isdtype(each.dtype, "real floating"):
            raise ShapeError(
                f"coefficients must be real floating point; got {each.dtype}. Cast them."
            )
    if model is not None:
        check_array(model.inputs, backend, "inputs")
    values = [_checked(each, backend, level) for level, each in enumerate(given)]
    rows = len(values[0])
    _check_rows(rows, values, shown.examples, model)
    known = None if labels is None else _labels_only(labels, rows)
    runs = None if model is None else Runs(model, given, values, backend)
    logits = None if runs is None else runs.logits()
    size = shown.size(None if logits is None else logits.shape[1])
    if known is not None:
        known, size = checked_labels(known, rows, size)
    levels = tuple(
        ExploredLevel(
            expert_load(given[level], threshold=threshold),
            None if known is None else class_histogram(given[level], known, classes=size),
            None,
            with_marks(top_inputs(each, shown.top), each, shown.examples),
            None if nearest is None else nearest[level],
        )
        for level, each in enumerate(values)
    )
    if runs is not None and logits is not None and size is not None:
        explored = [
            runs.explored(each, level, known, size, logits.shape[1], shown)
            for level, each in enumerate(levels)
        ]
        levels = tuple(explored)
    grids = tuple(
        one.T.astype("float64") @ two / max(rows, 1)
        for one, two in pairwise(values)
        if one.shape[1] * two.shape[1] <= _GRID
    )
    made = Exploration(
        rows,
        levels,
        grids if len(grids) == len(levels) - 1 else (),
        _recorded(levels, shown.examples, known, logits, runs),
        shown.names(size),
        tuple(cut(each, LONGEST_CELL) for each in shown.examples.columns)
        if isinstance(shown.examples, Table)
        else (),
        () if model is None else model.scales,
        model is not None and model.linear,
        cut(shown.title, LONGEST_CELL),
    )
    if path is not None:
        made.save(path)
    return made


def _checked(coefficients: Array, backend: Backend, level: int) -> NDArray[Any]:
    """Coefficients (rows, N) on the host."""
    import numpy as np

    values = host(coefficients, backend)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        row, expert = np.argwhere(wrong)[0]
        raise SpecError(
            f"coefficients must be finite and at least 0; got {values[row, expert]:g} for expert "
            f"{expert} of level {level} at input {row}. Pass what the gate made, not logits."
        )
    return values


def _check_rows(
    rows: int, values: Sequence[NDArray[Any]], examples: Examples | None, model: Model | None
) -> None:
    counts = [len(each) for each in values]
    if set(counts) != {rows}:
        raise ShapeError(f"coefficients must have as many rows in every level; got {counts}.")
    if examples is not None and examples.count != rows:
        raise ShapeError(
            f"examples must be one per input; got {examples.count} for {rows} inputs. Pass them in "
            "the order of the inputs."
        )
    if model is not None and tuple(model.inputs.shape[:1]) != (rows,):
        raise ShapeError(
            f"inputs must be one per row of the coefficients, {rows}; got shape "
            f"{tuple(model.inputs.shape)}."
        )


def _labels_only(labels: Any, rows: int) -> NDArray[Any]:
    """Labels on the host, checked as such, whatever the number of classes."""
    return checked_labels(labels, rows, None if rows else 1)[0]


def _recorded(
    levels: tuple[ExploredLevel, ...],
    examples: Examples | None,
    labels: NDArray[Any] | None,
    logits: NDArray[Any] | None,
    runs: Runs | None,
) -> dict[int, RecordedInput]:
    numbers = sorted(wanted_inputs(levels))
    parts = {} if runs is None else runs.contributions(numbers)
    return {
        number: RecordedInput(
            {} if examples is None else examples.content(number),
            None if labels is None else int(labels[number]),
            None if logits is None else tuple(logits[number].tolist()),
            parts.get(number, ()),
        )
        for number in numbers
    }

"""From coefficients, labels and a model that runs to an exploration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from tensormoe._validation import brief, instance, positive_int
from tensormoe.analysis._explorer._examples import (
    LONGEST_CELL,
    Examples,
    Images,
    Table,
    Texts,
    Tokens,
    cut,
)
from tensormoe.analysis._explorer._top import TopInputs, marks_of, top_inputs
from tensormoe.analysis._explorer._value import (
    Exploration,
    ExploredLevel,
    NearestExperts,
    RecordedInput,
    wanted_inputs,
)
from tensormoe.analysis._histograms import class_histogram
from tensormoe.analysis._inputs import checked_labels, dense_rows, host
from tensormoe.analysis._interventions import Interventions, counted, predictions_by_runs
from tensormoe.analysis._use import expert_load, like_labels
from tensormoe.backend import Array, Backend, check_array
from tensormoe.decomposition._solve import from_host
from tensormoe.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run: TypeAlias = Callable[[Any, Sequence[Any]], Any]
"""A model with given coefficients: from inputs and one array per level to logits (rows, C)."""

SCALES = (0.0, 0.5, 2.0)
# rows of one run of the model
_BATCH = 1024
# entries of a grid of two levels
_GRID = 2**20


@dataclass(frozen=True, eq=False)
class Shown:
    """What an exploration shows besides numbers.

    Args:
        examples: the inputs as people see them, or None.
        class_names: one per class, or None.
        classes: their number, or None.
        top: inputs per expert.
        title: of the page.
    """

    examples: Examples | None
    class_names: Sequence[str] | None
    classes: int | None
    top: int
    title: str

    def __post_init__(self) -> None:
        # a frozen value holds plain integers
        object.__setattr__(self, "top", positive_int(self.top, "top"))
        if self.classes is not None:
            object.__setattr__(self, "classes", positive_int(self.classes, "classes"))
        instance(self.title, str, "title", "a string", SpecError)
        if self.examples is not None:
            kinds = (Images, Texts, Tokens, Table)
            what = "Images, Texts, Tokens or Table"
            instance(self.examples, kinds, "examples", what, SpecError)
        if self.class_names is None:
            return
        names = self.class_names
        listed_names = isinstance(names, list | tuple)
        if not listed_names or not all(isinstance(name, str) for name in names):
            raise SpecError(f"class_names must be strings, one per class; got {brief(names)}.")
        if self.classes not in (None, len(names)):
            raise SpecError(
                f"class_names must be one per class; got {len(names)} for {self.classes} classes."
            )

    def size(self, logits: int | None) -> int | None:
        """The number of classes, if it is known without labels."""
        known = self.classes if self.class_names is None else len(self.class_names)
        if logits is not None and known not in (None, logits):
            raise ShapeError(
                f"classes must be those of the {logits} logits; got {known}. Name all of them."
            )
        return logits if known is None else known

    def names(self, size: int | None) -> tuple[str, ...]:
        """One name per class, numbers by default."""
        if size is None:
            return ()
        names = self.class_names or [str(number) for number in range(size)]
        return tuple(cut(name, LONGEST_CELL) for name in names)


@dataclass(frozen=True, eq=False)
class Model:
    """The model around the experts.

    Args:
        inputs: (rows, ...), what ``run`` takes.
        run: to logits.
        linear: whether logits are linear in every expert.
        blocks: predictions (rows,) with all experts, and (N, rows) without each of a level, for
            blocks of rows; by runs of the model if None.
    """

    inputs: Any
    run: Run
    linear: bool = False
    blocks: Callable[[int], Iterator[tuple[Any, Any]]] | None = None


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
    """What every expert does, from coefficients or routing records of any model.

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
    logits = None if model is None else _logits(model, given, values, backend)
    size = shown.size(None if logits is None else logits.shape[1])
    if known is not None:
        known, size = checked_labels(known, rows, size)
    levels = tuple(
        ExploredLevel(
            expert_load(given[level], threshold=threshold),
            None if known is None else class_histogram(given[level], known, classes=size),
            None,
            _with_marks(top_inputs(each, shown.top), each, shown.examples),
            None if nearest is None else nearest[level],
        )
        for level, each in enumerate(values)
    )
    if model is not None and logits is not None and size is not None:
        runs = _Runs(model, given, values, backend, logits.shape[1])
        levels = tuple(
            runs.explored(each, level, known, size, shown) for level, each in enumerate(levels)
        )
    grids = tuple(
        one.T.astype("float64") @ two / max(rows, 1)
        for one, two in pairwise(values)
        if one.shape[1] * two.shape[1] <= _GRID
    )
    made = Exploration(
        rows,
        levels,
        grids if len(grids) == len(levels) - 1 else (),
        _recorded(levels, shown.examples, known, logits),
        shown.names(size),
        tuple(cut(each, LONGEST_CELL) for each in shown.examples.columns)
        if isinstance(shown.examples, Table)
        else (),
        () if model is None else ((0.0,) if model.linear else SCALES),
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


def _logits(
    model: Model, given: Sequence[Array], values: Sequence[NDArray[Any]], backend: Backend
) -> NDArray[Any]:
    import numpy as np

    found = []
    # once for no rows, so that batches of any size add up
    for start in range(0, max(len(values[0]), 1), _BATCH):
        part = slice(start, start + _BATCH)
        made = model.run(model.inputs[part], [each[part] for each in given])
        rows = len(values[0][part])
        if len(getattr(made, "shape", ())) != 2 or made.shape[0] != rows:
            raise ShapeError(
                f"logits must have shape ({rows}, classes) for {rows} inputs; got "
                f"{tuple(getattr(made, 'shape', ()))}. Pass another head or run."
            )
        found.append(host(made, backend).astype(np.float32))
    return np.concatenate(found)


def _with_marks(found: TopInputs, values: NDArray[Any], examples: Examples | None) -> TopInputs:
    if not isinstance(examples, Tokens):
        return found
    import numpy as np

    lengths = [len(each) for each in examples.texts]
    texts = np.repeat(np.arange(len(lengths)), lengths)
    return replace(found, marks=marks_of(values, texts, found, examples.window))


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of the model with one expert scaled."""

    model: Model
    given: Sequence[Array]
    values: Sequence[NDArray[Any]]
    backend: Backend
    classes: int

    def explored(
        self,
        found: ExploredLevel,
        level: int,
        labels: NDArray[Any] | None,
        size: int,
        shown: Shown,
    ) -> ExploredLevel:
        """A level with the effects of its experts."""
        import numpy as np

        values = self.values[level]
        total: Interventions | None = None
        # coefficients where the prediction is another one without the expert
        moved, start = np.zeros_like(values), 0
        for kept, changed in self._blocks(level):
            part = slice(start, start + kept.size)
            moved[part] = np.where(kept[:, None] != changed.T, values[part], 0.0)
            if labels is not None:
                here = counted(kept, changed, labels[part], size)
                total = here if total is None else total + here
            start += kept.size
        affected = _with_marks(top_inputs(moved, shown.top), values, shown.examples)
        return replace(
            found,
            interventions=total,
            top=self.with_changed(found.top, level),
            affected=self.with_changed(affected, level),
        )

    def _blocks(self, level: int) -> Iterator[tuple[Any, Any]]:
        if self.model.blocks is not None:
            return self.model.blocks(level)
        run, inputs = self.model.run, self.model.inputs
        found = predictions_by_runs(run, inputs, self.given, level, self.backend, _BATCH)
        return iter([found[:2]])

    def with_changed(self, top: TopInputs, level: int) -> TopInputs:
        """Top inputs with their logits at every scale."""
        import numpy as np

        scales = (0.0,) if self.model.linear else SCALES
        made = np.full((*top.numbers.shape, len(scales), self.classes), np.nan, np.float32)
        experts, places = np.nonzero(top.numbers >= 0)
        rows = top.numbers[experts, places]
        for start in range(0, rows.size, _BATCH):
            part = slice(start, start + _BATCH)
            for index, scale in enumerate(scales):
                found = self._scaled(rows[part], experts[part], level, scale)
                made[experts[part], places[part], index] = found
        return replace(top, changed=made)

    def _scaled(
        self, rows: NDArray[Any], experts: NDArray[Any], level: int, scale: float
    ) -> NDArray[Any]:
        mixed = [each[rows] for each in self.values]
        mixed[level][range(rows.size), experts] *= scale
        index = like_labels(rows, self.given[0], self.backend)
        arrays = [
            from_host(each, like, self.backend)
            for each, like in zip(mixed, self.given, strict=True)
        ]
        inputs = self.backend.take(self.model.inputs, index, 0)
        return host(self.model.run(inputs, arrays), self.backend).astype("float32")


def _recorded(
    levels: tuple[ExploredLevel, ...],
    examples: Examples | None,
    labels: NDArray[Any] | None,
    logits: NDArray[Any] | None,
) -> dict[int, RecordedInput]:
    return {
        number: RecordedInput(
            {} if examples is None else examples.content(number),
            None if labels is None else int(labels[number]),
            None if logits is None else tuple(logits[number].tolist()),
        )
        for number in sorted(wanted_inputs(levels))
    }

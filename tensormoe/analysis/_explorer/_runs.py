"""Runs of a model: its logits, and what they become where an expert is scaled or silenced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tensormoe.analysis._explorer._shown import Shown
from tensormoe.analysis._explorer._top import TopInputs, top_inputs, with_marks
from tensormoe.analysis._explorer._value import Contributions, ExploredLevel
from tensormoe.analysis._inputs import host
from tensormoe.analysis._interventions import Interventions, counted, predictions_by_runs
from tensormoe.analysis._use import like_labels
from tensormoe.backend import Array, Backend
from tensormoe.decomposition._solve import from_host
from tensormoe.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run: TypeAlias = Callable[[Any, Sequence[Any]], Any]
"""A model with given coefficients: from inputs and one array per level to logits (rows, C)."""

_SCALES = (0.0, 0.5, 2.0)
# rows of one run of the model
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Model:
    """The model around the experts.

    Args:
        inputs: (rows, ...), what ``run`` takes.
        run: to logits.
        linear: whether logits are linear in every expert.
        blocks: predictions (rows,) with all experts, and (N, rows) without each of a level, for
            blocks of rows; by runs of the model if None.
        terms: the parts (N, rows, C) of logits that come from each expert of a level, with the
            numbers of their rows, for blocks of given rows; None for models that are not linear.
    """

    inputs: Any
    run: Run
    linear: bool = False
    blocks: Callable[[int], Iterator[tuple[Any, Any]]] | None = None
    terms: Callable[[int, NDArray[Any]], Iterator[tuple[Any, Any]]] | None = None

    @property
    def scales(self) -> tuple[float, ...]:
        """Scales of an expert that logits are computed for."""
        return (0.0,) if self.linear else _SCALES


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of the model with all experts, and with one of them scaled.

    Args:
        model: to run.
        given: coefficients (rows, N_e) per level, arrays of a library.
        values: the same on the host.
        backend: of the library.
    """

    model: Model
    given: Sequence[Array]
    values: Sequence[NDArray[Any]]
    backend: Backend

    def logits(self) -> NDArray[Any]:
        """Logits (rows, C) with all experts."""
        import numpy as np

        found = []
        # once for no rows, so that batches of any size add up
        for start in range(0, max(len(self.values[0]), 1), _BATCH):
            part = slice(start, start + _BATCH)
            made = self.model.run(self.model.inputs[part], [each[part] for each in self.given])
            rows = len(self.values[0][part])
            if len(getattr(made, "shape", ())) != 2 or made.shape[0] != rows:
                raise ShapeError(
                    f"logits must have shape ({rows}, classes) for {rows} inputs; got "
                    f"{tuple(getattr(made, 'shape', ()))}. Pass another head or run."
                )
            found.append(host(made, self.backend).astype(np.float32))
        return np.concatenate(found)

    def explored(
        self,
        found: ExploredLevel,
        level: int,
        labels: NDArray[Any] | None,
        size: int,
        logits: int,
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
        affected = with_marks(top_inputs(moved, shown.top), values, shown.examples)
        return replace(
            found,
            interventions=total,
            top=self.with_changed(found.top, level, logits),
            affected=self.with_changed(affected, level, logits),
        )

    def contributions(self, numbers: Sequence[int]) -> dict[int, tuple[Contributions, ...]]:
        """Parts of the logits of some inputs by expert, one entry per level."""
        import numpy as np

        if self.model.terms is None:
            return {}
        found: dict[int, list[Contributions]] = {each: [] for each in numbers}
        for level, values in enumerate(self.values):
            for rows, terms in self.model.terms(level, np.array(numbers, np.int64)):
                for place, number in enumerate(rows.tolist()):
                    used = np.flatnonzero(values[number])
                    part = Contributions(used.astype("int32"), terms[used, place])
                    found[number].append(part)
        return {number: tuple(each) for number, each in found.items()}

    def _blocks(self, level: int) -> Iterator[tuple[Any, Any]]:
        if self.model.blocks is not None:
            return self.model.blocks(level)
        run, inputs = self.model.run, self.model.inputs
        found = predictions_by_runs(run, inputs, self.given, level, self.backend, _BATCH)
        return iter([found[:2]])

    def with_changed(self, top: TopInputs, level: int, logits: int) -> TopInputs:
        """Top inputs with their logits at every scale."""
        import numpy as np

        scales = self.model.scales
        made = np.full((*top.numbers.shape, len(scales), logits), np.nan, np.float32)
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

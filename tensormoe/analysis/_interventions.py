"""Counterfactual interventions on all experts at once: changes of predictions without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe._config import LayerConfig
from tensormoe._validation import instance, positive_int
from tensormoe.analysis._inputs import checked_labels, dense_rows, host_numbers
from tensormoe.analysis._use import like_labels
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.checkpoint import check_config
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import apply_experts, level_outputs, route

if TYPE_CHECKING:
    from numpy.typing import NDArray

# bytes of what all experts of a level compute for the rows of one step
_BLOCK = 2**26

Head = Callable[[Array], Array]
"""The rest of the model behind a layer: from (rows, out) to logits (rows, C), row by row."""


@dataclass(frozen=True, eq=False)
class Interventions:
    """Predictions that change when a single expert is silenced; those of batches add up.

    Args:
        lost: (N, C) inputs by class that were right and are wrong without the expert.
        gained: (N, C) inputs that were wrong and are right without it.
        correct: (C,) inputs that are right with all experts.
        inputs: (C,) inputs by class.
    """

    lost: NDArray[Any]
    gained: NDArray[Any]
    correct: NDArray[Any]
    inputs: NDArray[Any]

    @property
    def effect(self) -> NDArray[Any]:
        """(N, C) share of each class's right predictions that an expert's absence costs."""
        import numpy as np

        # nothing is lost of a class that has nothing to lose
        made: NDArray[Any] = self.lost / np.maximum(self.correct, 1)
        return made

    @property
    def accuracy(self) -> NDArray[Any]:
        """(N, C) accuracy by class without the expert; NaN for classes without inputs."""
        import numpy as np

        right = self.correct + self.gained - self.lost
        found = np.full(right.shape, np.nan)
        made: NDArray[Any] = np.divide(right, self.inputs, out=found, where=self.inputs > 0)
        return made

    def __add__(self, other: Interventions) -> Interventions:
        if not isinstance(other, Interventions):
            return NotImplemented
        if self.lost.shape != other.lost.shape:
            raise ShapeError(
                "interventions must be those of the same experts and classes to be added; got "
                f"{self.lost.shape} and {other.lost.shape}. Pass classes=C for every batch."
            )
        return replace(
            self,
            lost=self.lost + other.lost,
            gained=self.gained + other.gained,
            correct=self.correct + other.correct,
            inputs=self.inputs + other.inputs,
        )


def interventions(
    config: LayerConfig,
    arrays: Mapping[str, Array],
    x: Array,
    labels: Any,
    coefficients: Sequence[Any] | None = None,
    *,
    classes: int | None = None,
    level: int = 0,
    head: Head | None = None,
    buffers: Mapping[str, Array] | None = None,
) -> Interventions:
    """Silence every expert of a level by itself, and count the predictions that change.

    An expert's slice 𝒲[n] set to zero changes the output by the expert's own term, its coefficient
    times its output. One contraction makes the terms of all experts, so that no expert
    takes a pass of its own (Oldfield et al. 2024, section 4.1, has the intervention).

    Args:
        config: of a layer.
        arrays: its arrays by canonical name, of any library.
        x: (..., in), the layer's inputs.
        labels: (...,) the classes of the inputs.
        coefficients: one entry per level; the layer's gate makes them otherwise.
        classes: C; with a head or by default, what the logits have.
        level: whose experts are silenced. One of them has a part in all combinations with experts
            of other levels.
        head: the rest of the model, from the layer's output to logits, row by row; none where the
            layer's outputs are logits.
        buffers: of the gate, by canonical name; those among ``arrays`` otherwise.

    Raises:
        ShapeError: inputs, labels or coefficients that do not fit the layer.
        SpecError: not the configuration of a layer, or one whose input is indexed.

    >>> from tensormoe_numpy import MuMoE
    >>> import numpy as np
    >>> layer = MuMoE(8, 4, experts=3, rank=4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((50, 8)).astype("float32")
    >>> found = interventions(layer.config, layer.parameters, x, layer(x).argmax(1))
    >>> found.lost.shape, int(found.correct.sum()), int(found.gained.sum())
    ((3, 4), 50, 0)
    """
    check_config(config)
    instance(config, LayerConfig, "config", "the configuration of a layer", SpecError)
    if config.indexed_input:
        raise SpecError("config must be of a layer of vectors; got an embedding. Pass its outputs.")
    backend, spec = backend_of(x), config.spec
    if not 0 <= level < spec.levels:
        raise ShapeError(f"level must lie in [0, {spec.levels}); got {level!r}.")
    rows = backend.reshape(x, (-1, spec.in_features))
    count = rows.shape[0]
    if coefficients is None:
        made = route(config, arrays, rows, backend, buffers=buffers or arrays)
        coefficients = made.coefficients
    given = [
        dense_rows(each, size)[0] for each, size in zip(coefficients, spec.experts, strict=True)
    ]
    if any(each.shape[0] != count for each in given):
        raise ShapeError(
            f"coefficients must be those of the {count} inputs; got "
            f"{[each.shape[0] for each in given]}."
        )
    step = rows_per_step(config, level)
    total: Interventions | None = None
    numbers, size = checked_labels(labels, count, classes or (None if head else spec.out_features))
    for start in range(0, max(count, 1), step):
        part = slice(start, start + step)
        found = predictions_of_block(
            config, arrays, rows[part], [each[part] for each in given], level, head, backend
        )
        made_here = counted(*found, numbers[part], size)
        total = made_here if total is None else total + made_here
    assert total is not None
    return total


def rows_per_step(config: LayerConfig, level: int) -> int:
    """Rows whose outputs of all experts of a level are made at once."""
    row = 8 * config.spec.experts[level] * config.spec.out_features
    return max(_BLOCK // row, 1)


def predictions_of_block(
    config: LayerConfig,
    arrays: Mapping[str, Array],
    rows: Array,
    coefficients: Sequence[Array],
    level: int,
    head: Head | None,
    backend: Backend,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions (rows,) with all experts of a layer, and (N, rows) without each of a level."""
    xp = backend.namespace
    whole = apply_experts(config, arrays, rows, coefficients, backend)
    terms = level_outputs(config, arrays, rows, coefficients, level, backend)
    mixed = backend.permute(coefficients[level], (1, 0))
    without = whole[None, :, :] - terms * xp.astype(mixed, whole.dtype)[:, :, None]
    if head is None:
        predicted = xp.argmax(whole, axis=-1), xp.argmax(without, axis=-1)
    else:
        experts, count, features = without.shape
        flat = head(backend.reshape(without, (experts * count, features)))
        found = xp.argmax(flat, axis=-1)
        predicted = xp.argmax(head(whole), axis=-1), backend.reshape(found, (experts, count))
    kept, changed = (host_numbers(each, backend) for each in predicted)
    # an expert of coefficient zero changes nothing, not even by rounding
    used = host_numbers(xp.astype(mixed != 0, predicted[0].dtype), backend).astype(bool)
    import numpy as np

    return kept, np.where(used, changed, kept[None, :])


def counted(
    kept: NDArray[Any], changed: NDArray[Any], labels: NDArray[Any], classes: int
) -> Interventions:
    """Counts by class of predictions (rows,) with all experts, and (N, rows) without each."""
    import numpy as np

    right, still = kept == labels, changed == labels[None, :]
    one_hot = (labels[:, None] == np.arange(classes)[None, :]).astype(np.float64)

    def by_class(where: NDArray[Any]) -> NDArray[Any]:
        made: NDArray[Any] = (where.astype(np.float64) @ one_hot).astype(np.int64)
        return made

    return Interventions(
        by_class(right & ~still), by_class(~right & still), by_class(right), by_class(right | True)
    )


def interventions_by_runs(
    run: Callable[[Array, Sequence[Array]], Array],
    inputs: Array,
    labels: Any,
    coefficients: Sequence[Any],
    *,
    classes: int | None = None,
    level: int = 0,
    batch: int = 1024,
) -> Interventions:
    """:func:`interventions` for any model that runs with given coefficients.

    A silent expert is one of coefficient zero. The model runs once for every input and expert that
    the input uses: for blocks, whose output is not linear in an expert, and for layers deep inside.

    Args:
        run: from inputs (rows, ...) and coefficients, one array (rows, N_e) per level, to logits
            (rows, C).
        inputs: (inputs, ...).
        labels: (inputs,) their classes.
        coefficients: with all experts: one entry per level, (inputs, N_e).
        classes: C; by default, what the logits have.
        level: whose experts are silenced.
        batch: rows per run.

    Raises:
        ShapeError: labels or coefficients that do not fit the inputs.
    """
    batch = positive_int(batch, "batch")
    pairs = [dense_rows(each) for each in coefficients]
    given, backend = [each for each, _ in pairs], pairs[0][1]
    count = int(inputs.shape[0])
    if not 0 <= level < len(given) or any(each.shape[0] != count for each in given):
        raise ShapeError(
            f"coefficients must be those of the {count} inputs, with level {level} among them; got "
            f"{[tuple(each.shape) for each in given]}."
        )

    kept, changed, logits = predictions_by_runs(run, inputs, given, level, backend, batch)
    numbers, size = checked_labels(labels, count, classes or logits)
    return counted(kept, changed, numbers, size)


def predictions_by_runs(
    run: Callable[[Array, Sequence[Array]], Array],
    inputs: Array,
    given: Sequence[Array],
    level: int,
    backend: Backend,
    batch: int,
) -> tuple[NDArray[Any], NDArray[Any], int | None]:
    """Predictions (rows,) with all experts, (N, rows) without each, and the number of logits."""
    import numpy as np

    xp, count = backend.namespace, int(inputs.shape[0])

    def predicted(rows: Array, mixed: Sequence[Array]) -> tuple[NDArray[Any], int]:
        logits = run(rows, mixed)
        return host_numbers(xp.argmax(logits, axis=-1), backend), int(logits.shape[-1])

    used = host_numbers(xp.astype(given[level] != 0, xp.int32), backend).astype(bool)
    parts = [
        predicted(inputs[start : start + batch], [each[start : start + batch] for each in given])
        for start in range(0, count, batch)
    ]
    kept = np.concatenate([each for each, _ in parts]) if parts else np.zeros(0, np.int64)
    changed = np.repeat(kept[None, :], used.shape[1], axis=0)
    places, experts = used.nonzero()
    for start in range(0, places.size, batch):
        rows, silent = places[start : start + batch], experts[start : start + batch]
        index = like_labels(rows, given[level], backend)
        mixed = [backend.take(each, index, 0) for each in given]
        column = like_labels(np.arange(used.shape[1]), given[level], backend)
        loud = column[None, :] != like_labels(silent, given[level], backend)[:, None]
        mixed[level] = mixed[level] * xp.astype(loud, mixed[level].dtype)
        changed[silent, rows] = predicted(backend.take(inputs, index, 0), mixed)[0]
    return kept, changed, parts[0][1] if parts else None

"""Causal importance of experts: what they give to an output is replaced, and a metric changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensormoe._config import LayerConfig
from tensormoe._validation import instance
from tensormoe.analysis._inputs import dense_rows, host
from tensormoe.analysis._interventions import Head, rows_per_step
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.checkpoint import check_config
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import level_outputs, route

if TYPE_CHECKING:
    from numpy.typing import NDArray

Metric = Callable[[Array, slice], Array]
"""From logits (..., rows, C), and which of the inputs these rows are, to a number (..., rows)."""


def patching(
    config: LayerConfig,
    arrays: Mapping[str, Array],
    x: Array,
    metric: Metric,
    coefficients: Sequence[Any] | None = None,
    *,
    contrast: Array | None = None,
    level: int = 0,
    head: Head | None = None,
    buffers: Mapping[str, Array] | None = None,
) -> NDArray[Any]:
    """Change of a metric for each input when one expert's contribution is replaced.

    The contribution of expert n to the layer's output is c_n(x) = a_n(x) (W_nᵀ x + b_n), its
    coefficient times its output. The output becomes y(x) - c_n(x) + c, where c is the mean of c_n
    over all inputs (mean ablation), or c_n(x') for a contrastive input x' (activation patching;
    Heimersheim & Nanda 2024, arXiv 2404.15255). Coefficients of others stay. For c = 0,
    :func:`interventions` counts the predictions that change.

    Args:
        config: of a layer.
        arrays: its arrays by canonical name, of any library.
        x: (inputs, in), the layer's inputs.
        metric: from logits (..., rows, C) and the slice of the inputs that these rows are, to one
            number per row: the logit of the right class less another, for instance.
        coefficients: one entry per level; the layer's gate makes them otherwise.
        contrast: (inputs, in), a contrastive input for each; means by default. The gate makes its
            coefficients.
        level: whose experts are patched. One of them has a part in all combinations with experts
            of other levels.
        head: the rest of the model, from the layer's output (rows, out) to logits, row by row; none
            where the layer's outputs are logits.
        buffers: of the gate, by canonical name; those among ``arrays`` otherwise.

    Returns:
        (N, inputs): the metric with expert n patched less that of the model as it is.

    Raises:
        ShapeError: inputs, coefficients or a metric that do not fit.
        SpecError: not the configuration of a layer, or one whose input is indexed.

    >>> import numpy as np
    >>> from tensormoe_numpy import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((50, 8)).astype("float32")
    >>> def difference(logits, rows):
    ...     return logits[..., 0] - logits[..., 1]
    >>> patching(layer.config, layer.parameters, x, difference).shape
    (3, 50)
    """
    check_config(config)
    instance(config, LayerConfig, "config", "the configuration of a layer", SpecError)
    if config.indexed_input:
        raise SpecError("config must be of a layer of vectors; got an embedding. Pass its outputs.")
    backend, spec = backend_of(x), config.spec
    if not 0 <= level < spec.levels:
        raise ShapeError(f"level must lie in [0, {spec.levels}); got {level!r}.")
    if x.ndim != 2 or (contrast is not None and tuple(contrast.shape) != tuple(x.shape)):
        raise ShapeError(
            "x and contrast must be one row per input, of the same shape; got "
            f"{tuple(x.shape)} and {None if contrast is None else tuple(contrast.shape)}."
        )
    count, own = int(x.shape[0]), buffers or arrays

    def routed(rows: Array, given: Sequence[Any] | None) -> list[Array]:
        made = given
        if made is None:
            made = route(config, arrays, rows, backend, buffers=own).coefficients
        found = [dense_rows(each, size)[0] for each, size in zip(made, spec.experts, strict=True)]
        if any(each.shape[0] != count for each in found):
            raise ShapeError(
                f"coefficients must be those of the {count} inputs; got "
                f"{[each.shape[0] for each in found]}."
            )
        return found

    mixed = routed(x, coefficients)
    other = None if contrast is None else routed(contrast, None)
    step = rows_per_step(config, level)
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def contributions(rows: Array, given: Sequence[Array], part: slice) -> Array:
        """(N, rows, out)."""
        here = [each[part] for each in given]
        made = level_outputs(config, arrays, rows[part], here, level, backend)
        share = backend.permute(here[level], (1, 0))
        return made * backend.namespace.astype(share, made.dtype)[:, :, None]

    total: Any = 0.0
    if contrast is None:
        for part in parts:
            total = total + backend.sum(contributions(x, mixed, part), (1,))
    changes = []
    for part in parts:
        terms = contributions(x, mixed, part)
        whole = backend.sum(terms, (0,))
        new = (
            (total / count)[:, None, :]
            if contrast is None or other is None
            else contributions(contrast, other, part)
        )
        patched = _scored(whole[None, :, :] - terms + new, metric, head, part, backend)
        changes.append(patched - _scored(whole[None, :, :], metric, head, part, backend))
    import numpy as np

    return np.concatenate([np.zeros((spec.experts[level], 0)), *changes], axis=1)


def _scored(
    outputs: Array, metric: Metric, head: Head | None, part: slice, backend: Backend
) -> NDArray[Any]:
    """The metric (N, rows) of outputs (N, rows, out), on the host."""
    experts, rows, features = outputs.shape
    logits = outputs
    if head is not None:
        logits = head(backend.reshape(outputs, (experts * rows, features)))
        logits = backend.reshape(logits, (experts, rows, logits.shape[-1]))
    made = metric(logits, part)
    if tuple(getattr(made, "shape", ())) != (experts, rows):
        raise ShapeError(
            f"metric must make one number per row of logits {tuple(logits.shape)}; got "
            f"{tuple(getattr(made, 'shape', ()))}. Leave the leading axes as they are."
        )
    return host(made, backend)

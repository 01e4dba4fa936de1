"""Explorations of layers and blocks of any framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._validation import brief, instance, non_negative_int
from tensormoe.analysis._explorer._collect import collect, listed
from tensormoe.analysis._explorer._examples import Examples
from tensormoe.analysis._explorer._runs import Model
from tensormoe.analysis._explorer._shown import Shown
from tensormoe.analysis._explorer._value import Exploration, NearestExperts
from tensormoe.analysis._inputs import dense_rows, host
from tensormoe.analysis._interventions import predictions_of_block, rows_per_step
from tensormoe.analysis._similarity import expert_similarity
from tensormoe.analysis._use import like_labels
from tensormoe.backend import Array, Backend, backend_of
from tensormoe.checkpoint import match_arrays
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import apply_experts, check_input, level_outputs, route

if TYPE_CHECKING:
    from numpy.typing import NDArray

Head: TypeAlias = Callable[[Any], Any] | Literal["identity"]
"""From a layer's outputs (rows, out) to logits (rows, C); ``"identity"`` where they are logits."""


def explore(
    layer: Any,
    x: Array,
    labels: Any = None,
    *,
    arrays: Mapping[str, Array] | None = None,
    coefficients: Any = None,
    head: Head | None = None,
    examples: Examples | None = None,
    class_names: Sequence[str] | None = None,
    classes: int | None = None,
    top: int = 8,
    nearest: int = 5,
    threshold: float = 0.0,
    title: str = "Experts",
    path: str | PathLike[str] | None = None,
) -> Exploration:
    """Explore every expert of a layer: use, classes, top inputs, effects, nearest experts.

    Explorations of batches add up. The page that ``path`` asks for opens from disk. For models that
    are no layer of ours, :func:`explore_coefficients` takes coefficients.

    Args:
        layer: a layer or block of any framework, outside training; or the configuration of a layer,
            with its ``arrays``.
        x: (..., in), its inputs.
        labels: (...,) one class per input, or None for a page without classes.
        arrays: of a configuration, by canonical name, of any library: parameters and buffers.
        coefficients: one entry per level; the layer's gate makes them otherwise.
        head: the rest of the model, row by row; ``"identity"`` where the layer's outputs are
            logits. Without it, no expert's effect on predictions is known.
        examples: the inputs as people see them: :class:`Images`, :class:`Texts`, :class:`Tokens`
            or :class:`Table`.
        class_names: one per class; numbers by default.
        classes: C, where there are no names; batches that are added up need one number.
        top: inputs that are shown per expert.
        nearest: experts that are shown beside each, by the cosine of their matrices; 0 for none.
        threshold: an input uses an expert whose coefficient is larger.
        title: of the page.
        path: where the page (``.html``) or data file (``.json``) is written, if anywhere.

    Raises:
        ShapeError: inputs, labels, examples or coefficients that do not fit one another.
        SpecError: not a layer or block, one without a gate where no coefficients are given, or
            options that cannot be.

    >>> from tensormoe_numpy import MuMoE
    >>> import numpy as np
    >>> layer = MuMoE(8, 4, experts=3, rank=4, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((50, 8)).astype("float32")
    >>> found = explore(layer, x, layer(x).argmax(1), head="identity", top=4)
    >>> found
    Exploration(3 experts, 50 inputs, 4 classes, 13 recorded inputs)
    >>> found.levels[0].interventions.correct.sum()
    np.int64(50)
    """
    shown = Shown(examples, class_names, classes, top, title)
    # what torch.compile returns has the module inside
    layer = getattr(layer, "_orig_mod", layer)
    config = _config_of(layer)
    if isinstance(layer, LayerConfig):
        if arrays is None:
            raise SpecError("arrays must be given with a configuration; got none. Pass its arrays.")
        instance(arrays, Mapping, "arrays", "a mapping from names to arrays", SpecError)
    elif arrays is not None:
        raise SpecError("arrays must be those of a configuration; got some beside a layer.")
    else:
        arrays = arrays_of(layer)
    # a module whose parameters are computed from others has other names
    match_arrays({**config.parameter_shapes(), **config.buffer_shapes()}, arrays)
    identity = isinstance(head, str) and head == "identity"
    if head is not None and not identity and not callable(head):
        raise SpecError(f"head must be a function or 'identity'; got {brief(head)}.")
    first = config.first if isinstance(config, BlockConfig) else config
    factor = arrays[next(iter(config.parameter_shapes()))]
    backend = backend_of(factor)
    lead = check_input(x, first.spec.in_features, factor.dtype, backend)
    rows = backend.reshape(x, (prod(lead), first.spec.in_features))
    if coefficients is None:
        if first.gate is None:
            raise SpecError(
                "coefficients must be given for a layer without a gate; got none. Pass "
                "coefficients=, one entry per level."
            )
        coefficients = route(first, arrays, rows, backend, buffers=arrays).coefficients
    given = listed(coefficients)
    if len(given) != first.spec.levels:
        raise ShapeError(
            f"coefficients must be one entry per level, {first.spec.levels}; got {len(given)}."
        )
    model = None
    if head is not None:
        model = _model(layer, config, arrays, rows, given, head, backend)
    near = _nearest(config, arrays, nearest)
    return collect(given, first.spec.experts, labels, shown, threshold, model, path, near)


def arrays_of(layer: Any) -> dict[str, Array]:
    """Parameters and buffers of a layer or block by canonical name, whatever its framework."""
    state = getattr(layer, "state_dict", None)
    if callable(state):
        return dict(state())
    buffers = layer.buffers() if callable(layer.buffers) else layer.buffers
    return {**layer.parameters, **buffers}


def _config_of(layer: Any) -> LayerConfig | BlockConfig:
    config = layer if isinstance(layer, LayerConfig) else getattr(layer, "config", None)
    if not isinstance(config, LayerConfig | BlockConfig):
        raise SpecError(
            f"layer must be a layer or block, or the configuration of a layer; got {brief(layer)}. "
            "Pass coefficients of other models to explore_coefficients."
        )
    if isinstance(config, LayerConfig) and config.indexed_input:
        raise SpecError(
            "layer must be one of vectors; got an embedding. Pass its coefficients to "
            "explore_coefficients."
        )
    return config


def _model(
    layer: Any,
    config: LayerConfig | BlockConfig,
    arrays: Mapping[str, Array],
    rows: Array,
    given: Sequence[Any],
    head: Head,
    backend: Backend,
) -> Model:
    def logits(outputs: Array) -> Array:
        return outputs if head == "identity" else head(outputs)

    if isinstance(config, BlockConfig):
        if getattr(layer, "training", False):
            raise SpecError("a block must be outside training; got one in it. Call layer.eval().")
        return Model(rows, lambda x, mixed: logits(layer(x, coefficients=list(mixed))))

    def run(x: Array, mixed: Sequence[Array]) -> Array:
        return logits(apply_experts(config, arrays, x, list(mixed), backend))

    dense = [
        dense_rows(each, size)[0] for each, size in zip(given, config.spec.experts, strict=True)
    ]

    def terms(level: int, numbers: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        step = rows_per_step(config, level)
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step]
            index = like_labels(part, dense[0], backend)
            mixed = [backend.take(each, index, 0) for each in dense]
            x = backend.take(rows, index, 0)
            made = host(level_outputs(config, arrays, x, mixed, level, backend), backend)
            yield part, (made * host(mixed[level], backend).T[:, :, None]).astype("float32")

    def blocks(level: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        rest = head if callable(head) else None
        step = rows_per_step(config, level)
        for start in range(0, max(int(rows.shape[0]), 1), step):
            part = slice(start, start + step)
            mixed = [each[part] for each in dense]
            yield predictions_of_block(config, arrays, rows[part], mixed, level, rest, backend)

    linear = head == "identity"
    return Model(rows, run, linear, blocks, terms if linear else None)


def _nearest(
    config: LayerConfig | BlockConfig, arrays: Mapping[str, Array], most: int
) -> list[NearestExperts | None] | None:
    import numpy as np

    most = non_negative_int(most, "nearest")
    if not most:
        return None
    first = config.first if isinstance(config, BlockConfig) else config
    found: list[NearestExperts | None] = []
    for level, count in enumerate(first.spec.experts):
        if count == 1:
            found.append(None)
            continue
        # an expert of zeros is like none
        cosines = np.nan_to_num(expert_similarity(config, arrays, level), nan=-1.0)
        np.fill_diagonal(cosines, -np.inf)
        numbers = np.argsort(-cosines, axis=1, kind="stable")[:, : min(most, count - 1)]
        found.append(NearestExperts(numbers, np.take_along_axis(cosines, numbers, axis=1)))
    return found

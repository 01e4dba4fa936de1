"""The layer as pure functions of arrays: what every framework's layers are thin wrappers of.

Parameters are mappings from canonical names (:meth:`LayerConfig.parameter_shapes`) to arrays of
any one library. Nothing here keeps state, and nothing plans: programs were made with the
configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

from tensormoe._config import BlockConfig as BlockConfig
from tensormoe._config import LayerConfig as LayerConfig
from tensormoe._config import resolve_config as resolve_config
from tensormoe.backend import Array, Backend
from tensormoe.errors import ShapeError
from tensormoe.execution import execute
from tensormoe.factorizations import Draw, draw_factor
from tensormoe.gates import Activation, Statistics, TopK, activate, activate_vjp
from tensormoe.planning import Program, Routing, plan_layer, plan_regimes, reverse, weight_program

__all__ = [
    "BlockConfig",
    "Coefficients",
    "LayerConfig",
    "Routed",
    "add_gradients",
    "apply_experts",
    "chunk_size",
    "check_coefficients",
    "check_ids",
    "check_input",
    "expert_weight",
    "experts_vjp",
    "gate_vjp",
    "initialize",
    "materialize",
    "prepare",
    "resolve_config",
    "route",
]

Coefficients = Sequence["Array | TopK"]
"""One entry a level: dense coefficients (batch, N_e), or indices and values (batch, k)."""


@dataclass(frozen=True, eq=False)
class Routed:
    """What a gate made of its input.

    Args:
        coefficients: one array (batch, N_e) a level.
        logits: what they came from, for the way back.
        statistics: batch norm's new running statistics, one a level; None for other gates.
    """

    coefficients: list[Array]
    logits: list[Array]
    statistics: list[Statistics] | None


def initialize(
    config: LayerConfig,
    backend: Backend,
    normal: Draw,
    uniform: Draw,
    zeros: Draw,
    init: str = "variance",
) -> dict[str, Array]:
    """Draw all parameters; projections of the gate start at zero, so that experts start alike.

    Args:
        config: the layer.
        backend: adapter of the library that draws.
        normal: draws standard normal arrays of a shape, in the layer's dtype.
        uniform: draws arrays uniform on [-1, 1) of a shape, in the layer's dtype.
        zeros: makes arrays of zeros of a shape, in the layer's dtype.
        init: ``"variance"`` or ``"paper"``, see :meth:`LayerSpec.initializers`.

    Raises:
        SpecError: an unknown scheme.
    """
    starts = config.spec.initializers(init)
    parameters = {}
    for name, shape in config.parameter_shapes().items():
        kind, _, factor = name.partition(".")
        if kind == "factors":
            array = draw_factor(starts[factor], shape, backend, normal, uniform)
            if config.indexed_input and factor == config.spec.network.input_factor.name:
                # rows of a table are used alone: they start with variance 1, as nn.Embedding's
                array = array * sqrt(3.0 * config.spec.in_features)
            parameters[name] = array
        else:
            parameters[name] = zeros(shape)
    return parameters


def check_input(x: Array, features: int, dtype: object, name: str = "x") -> tuple[int, ...]:
    """The leading shape of a floating-point input.

    Raises:
        ShapeError: no axis of ``features``, or another dtype than the layer's.
    """
    shape = tuple(getattr(x, "shape", ()))
    if not shape or shape[-1] != features:
        raise ShapeError(
            f"{name} must end in an axis of {features} features; got shape {shape}. "
            "Check the layer's in_features, or move the feature axis last."
        )
    if x.dtype != dtype:
        raise ShapeError(
            f"{name} must have the layer's dtype {dtype}; got {x.dtype}. Cast the input, or build "
            "the layer with the input's dtype."
        )
    return shape[:-1]


def check_ids(ids: Array, count: int, backend: Backend) -> tuple[int, ...]:
    """The shape of an array of integer ids; their range is checked where values can be read.

    Raises:
        ShapeError: not integers, or an id outside [0, count).
    """
    xp = backend.namespace
    if not hasattr(ids, "dtype") or not xp.isdtype(ids.dtype, "integral"):
        found = getattr(ids, "dtype", type(ids).__name__)
        raise ShapeError(f"ids must be integers; got {found}. Cast them with astype('int64').")
    if backend.eager and prod(ids.shape):
        low, high = int(xp.min(ids)), int(xp.max(ids))
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ShapeError(
                f"ids must lie in [0, {count}); got {wrong}. Check the vocabulary's size."
            )
    return tuple(ids.shape)


def check_coefficients(
    config: LayerConfig, coefficients: Array | TopK | Coefficients, lead: tuple[int, ...]
) -> list[Array | TopK]:
    """Ready-made coefficients, one entry a level, their shapes checked.

    Raises:
        ShapeError: another number of levels, or shapes that do not fit the input.
    """
    single = isinstance(coefficients, TopK) or hasattr(coefficients, "dtype")
    listed = [coefficients] if single else [*coefficients]
    experts = config.spec.experts
    if len(listed) != len(experts):
        raise ShapeError(
            f"coefficients must have one array a level, {len(experts)}; got {len(listed)}."
        )
    for level, (given, count) in enumerate(zip(listed, experts, strict=True)):
        if isinstance(given, TopK):
            same = given.indices.shape == given.values.shape
            fits = same and tuple(given.values.shape[:-1]) == lead
            found, wanted = tuple(given.values.shape), (*lead, "k")
        else:
            found, wanted = tuple(given.shape), (*lead, count)
            fits = found == wanted
        if not fits:
            raise ShapeError(
                f"coefficients of level {level} must have shape {wanted}; got {found}. Their "
                "leading axes are the input's, their last one the level's experts."
            )
    return listed


def route(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    backend: Backend,
    *,
    buffers: Mapping[str, Array] | None = None,
    keep: bool = False,
    training: bool = False,
) -> Routed:
    """Coefficients of inputs (batch, in), from the layer's own gate.

    Logits and coefficients are float32 or wider, whatever the layer's dtype.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in).
        backend: the adapter of the arrays' library.
        buffers: batch norm's running statistics by canonical name.
        keep: whether to return the logits, for the way back.
        training: whether batch norm uses the batch's own statistics.
    """
    gate = config.gate
    if gate is None:
        raise ShapeError(
            "this layer has no gate; got no coefficients. Call it with coefficients=…, or build "
            "it with a gate."
        )
    wide = _widened(x, backend)
    found: list[Activation] = []
    kept = []
    for level in range(config.spec.levels):
        projection = _widened(parameters[f"gate.projection_{level}"], backend)
        logits = backend.matmul(wide, projection)
        if gate.bias:
            logits += _widened(parameters[f"gate.bias_{level}"], backend)
        found.append(
            activate(gate, logits, statistics=_statistics(buffers, level), training=training)
        )
        if keep:
            kept.append(logits)
        del logits
    statistics = [each.statistics for each in found if each.statistics is not None]
    return Routed([each.coefficients for each in found], kept, statistics or None)


def gate_vjp(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    routed: Routed,
    cotangents: Sequence[Array],
    backend: Backend,
    *,
    buffers: Mapping[str, Array] | None = None,
    training: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """Gradients of :func:`route` by its input and its parameters.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), as in the forward call.
        routed: what the forward call, with ``keep=True``, returned.
        cotangents: one array (batch, N_e) a level.
        backend: the adapter of the arrays' library.
        buffers: the running statistics that the forward call was given.
        training: whether batch norm used the batch's own statistics.

    Returns:
        The gradient by ``x``, and the parameters' by canonical name.
    """
    gate = config.gate
    assert gate is not None
    wide = _widened(x, backend)
    gradients: dict[str, Array] = {}
    total = None
    for level, (logits, weights, cotangent) in enumerate(
        zip(routed.logits, routed.coefficients, cotangents, strict=True)
    ):
        inner = activate_vjp(
            gate,
            logits,
            weights,
            _widened(cotangent, backend),
            statistics=_statistics(buffers, level),
            training=training,
        )
        projection = parameters[f"gate.projection_{level}"]
        dtype = projection.dtype
        table = backend.matmul(backend.permute(wide, (1, 0)), inner)
        gradients[f"gate.projection_{level}"] = _cast(table, dtype, backend)
        if gate.bias:
            row = backend.sum(inner, (0,))
            gradients[f"gate.bias_{level}"] = _cast(row, dtype, backend)
        back = backend.permute(_widened(projection, backend), (1, 0))
        part = backend.matmul(inner, back)
        del inner
        if total is None:
            total = part
        else:
            total += part
    return _cast(total, x.dtype, backend), gradients


def apply_experts(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: list[Array | TopK],
    backend: Backend,
) -> Array:
    """The mixture of experts for inputs (batch, in) and given coefficients.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), or ids (batch,).
        coefficients: one entry a level, leading axes merged; the list is emptied.
        backend: the adapter of the arrays' library.

    Returns:
        The output (batch, out).
    """
    program = _program(config, coefficients, x.shape[0])
    arrays = _operands(program, parameters, x, coefficients, backend)
    coefficients.clear()
    return execute(program, arrays, backend)[0][0]


def experts_vjp(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: list[Array | TopK],
    backend: Backend,
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """:func:`apply_experts` with its way back.

    Returns:
        The output (batch, out), and a function from its cotangent to the gradients by operand:
        ``x`` (not for ids), ``coefficients_<level>``, and ``factors.<name>``.
    """
    program = _program(config, coefficients, x.shape[0])
    back = reverse(program)
    arrays = _operands(program, parameters, x, coefficients, backend)
    coefficients.clear()
    (result,), kept = execute(program, arrays, backend, back.saved)

    def pull(cotangent: Array) -> dict[str, Array]:
        saved = [kept[slot] for slot in back.saved]
        gradients, _ = execute(back.program, [*saved, cotangent], backend)
        named = zip(back.wanted, gradients, strict=True)
        factors = config.spec.shapes
        return {f"factors.{k}" if k in factors else k: value for k, value in named}

    return result, pull


def add_gradients(left: dict[str, Array], right: Mapping[str, Array]) -> dict[str, Array]:
    """Gradients of two uses of the same parameters, added by name."""
    for name, value in right.items():
        left[name] = left[name] + value if name in left else value
    return left


def materialize(
    config: LayerConfig, parameters: Mapping[str, Array], backend: Backend
) -> tuple[Array, Array | None]:
    """𝒲 (experts…, in, out) and the experts' biases (experts…, out), built explicitly.

    This is what the library exists to avoid: it takes N·I·O entries.
    """
    return _weights(config, dict(parameters), backend, single=False)


def expert_weight(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    index: Sequence[int],
    backend: Backend,
) -> tuple[Array, Array | None]:
    """One expert's matrix (in, out) and bias (out,), without building 𝒲.

    Args:
        config: the layer.
        parameters: by canonical name.
        index: one number a level.
        backend: the adapter of the arrays' library.

    Raises:
        ShapeError: another number of levels, or an index out of range.
    """
    experts = config.spec.experts
    if len(index) != len(experts):
        raise ShapeError(f"an expert has one index a level, {len(experts)}; got {index!r}.")
    for level, (place, count) in enumerate(zip(index, experts, strict=True)):
        if not 0 <= place < count:
            raise ShapeError(
                f"expert index must lie in [0, {count}) at level {level}; got {place}."
            )
    chosen = dict(parameters)
    for factor in config.spec.network.all_factors:
        place = tuple(
            index[int(leg[1:])] if leg in config.spec.network.expert_legs else slice(None)
            for leg in factor.legs
        )
        chosen[f"factors.{factor.name}"] = chosen[f"factors.{factor.name}"][place]
    return _weights(config, chosen, backend, single=True)


def prepare(
    config: LayerConfig, parameters: Mapping[str, Array], backend: Backend
) -> tuple[Program, dict[str, Array]]:
    """Run the weight-only steps of the plan for large batches once.

    Returns:
        The program that is left, and the arrays it takes besides input and coefficients.
    """
    first, rest = config.regimes.programs[-1].split()
    arrays = [parameters[f"factors.{operand.name}"] for operand in first.operands]
    results, _ = execute(first, arrays, backend)
    names = [operand.name for operand in rest.operands if operand.role == "factor"]
    return rest, dict(zip(names, results, strict=True))


def chunk_size(
    config: LayerConfig, batch: int, memory_limit: int, backend: Backend, itemsize: int
) -> int:
    """How many inputs may run at a time within ``memory_limit`` bytes, the gate included.

    Raises:
        PlanError: not even one; the message names the smallest feasible limit.
    """
    plan = plan_layer(
        config.spec,
        batch,
        Routing(None, config.indexed_input),
        memory_limit=memory_limit,
        gate=config.gate,
        itemsize=itemsize,
        row_block_bytes=backend.row_block_bytes,
    )
    return plan.chunk


def _program(config: LayerConfig, coefficients: Coefficients, batch: int) -> Program:
    kinds = {None if not isinstance(c, TopK) else int(c.values.shape[-1]) for c in coefficients}
    if len(kinds) > 1:
        raise ShapeError(
            "coefficients of all levels must be dense, or all indexed with one k; got a mixture."
        )
    kept = next(iter(kinds))
    if kept is None:
        return config.regimes.program(batch)
    return plan_regimes(config.spec, Routing(kept, config.indexed_input)).program(batch)


def _operands(
    program: Program,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Coefficients,
    backend: Backend,
) -> list[Array]:
    """The arrays of a program in slot order."""
    dtype = next(value.dtype for name, value in parameters.items() if name.startswith("factors."))
    arrays = []
    for operand in program.operands:
        kind, _, level = operand.name.rpartition("_")
        if operand.role == "factor":
            arrays.append(parameters[f"factors.{operand.name}"])
        elif kind == "coefficients":
            given = coefficients[int(level)]
            values = given.values if isinstance(given, TopK) else given
            arrays.append(_cast(values, dtype, backend))
        elif kind == "indices":
            chosen = coefficients[int(level)]
            assert isinstance(chosen, TopK)
            arrays.append(chosen.indices)
        else:
            arrays.append(x)
    return arrays


def _weights(
    config: LayerConfig, parameters: Mapping[str, Array], backend: Backend, *, single: bool
) -> tuple[Array, Array | None]:
    def run(bias: bool) -> Array:
        program = weight_program(config.spec, single=single, bias=bias)
        arrays = [parameters[f"factors.{operand.name}"] for operand in program.operands]
        return execute(program, arrays, backend)[0][0]

    return run(False), run(True) if config.spec.bias else None


def _statistics(buffers: Mapping[str, Array] | None, level: int) -> Statistics | None:
    if not buffers:
        return None
    return Statistics(
        buffers[f"gate.running_mean_{level}"], buffers[f"gate.running_variance_{level}"]
    )


def _widened(array: Array, backend: Backend) -> Array:
    """``array`` in float32 if it is narrower."""
    xp = backend.namespace
    return xp.astype(array, xp.float32) if xp.finfo(array.dtype).bits < 32 else array


def _cast(array: Array, dtype: object, backend: Backend) -> Array:
    return array if array.dtype == dtype else backend.namespace.astype(array, dtype)

"""The mixture of experts for given coefficients, its way back, and prepared weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from tensormoe import planning
from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._validation import positive_int
from tensormoe.backend import Array, Backend
from tensormoe.errors import PlanError, ShapeError
from tensormoe.execution import execute
from tensormoe.functional._checks import Coefficients
from tensormoe.functional._dtypes import cast
from tensormoe.gates import TopK
from tensormoe.planning import (
    Cost,
    Plan,
    Program,
    Reverse,
    Routing,
    plan_layer,
    plan_regimes,
    reverse,
)

__all__ = [
    "Residuals",
    "apply_experts",
    "block_cost",
    "chunk_size",
    "experts_backward",
    "experts_forward",
    "experts_vjp",
    "layer_cost",
    "layer_plan",
    "prepare",
]


def apply_experts(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: list[Array | TopK],
    backend: Backend,
    *,
    any_batch: bool = False,
) -> Array:
    """The mixture of experts for inputs (batch, in) and given coefficients.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), or ids (batch,).
        coefficients: one entry a level, leading axes merged; the list is emptied.
        backend: the adapter of the arrays' library.
        any_batch: whether to run the program for large batches, which is right for all, instead of
            the one for this batch: for exported models, whose batch size is open.

    Returns:
        The output (batch, out).
    """
    program = _program(config, coefficients, None if any_batch else x.shape[0])
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
    result, residuals = experts_forward(config, parameters, x, coefficients, backend)
    return result, lambda cotangent: experts_backward(config, residuals, cotangent, backend)


@dataclass(frozen=True, eq=False)
class Residuals:
    """What the way back of a mixture needs.

    Args:
        reverse: its program, and which gradients that gives.
        arrays: operands and intermediates of the forward call, in the order of ``reverse.saved``.
    """

    reverse: Reverse
    arrays: tuple[Array, ...]


def experts_forward(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: list[Array | TopK],
    backend: Backend,
    wanted: Collection[str] | None = None,
) -> tuple[Array, Residuals]:
    """:func:`apply_experts`, and what :func:`experts_backward` needs.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), or ids (batch,).
        coefficients: one entry a level, leading axes merged; the list is emptied.
        backend: the adapter of the arrays' library.
        wanted: names of the gradients to compute, as :func:`experts_vjp` has them; all by default.
    """
    program = _program(config, coefficients, x.shape[0])
    operands = None
    if wanted is not None:
        short = {name.removeprefix("factors.") for name in wanted}
        operands = tuple(each.name for each in program.operands if each.name in short)
    back = reverse(program, operands)
    arrays = _operands(program, parameters, x, coefficients, backend)
    coefficients.clear()
    (result,), kept = execute(program, arrays, backend, back.saved)
    return result, Residuals(back, tuple(kept[slot] for slot in back.saved))


def experts_backward(
    config: LayerConfig, residuals: Residuals, cotangent: Array, backend: Backend
) -> dict[str, Array]:
    """The gradients of a mixture by operand, from the cotangent of its output."""
    gradients, _ = execute(residuals.reverse.program, [*residuals.arrays, cotangent], backend)
    named = zip(residuals.reverse.wanted, gradients, strict=True)
    factors = config.spec.shapes
    return {f"factors.{k}" if k in factors else k: value for k, value in named}


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


def layer_plan(config: LayerConfig, batch: int) -> Plan:
    """How a layer runs a batch.

    Raises:
        PlanError: a batch that is no size, or a traced one.
    """
    # checked before plans are looked up, since a traced batch cannot be
    size = 0 if isinstance(batch, int) and batch == 0 else positive_int(batch, "batch", PlanError)
    return config.spec.plan(size, indexed_input=config.indexed_input)


def layer_cost(
    config: LayerConfig,
    batch: int,
    backend: Backend,
    itemsize: int,
    *,
    copies_transposed: bool = False,
    frees: bool = False,
    training: bool = False,
) -> Cost:
    """What one call of a layer costs on a library, its gate included if it has one.

    Args:
        config: the layer.
        batch: number of inputs.
        backend: adapter of the library, which says how gates walk over rows there.
        itemsize: bytes of an entry of the layer's dtype.
        copies_transposed: whether the library copies a transposed first operand of large products.
        frees: whether the backward pass lets go of what it does not need any more.
        training: forward and backward, instead of forward alone.
    """
    return layer_plan(config, batch).cost(
        config.gate,
        training=training,
        itemsize=itemsize,
        row_block_bytes=backend.row_block_bytes,
        picks_entries=backend.picks_entries,
        copies_transposed=copies_transposed,
        frees=frees,
    )


def block_cost(
    config: BlockConfig,
    batch: int,
    backend: Backend,
    itemsize: int,
    *,
    keeps_input: bool = True,
    frees: bool = True,
    copies_transposed: bool = False,
    training: bool = False,
) -> Cost:
    """Cost of one call of a block on a library: both layers, gate and activation.

    Args:
        config: the block.
        batch: number of inputs.
        backend: adapter of the library, which says how gates walk over rows there.
        itemsize: bytes of an entry of the block's dtype.
        keeps_input: whether the derivative of the activation is made of its input.
        frees: whether the backward pass lets go of what it does not need any more.
        copies_transposed: whether the library copies a transposed first operand of large products.
        training: forward and backward, instead of forward alone.
    """
    return planning.block_cost(
        layer_plan(config.first, batch),
        layer_plan(config.second, batch),
        config.first.gate,
        gated=config.gated,
        drop=config.drop,
        keeps_input=keeps_input,
        frees=frees,
        training=training,
        itemsize=itemsize,
        row_block_bytes=backend.row_block_bytes,
        picks_entries=backend.picks_entries,
        copies_transposed=copies_transposed,
    )


def chunk_size(
    config: LayerConfig, batch: int, memory_limit: int, backend: Backend, itemsize: int
) -> int:
    """How many inputs may run at a time within ``memory_limit`` bytes, the gate included.

    Raises:
        PlanError: not even one; the message names the smallest feasible limit.
    """
    plan = plan_layer(
        config.spec.network,
        batch,
        Routing(None, config.indexed_input),
        memory_limit=memory_limit,
        gate=config.gate,
        itemsize=itemsize,
        row_block_bytes=backend.row_block_bytes,
        picks_entries=backend.picks_entries,
        title=repr(config.spec.factorization),
    )
    return plan.chunk


def _program(config: LayerConfig, coefficients: Coefficients, batch: int | None) -> Program:
    kinds = {None if not isinstance(c, TopK) else int(c.values.shape[-1]) for c in coefficients}
    if len(kinds) > 1:
        raise ShapeError(
            "coefficients of all levels must be dense, or all indexed with one k; got a mixture."
        )
    kept = next(iter(kinds))
    regimes = config.regimes
    if kept is not None:
        regimes = plan_regimes(config.spec.network, Routing(kept, config.indexed_input))
    return regimes.programs[-1] if batch is None else regimes.program(batch)


def _operands(
    program: Program,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Coefficients,
    backend: Backend,
) -> list[Array]:
    """The arrays of a program in slot order."""
    dtype = next(value.dtype for name, value in parameters.items() if name.startswith("factors."))
    data = {"x": x, "ids": x}
    for level, given in enumerate(coefficients):
        if isinstance(given, TopK):
            data[f"indices_{level}"] = given.indices
            given = given.values
        data[f"coefficients_{level}"] = cast(given, dtype, backend)
    return [
        parameters["factors." + operand.name] if operand.role == "factor" else data[operand.name]
        for operand in program.operands
    ]

"""The mixture of experts for given coefficients, its backward pass, and prepared weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.errors import ShapeError
from tensormoe.execution import execute
from tensormoe.functional._checks import Coefficients
from tensormoe.functional._dtypes import cast
from tensormoe.gates import OneExpert, TopK
from tensormoe.planning import Program, Reverse, Routing, plan_regimes, reverse
from tensormoe.planning._grouping import COUNTS


def apply_experts(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Coefficients,
    backend: Backend,
    *,
    any_batch: bool = False,
    consume: bool = False,
) -> Array:
    """The mixture of experts for inputs (batch, in) and given coefficients.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), or ids (batch,).
        coefficients: one entry per level, leading axes merged.
        backend: the adapter of the arrays' library.
        any_batch: whether to run the program for large batches, which is right for all, instead of
            the one for this batch: for exported models, whose batch size is open.
        consume: whether to empty ``coefficients``, a list then, so that arrays that nobody else
            holds are freed at their last use.

    Returns:
        The output (batch, out).
    """
    program = _program(config, coefficients, None if any_batch else x.shape[0])
    arrays = operands_of(program, parameters, x, coefficients, backend)
    if consume and isinstance(coefficients, list):
        coefficients.clear()
    return execute(program, arrays, backend)[0][0]


def experts_vjp(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Coefficients,
    backend: Backend,
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """:func:`apply_experts` with its backward pass.

    Returns:
        The output (batch, out), and a function from its cotangent to the gradients by operand:
        ``x`` (not for ids), ``coefficients_<level>``, and ``factors.<name>``.
    """
    result, residuals = experts_forward(config, parameters, x, coefficients, backend)
    return result, lambda cotangent: experts_backward(config, residuals, cotangent, backend)


@dataclass(frozen=True, eq=False)
class Residuals:
    """Arrays that the backward pass of a mixture needs.

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
    coefficients: Coefficients,
    backend: Backend,
    wanted: Collection[str] | None = None,
) -> tuple[Array, Residuals]:
    """:func:`apply_experts`, and what :func:`experts_backward` needs.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (batch, in), or ids (batch,).
        coefficients: one entry per level, leading axes merged.
        backend: the adapter of the arrays' library.
        wanted: names of the gradients to compute, as :func:`experts_vjp` has them; all by default.
    """
    program = _program(config, coefficients, x.shape[0])
    operands = None
    if wanted is not None:
        short = {name.removeprefix("factors.") for name in wanted}
        operands = tuple(each.name for each in program.operands if each.name in short)
    back = reverse(program, operands)
    arrays = operands_of(program, parameters, x, coefficients, backend)
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


def _program(config: LayerConfig, coefficients: Coefficients, batch: int | None) -> Program:
    first = coefficients[0]
    if isinstance(first, OneExpert):
        if not all(isinstance(each, OneExpert) for each in coefficients):
            raise ShapeError(
                "coefficients of all levels must name one expert per row; got a mixture."
            )
        chosen = config.routed_regimes[first.counts is not None]
        return chosen.programs[-1] if batch is None else chosen.program(batch)
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


def operands_of(
    program: Program,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Coefficients,
    backend: Backend,
    carried: Mapping[str, Array] | None = None,
) -> list[Array]:
    """The arrays of a program in slot order.

    Args:
        program: that will run.
        parameters: by canonical name.
        x: its input.
        coefficients: one entry per level.
        backend: the adapter of the arrays' library.
        carried: results of a program before it, by the names of their operands.
    """
    dtype = next(value.dtype for name, value in parameters.items() if name.startswith("factors."))
    data = {"x": x, "ids": x}
    for level, given in enumerate(coefficients):
        if isinstance(given, OneExpert):
            data[f"indices_{level}"], data[COUNTS] = given.indices, given.counts
            continue
        if isinstance(given, TopK):
            data[f"indices_{level}"] = given.indices
            given = given.values
        data[f"coefficients_{level}"] = cast(given, dtype, backend)
    data.update(carried or {})
    return [
        parameters["factors." + operand.name] if operand.role == "factor" else data[operand.name]
        for operand in program.operands
    ]

"""Rows in the order of experts, as many for each, instead of coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.errors import ShapeError
from tensormoe.execution import execute
from tensormoe.functional._dtypes import cast
from tensormoe.planning._each import level_regimes


@dataclass(frozen=True)
class EachExpert:
    """In the place of coefficients: every expert runs rows of its own, as many as the others.

    A layer called with it takes (experts…, rows, in), or (rows, in) that every expert runs, and
    gives (experts…, rows, out). No expert's matrix is copied, as it is where coefficients name one
    expert per row: dense experts are one batched product.
    """


def apply_each(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    backend: Backend,
    *,
    any_batch: bool = False,
) -> Array:
    """Outputs (experts…, rows, out) of every expert for its own rows.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (experts…, rows, in), or (rows, in) for all.
        backend: the adapter of the arrays' library.
        any_batch: whether to run the program for many rows, which is right for all.

    Raises:
        ShapeError: other leading axes than the experts'.
    """
    experts = config.spec.experts
    if tuple(x.shape[:-2]) not in ((), experts) or x.ndim < 2:
        raise ShapeError(
            f"x must have shape {(*experts, 'rows', config.spec.in_features)}, as many rows for "
            f"each expert, or {('rows', config.spec.in_features)} for all; got {tuple(x.shape)}."
        )
    regimes = config.every_regimes if x.ndim == 2 else config.each_regimes
    program = regimes.programs[-1] if any_batch else regimes.program(x.shape[-2])
    arrays = [
        x if operand.name == "x" else parameters[f"factors.{operand.name}"]
        for operand in program.operands
    ]
    made: Array = execute(program, arrays, backend)[0][0]
    return made


def level_outputs(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    x: Array,
    coefficients: Sequence[Array],
    level: int,
    backend: Backend,
) -> Array:
    """Outputs (N_e, rows, out) of every expert of a level, biases included, for the same rows.

    The layer's output is their sum, each times its coefficient. One contraction makes them all;
    other levels are mixed by their coefficients.

    Args:
        config: the layer.
        parameters: by canonical name.
        x: (rows, in).
        coefficients: (rows, N_e) per level; those of ``level`` are not used.
        level: of the hierarchy.
        backend: the adapter of the arrays' library.
    """
    program = level_regimes(config.spec.network, level).program(x.shape[0])
    data = {f"coefficients_{k}": cast(a, x.dtype, backend) for k, a in enumerate(coefficients)}
    data["x"] = x
    arrays = [
        parameters[f"factors.{operand.name}"] if operand.role == "factor" else data[operand.name]
        for operand in program.operands
    ]
    made: Array = execute(program, arrays, backend)[0][0]
    return made

"""Weights built explicitly: all of 𝒲, or one expert."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from tensormoe._config import LayerConfig
from tensormoe._validation import brief
from tensormoe.backend import Array, Backend
from tensormoe.errors import ShapeError, SpecError
from tensormoe.execution import execute
from tensormoe.planning import Program, weight_program
from tensormoe.planning._halves import expert_halves


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
        index: one number per level.
        backend: the adapter of the arrays' library.

    Raises:
        ShapeError: another number of levels, or an index out of range.
    """
    return _weights(config, _picked(config, parameters, index), backend, single=True)


def expert_factors(
    config: LayerConfig,
    parameters: Mapping[str, Array],
    index: Sequence[int],
    backend: Backend,
) -> tuple[Array, Array, Array | None]:
    """Matrices (in, r) and (r, out) whose product is one expert's, and its bias (out,).

    They are the expert's network, cut where it is thinnest between input and output, so that the
    product is exact and no matrix (in, out) is built.

    Args:
        config: the layer.
        parameters: by canonical name.
        index: one number per level.
        backend: the adapter of the arrays' library.

    Raises:
        ShapeError: another number of levels, or an index out of range.
        SpecError: a factorization without such a cut, whose experts are matrices of full rank.

    >>> import numpy as np
    >>> from tensormoe import LayerSpec, LowRank
    >>> from tensormoe.backend import get_backend
    >>> config = LayerConfig(LayerSpec(8, 6, 3, LowRank(2), bias=False), None)
    >>> arrays = {name: np.ones(shape) for name, shape in config.parameter_shapes().items()}
    >>> reads, writes, _ = expert_factors(config, arrays, [1], get_backend("numpy"))
    >>> reads.shape, writes.shape
    ((8, 2), (2, 6))
    """
    spec = config.spec
    halves = expert_halves(spec.network)
    if halves is None:
        raise SpecError(
            "experts must be products of two matrices with fewer than "
            f"{min(spec.in_features, spec.out_features)} rows between them; got "
            f"{spec.factorization!r}, whose experts have full rank. Build whole matrices: "
            "expert(n), or tensormoe compress --dense."
        )
    chosen = _picked(config, parameters, index)

    def run(program: Program) -> Array:
        arrays = [chosen[f"factors.{operand.name}"] for operand in program.operands]
        return execute(program, arrays, backend)[0][0]

    reads = backend.reshape(run(halves.reads), (spec.in_features, halves.inner))
    writes = backend.reshape(run(halves.writes), (halves.inner, spec.out_features))
    if not spec.bias:
        return reads, writes, None
    return reads, writes, run(weight_program(spec.network, single=True, bias=True))


def _picked(
    config: LayerConfig, parameters: Mapping[str, Array], index: Sequence[int]
) -> dict[str, Array]:
    """The factors of one expert: their expert modes are indexed away."""
    experts = config.spec.experts
    if len(index) != len(experts):
        raise ShapeError(f"an expert has one index per level, {len(experts)}; got {index!r}.")
    numbers: list[int] = []
    for level, (place, count) in enumerate(zip(index, experts, strict=True)):
        try:
            number = -1 if isinstance(place, bool) else operator.index(place)
        except TypeError:
            # no integer, or one that is not known yet: JAX's while they are traced
            number = -1
        if not 0 <= number < count:
            raise ShapeError(
                f"expert index must lie in [0, {count}) at level {level}; got {brief(place)}."
            )
        numbers.append(number)
    chosen = dict(parameters)
    for factor in config.spec.network.all_factors:
        picked = tuple(
            numbers[int(leg[1:])] if leg in config.spec.network.expert_legs else slice(None)
            for leg in factor.legs
        )
        chosen[f"factors.{factor.name}"] = chosen[f"factors.{factor.name}"][picked]
    return chosen


def _weights(
    config: LayerConfig, parameters: Mapping[str, Array], backend: Backend, *, single: bool
) -> tuple[Array, Array | None]:
    def run(bias: bool) -> Array:
        program = weight_program(config.spec.network, single=single, bias=bias)
        arrays = [parameters[f"factors.{operand.name}"] for operand in program.operands]
        return execute(program, arrays, backend)[0][0]

    return run(False), run(True) if config.spec.bias else None

"""What factors lack, expert by expert: nothing of the weights' size is ever built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import hypot, sqrt

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array
from tensormoe.decomposition._contractions import structures
from tensormoe.decomposition._gauge import stretched
from tensormoe.decomposition._source import Source, norm, norms, power
from tensormoe.decomposition._starts import given
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.functional import LayerConfig, expert_weight
from tensormoe.functional._dtypes import cast, widened

__all__ = ["bias_error", "output_error", "shares", "total_error", "weight_errors"]


def shares(missing: Sequence[float], whole: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Norms of what is missing relative to norms of what was given: of all together, and of each.

    What stands for an expert of zeros is relative to the root mean square of all experts' norms.
    """
    total = hypot(*whole)
    if total == 0.0:
        return 0.0, (0.0,) * len(whole)
    mean = total / sqrt(len(whole))
    each = tuple(a / (b or mean) for a, b in zip(missing, whole, strict=True))
    return hypot(*missing) / total, each


def weight_errors(
    spec: LayerSpec, factors: Mapping[str, Array], source: Source
) -> tuple[float, tuple[float, ...]]:
    """Relative error of all experts together, and of each.

    Norms are of each expert by itself, so that experts of any scale stand beside one another.

    Args:
        spec: of the layer that the factors make.
        factors: by name; biases are left out.
        source: the weights alone.
    """
    network, backend = spec.network, source.backend
    named = _scaled(spec, factors, source)
    open_legs = (*network.expert_legs, INPUT, OUTPUT)
    terms = structures(network, open_legs, network.sizes)
    for term in terms:
        named |= given(term, source)
    left = source.without(terms, named)
    missing: list[float] = []
    whole: list[float] = []
    for start, stop in source.blocks():
        missing += norms(left.block(start, stop), backend)
        whole += norms(source.block(start, stop), backend)
    return shares(missing, whole)


def output_error(
    spec: LayerSpec,
    factors: Mapping[str, Array],
    source: Source,
    inputs: Array,
    coefficients: Array | None,
) -> float:
    """Relative error of outputs for inputs (samples, in), biases included where there are any.

    With coefficients (samples, N), all levels flattened, outputs are mixed; else every expert's own
    output counts.
    """
    backend = source.backend
    x = widened(inputs, backend)
    if source.bias is not None:
        one = backend.namespace.ones_like(x[:, :1])
        x = backend.namespace.concat([x, one], axis=1)
    x = cast(_near_one(x, source), source.dtype, backend)
    if coefficients is not None:
        coefficients = _near_one(widened(coefficients, backend), source)
    missing, whole = [], []
    lacking: Array = None
    total: Array = None
    for place, (matrix, found) in enumerate(_pairs(spec, factors, source)):
        made, lost = backend.matmul(x, matrix), backend.matmul(x, matrix - found)
        if coefficients is None:
            missing.append(norm(lost, backend))
            whole.append(norm(made, backend))
            continue
        weights = cast(coefficients[:, place : place + 1], source.dtype, backend)
        lacking = weights * lost if lacking is None else lacking + weights * lost
        total = weights * made if total is None else total + weights * made
    if coefficients is not None:
        missing, whole = [norm(lacking, backend)], [norm(total, backend)]
    return shares(missing, whole)[0]


def bias_error(
    spec: LayerSpec, factors: Mapping[str, Array], bias: Source, weights: Source
) -> float:
    """Relative error of the experts' biases, (experts…, 1, out) as a tensor.

    Where all biases are zeros, what stands for them is relative to the weights.
    """
    named = _named(spec, factors, bias)
    missing, whole = [], []
    config = LayerConfig(spec, None)
    for index, row in zip(_places(spec), bias.matrices(), strict=True):
        _, found = expert_weight(config, named, index, bias.backend)
        missing.append(norm(row - found, bias.backend))
        whole.append(norm(row, bias.backend))
    if not any(whole):
        return hypot(*missing) * weights.scale / sqrt(weights.squared_norm() or 1.0)
    return shares(missing, whole)[0]


def total_error(error: float, bias_error: float, weights: Source, bias: Source) -> float:
    """Relative error of weights and biases together, from that of each."""
    parts = [sqrt(each.squared_norm()) / each.scale for each in (weights, bias)]
    # biases of zeros are relative to the weights
    lacking = hypot(error * parts[0], bias_error * (parts[1] or parts[0]))
    return lacking / hypot(*parts) if any(parts) else 0.0


def _pairs(
    spec: LayerSpec, factors: Mapping[str, Array], source: Source
) -> Iterator[tuple[Array, Array]]:
    """Each expert's matrix, given and found, both at the source's scale; a bias is its last row."""
    named, backend = _named(spec, factors, source), source.backend
    config = LayerConfig(spec, None)
    for index, matrix in zip(_places(spec), source.matrices(), strict=True):
        found, row = expert_weight(config, named, index, backend)
        if row is not None:
            row = backend.namespace.expand_dims(row, axis=0)
            found = backend.namespace.concat([found, row], axis=0)
        yield matrix, found


def _scaled(spec: LayerSpec, factors: Mapping[str, Array], source: Source) -> dict[str, Array]:
    """Factors in the dtype and at the scale of a source."""
    wide = {name: cast(array, source.dtype, source.backend) for name, array in factors.items()}
    return stretched(spec.network, wide, source.scale)


def _named(spec: LayerSpec, factors: Mapping[str, Array], source: Source) -> dict[str, Array]:
    """The same by canonical name."""
    return {f"factors.{k}": array for k, array in _scaled(spec, factors, source).items()}


def _near_one(array: Array, source: Source) -> Array:
    """An array times a power of two, which relative errors do not depend on."""
    xp = source.backend.namespace
    return array * power(float(xp.max(xp.abs(array))), xp.finfo(array.dtype).bits)


def _places(spec: LayerSpec) -> Iterator[tuple[int, ...]]:
    return product(*(range(count) for count in spec.experts))

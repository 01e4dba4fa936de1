"""Errors of factors, expert by expert, a block of experts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import hypot, prod, sqrt
from typing import TYPE_CHECKING, Any, TypeAlias

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, Backend
from tensormoe.decomposition._bias_rows import with_bias_rows
from tensormoe.decomposition._contractions import structures
from tensormoe.decomposition._gauge import stretched
from tensormoe.decomposition._matrices import along, transposed
from tensormoe.decomposition._moments import LARGE, Moments, relative
from tensormoe.decomposition._norms import norm, norms, power
from tensormoe.decomposition._solve import to_host
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._starts import given
from tensormoe.decomposition._weighted import Weighting
from tensormoe.factorizations import INPUT, OUTPUT, Network, expert_leg
from tensormoe.functional._dtypes import cast, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray


Norms: TypeAlias = tuple[list[float], list[float]]
"""Norms of what is missing of every expert, and of the experts' matrices."""


def shares(missing: Sequence[float], whole: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Residual norms relative to the norms of the experts: of all together, and of each.

    The error of an expert of zeros is relative to the root mean square of all experts' norms.
    """
    total = hypot(*whole)
    if total == 0.0:
        return 0.0, (0.0,) * len(whole)
    mean = total / sqrt(len(whole))
    each = tuple(a / (b or mean) for a, b in zip(missing, whole, strict=True))
    return hypot(*missing) / total, each


def residual_norms(spec: LayerSpec, factors: Mapping[str, Array], source: Source) -> Norms:
    """Norms of the residuals of a layer's factors, which may have any scales.

    Biases are a row of a source with them.
    """
    return _norms(source, _left(spec, factors, source))


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
    pairs = zip(source.matrices(), _left(spec, factors, source).matrices(), strict=True)
    for index, (matrix, left) in enumerate(pairs):
        made, lost = backend.matmul(x, matrix), backend.matmul(x, left)
        if coefficients is None:
            missing.append(norm(lost, backend))
            whole.append(norm(made, backend))
            continue
        weights = cast(coefficients[:, index : index + 1], source.dtype, backend)
        lacking = weights * lost if lacking is None else lacking + weights * lost
        total = weights * made if total is None else total + weights * made
    if coefficients is not None:
        missing, whole = [norm(lacking, backend)], [norm(total, backend)]
    return shares(missing, whole)[0]


def moment_error(
    spec: LayerSpec,
    factors: Mapping[str, Array],
    source: Source,
    moments: Moments,
    weighting: Weighting | None = None,
    known: Norms | None = None,
) -> float:
    """Relative error of weights, biases included, in the metric of second moments.

    Args:
        spec: of the layer.
        factors: by name, as they are stored.
        source: the tensor without weights.
        moments: the metric.
        weighting: the tensor that is weighted by it, if there is one.
        known: the :func:`residual_norms`, if they are known.
    """
    turned = None if weighting is None else weighting.turned
    if turned is None or prod(source.shape[-2:]) <= LARGE:
        return moments.error(expert_pairs(spec, factors, source))
    # products of large matrices with moments take as long as a search: the weighted tensor is there
    assert weighting is not None
    root = weighting.roots[INPUT]
    weighted = _norms(turned, _left(spec, factors, source, root.array, turned))
    plain = known or residual_norms(spec, factors, source)

    def energy(place: int, side: int) -> float:
        # without the ridge
        found = weighted[side][place] ** 2 - root.ridge * plain[side][place] ** 2
        return moments.share(place) * max(found, 0.0)

    return relative((energy(place, 0), energy(place, 1)) for place in range(len(plain[0])))


def expert_pairs(
    spec: LayerSpec, factors: Mapping[str, Array], source: Source
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Of every expert its matrix, biases included, and what is missing of it, on the host."""
    backend = source.backend

    def on_host(array: Array) -> NDArray[Any]:
        found = to_host(array, backend)
        return found if source.scale == 1.0 else found.astype("float64") / source.scale

    for whole, left in zip(source.matrices(), _left(spec, factors, source).matrices(), strict=True):
        yield on_host(whole), on_host(left)


def bias_error(
    spec: LayerSpec, factors: Mapping[str, Array], bias: Source, weights: Source
) -> float:
    """Relative error of the experts' biases, (experts…, 1, out) as a tensor.

    Where all biases are zeros, their error is relative to the weights.
    """
    missing, whole = _norms(bias, _left(spec, factors, bias, only_bias=True))
    if not any(whole):
        return hypot(*missing) * weights.scale / sqrt(weights.squared_norm() or 1.0)
    return shares(missing, whole)[0]


def total_error(error: float, bias_error: float, weights: Source, bias: Source) -> float:
    """Relative error of weights and biases together, from that of each."""
    parts = [sqrt(each.squared_norm()) / each.scale for each in (weights, bias)]
    # biases of zeros are relative to the weights
    lacking = hypot(error * parts[0], bias_error * (parts[1] or parts[0]))
    return lacking / hypot(*parts) if any(parts) else 0.0


def _norms(source: Source, left: Source) -> Norms:
    """Norms of the experts' residuals, and of the experts' matrices."""
    missing: list[float] = []
    whole: list[float] = []
    for start, stop in source.blocks():
        missing += norms(left.block(start, stop), source.backend)
        whole += norms(source.block(start, stop), source.backend)
    return missing, whole


def _left(
    spec: LayerSpec,
    factors: Mapping[str, Array],
    source: Source,
    root: Array | None = None,
    turned: Source | None = None,
    only_bias: bool = False,
) -> Source:
    """Residual of a tensor after subtracting a layer's factors.

    Args:
        spec: of the layer.
        factors: by name, as they are stored.
        source: the weights, with biases or without them, or biases alone.
        root: R, of inputs' moments, if they weigh.
        turned: Rᵀ times the weights.
        only_bias: whether it is biases alone.
    """
    network, backend = spec.network, source.backend
    wide = {name: cast(array, source.dtype, backend) for name, array in factors.items()}
    named = stretched(network, wide, source.scale)
    if only_bias:
        for term in network.terms:
            assert term.bias is not None
            axis = term.input_factor.legs.index(INPUT)
            row = backend.namespace.expand_dims(named[term.bias.name], axis=axis)
            named[term.input_factor.name] = row
    elif source.bias is not None:
        named = with_bias_rows(network, named, backend)
    if root is not None:
        named |= _turned(network, named, root, backend)
    whole = source if turned is None else turned
    open_legs = (*network.expert_legs, INPUT, OUTPUT)
    terms = structures(network, open_legs, {**network.sizes, INPUT: source.shape[-2]})
    for each in terms:
        named |= given(each, whole)
    return whole.without(terms, named)


def _turned(
    network: Network, factors: Mapping[str, Array], root: Array, backend: Backend
) -> dict[str, Array]:
    """The factors with the input mode, of Rᵀ times what a network stands for."""
    found = {}
    for factor in (term.input_factor for term in network.terms):
        legs = (INPUT,) if root.ndim == 2 else (expert_leg(0), INPUT)
        axes = tuple(factor.legs.index(leg) for leg in legs)
        found[factor.name] = along(transposed(root, backend), factors[factor.name], axes, backend)
    return found


def _near_one(array: Array, source: Source) -> Array:
    """An array times a power of two, which relative errors do not depend on."""
    xp = source.backend.namespace
    return array * power(float(xp.max(xp.abs(array))), xp.finfo(array.dtype).bits)

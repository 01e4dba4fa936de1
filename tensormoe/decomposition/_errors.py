"""What factors lack, expert by expert: nothing of the weights' size is ever built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod, sqrt

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array
from tensormoe.decomposition._solve import to_host
from tensormoe.decomposition._source import Source
from tensormoe.functional import LayerConfig, expert_weight
from tensormoe.functional._dtypes import cast

__all__ = ["bias_error", "output_error", "svd_error", "weight_errors"]


def weight_errors(
    spec: LayerSpec, factors: Mapping[str, Array], source: Source
) -> tuple[float, tuple[float, ...]]:
    """Relative error of all experts together, and of each."""
    missing, whole = [], []
    for matrix, found in _pairs(spec, factors, source):
        missing.append(_squares(matrix - found, source))
        whole.append(_squares(matrix, source))
    each = tuple(_relative(a, b) for a, b in zip(missing, whole, strict=True))
    return _relative(sum(missing), sum(whole)), each


def output_error(
    spec: LayerSpec,
    factors: Mapping[str, Array],
    source: Source,
    inputs: Array,
    coefficients: Array | None,
) -> float:
    """Relative error of outputs for inputs (samples, in).

    With coefficients (samples, N), all levels flattened, outputs are mixed; else every expert's own
    output counts.
    """
    backend = source.backend
    x = cast(inputs, source.dtype, backend)
    missing = whole = 0.0
    lacking: Array = None
    total: Array = None
    for place, (matrix, found) in enumerate(_pairs(spec, factors, source)):
        given, lost = backend.matmul(x, matrix), backend.matmul(x, matrix - found)
        if coefficients is None:
            missing, whole = missing + _squares(lost, source), whole + _squares(given, source)
            continue
        weights = cast(coefficients[:, place : place + 1], source.dtype, backend)
        lacking = weights * lost if lacking is None else lacking + weights * lost
        total = weights * given if total is None else total + weights * given
    if coefficients is not None:
        missing, whole = _squares(lacking, source), _squares(total, source)
    return _relative(missing, whole)


def bias_error(spec: LayerSpec, factors: Mapping[str, Array], bias: Source) -> float:
    """Relative error of the experts' biases, (experts…, 1, out) as a tensor."""
    named = {f"factors.{name}": cast(a, bias.dtype, bias.backend) for name, a in factors.items()}
    missing = whole = 0.0
    config = LayerConfig(spec, None)
    for index, row in zip(_places(spec), bias.matrices(), strict=True):
        _, found = expert_weight(config, named, index, bias.backend)
        missing += _squares(row - found, bias)
        whole += _squares(row, bias)
    return _relative(missing, whole)


def svd_error(source: Source, parameters: int) -> float:
    """Relative error of the best truncated SVD of each expert, ``parameters`` entries together.

    A singular value costs in + out entries whichever expert it is of, so the largest of all are
    kept.
    """
    import numpy as np

    backend = source.backend
    rows, columns = source.shape[-2:]
    squares = []
    for matrix in source.matrices():
        if rows > columns:
            matrix = backend.permute(matrix, (1, 0))
        gram = backend.matmul(matrix, backend.permute(matrix, (1, 0)))
        squares.append(np.linalg.eigvalsh(to_host(gram, backend).astype(np.float64)))
    falling = np.sort(np.maximum(np.concatenate(squares), 0.0))[::-1]
    kept = parameters // (rows + columns)
    return sqrt(float(falling[kept:].sum()) / max(float(falling.sum()), 1e-300))


def _pairs(
    spec: LayerSpec, factors: Mapping[str, Array], source: Source
) -> Iterator[tuple[Array, Array]]:
    """Each expert's matrix, given and found."""
    named = {
        f"factors.{name}": cast(array, source.dtype, source.backend)
        for name, array in factors.items()
    }
    sizes = (spec.in_features, spec.out_features, spec.experts)
    plain = LayerConfig(LayerSpec(*sizes, spec.factorization, bias=False), None)
    for index, matrix in zip(_places(spec), source.matrices(), strict=True):
        yield matrix, expert_weight(plain, named, index, source.backend)[0]


def _places(spec: LayerSpec) -> Iterator[tuple[int, ...]]:
    return product(*(range(count) for count in spec.experts))


def _squares(array: Array, source: Source) -> float:
    if not prod(array.shape):
        return 0.0
    flat = source.backend.reshape(array, (-1, array.shape[-1]))
    return float(source.backend.namespace.sum(source.backend.square_sums(flat)))


def _relative(missing: float, whole: float) -> float:
    return sqrt(missing / whole) if whole else 0.0

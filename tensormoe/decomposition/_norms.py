"""Norms of numbers of any scale, and powers of two that keep squares in range."""

from __future__ import annotations

from math import frexp, inf, prod, sqrt

from tensormoe.backend import Array, Backend
from tensormoe.decomposition._solve import to_host

# powers of two within which squares of entries are far from the ends of a dtype's range, and which
# rounding of random starts, whose entries are near one, does not reach
_SAFE = 24


def power(largest: float, bits: int) -> float:
    """The power of two that takes a positive number near one, as far as a dtype has it.

    Args:
        largest: the number; 1 is returned for zero and for what is not finite.
        bits: of the dtype.
    """
    if not 0.0 < largest < inf:
        return 1.0
    most = 126 if bits == 32 else 1022
    return float(2.0 ** max(min(1 - frexp(largest)[1], most), -most))


def scaling(largest: float, bits: int) -> float:
    """:func:`power`, or 1 where numbers up to ``largest`` are in no danger."""
    found = power(largest, bits)
    return found if abs(frexp(found)[1]) > _SAFE else 1.0


def norm(array: Array, backend: Backend) -> float:
    """The Frobenius norm, of numbers of any scale."""
    (found,) = norms(backend.reshape(array, (1, -1, array.shape[-1])), backend)
    return found


def norms(array: Array, backend: Backend) -> list[float]:
    """The Frobenius norms of matrices (…, rows, columns), each of any scale."""
    xp, info = backend.namespace, backend.namespace.finfo(array.dtype)
    matrices = backend.reshape(array, (-1, *array.shape[-2:]))
    rows = backend.square_sums(backend.reshape(array, (-1, array.shape[-1])))
    totals = xp.sum(backend.reshape(rows, (-1, array.shape[-2])), axis=-1)
    # less may lack squares that are rounded to zero
    least = prod(array.shape[-2:]) * float(info.smallest_normal) / float(info.eps)
    found = []
    for index, total in enumerate(to_host(totals, backend).tolist()):
        scale = 1.0
        if not least <= total < inf:
            matrix = matrices[index]
            scale = power(float(xp.max(xp.abs(matrix))), info.bits)
            total = squares(matrix * scale, backend)
        found.append(sqrt(total) / scale)
    return found


def squares(array: Array, backend: Backend) -> float:
    """The sum of squares of an array."""
    rows = backend.reshape(array, (-1, array.shape[-1]))
    return float(backend.namespace.sum(backend.square_sums(rows)))

"""Bytes of factors that are stored in few bits, and the factors that a number of bytes allows."""

from __future__ import annotations

from functools import lru_cache

from tensormoe._rounding import GROUP, entries_within, stored_bytes
from tensormoe._spec import LayerSpec
from tensormoe.decomposition._choose import Sizes, candidates
from tensormoe.decomposition._several import several
from tensormoe.errors import BudgetError
from tensormoe.factorizations import Factorization, rank_pattern, resolve_factorization

Names = str | type[Factorization] | tuple[str | type[Factorization], ...]
"""A factorization, ``"auto"``, or several."""


def layer_bytes(spec: LayerSpec, bits: int | None, itemsize: int) -> int:
    """Bytes of a layer's factors as they are stored, scales included.

    Args:
        spec: the layer.
        bits: 8 or 4; None for entries of the dtype.
        itemsize: bytes of an entry of the dtype.
    """
    return sum(stored_bytes(shape, bits, itemsize) for shape in spec.shapes.values())


def full_bytes(entries: int, bits: int | None, itemsize: int) -> int:
    """Bytes of so many entries in groups that are full, scales included."""
    if bits is None:
        return entries * itemsize
    return entries * (bits * GROUP + 8 * itemsize) // (8 * GROUP)


@lru_cache(maxsize=256)
def entries_for(
    kind: Names, sizes: Sizes, size: int, bits: int | None, itemsize: int, bias: bool = False
) -> int:
    """A number of entries with which every factorization that may be the best one fits in bytes.

    Args:
        kind: the factorization, or those to choose from.
        sizes: in, out, and the experts.
        size: how many bytes.
        bits: 8 or 4; None for entries of the dtype.
        itemsize: bytes of an entry of the dtype.
        bias: whether the layer has biases.

    Raises:
        BudgetError: nothing fits.
    """
    choices = several(kind, None)
    names = (kind,) if choices is None else choices.names
    count = entries_within(size, bits, itemsize)
    reason: BudgetError | None = None
    while count > 0:
        over, fits = 0, False
        for name in names:
            try:
                specs = _specs(name, sizes, count, size, bits, itemsize, bias)  # type: ignore[arg-type]
            except BudgetError as error:
                reason = reason or error
                continue
            fits = True
            # a last group of entries that is not full has a scale of its own, in each factor
            over = max(over, *(layer_bytes(spec, bits, itemsize) - size for spec in specs))
        if not fits:
            break
        if not over:
            return count
        count -= over
    raise reason or BudgetError(f"a budget must leave every group an entry; {size:,} bytes do not.")


def _specs(
    name: str | type[Factorization],
    sizes: Sizes,
    count: int,
    size: int,
    bits: int | None,
    itemsize: int,
    bias: bool,
) -> list[LayerSpec]:
    """Layers of so many entries that may be the best one.

    Raises:
        BudgetError: there is none.
    """
    if rank_pattern(name, len(sizes[2])):
        return [LayerSpec(*sizes, each, bias=bias) for each in candidates(name, sizes, count, bias)]
    spec = LayerSpec(*sizes, resolve_factorization(name, None), bias=bias)
    needed = layer_bytes(spec, bits, itemsize)
    if needed > size or spec.num_parameters > count:
        raise BudgetError(
            f"{spec.factorization.name} of {bits or 8 * itemsize} bits takes {needed:,} bytes; "
            f"the budget leaves {size:,}. Raise it, or take fewer bits."
        )
    return [spec]

"""Arrays in 8 or 4 bits: rounded to the nearest, with a scale for every few entries.

Entries are taken in row-major order, and each 64 of them share a scale, so that axes of any length
cost the same. The entry of the largest magnitude becomes the code of the largest magnitude, -8 of 4
bits, whose scale has the opposite sign: of 16 codes, none is left unused (the scheme of GGML's
``q4_0``). Of 4 bits, scales a little smaller, which cut off the largest entries, are tried as well,
and the one with the least squared error is taken.

Scales have the dtype of the array, and at most eight significant bits, as bfloat16 has them: they
are the same in every dtype that holds their magnitude. Arrays that were rounded once are rounded to
the same codes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from tensormoe._validation import brief
from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import ShapeError, SpecError

BITS = (8, 4)
"""Numbers of bits that there are."""
AUTO = "auto"
"""Stands for the bits that lose least within a budget of bytes."""
GROUP = 64
"""Entries with one scale; the last ones may be fewer."""
CODES, SCALES = "codes", "scales"
"""Last parts of the names of arrays that stand for a rounded one."""

# the least squared error is looked for among scales smaller than that of the largest entry
_SHRUNK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
# entries that are rounded at a time
_ENTRIES = 2**20
_SIGNIFICANT = 8
# products with what splits off low bits stay finite
_LARGEST = 2.0**100


def checked_bits(bits: Any) -> int | None:
    """8 or 4, or None for entries that stay as they are, which 16 bits mean as well.

    Raises:
        SpecError: another number of bits.
    """
    if type(bits) is bool or bits not in (None, 16, 8, 4):
        raise SpecError(
            f"bits must be 16, 8, 4 or None, for entries as they are; got {brief(bits)}."
        )
    return None if bits in (None, 16) else int(bits)


def checked_bits_or_auto(bits: Any) -> int | str | None:
    """Bits, or ``"auto"`` where they are chosen.

    Raises:
        SpecError: neither.
    """
    return bits if bits == AUTO else checked_bits(bits)


def code_shapes(shape: tuple[int, ...], bits: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what stands for an array: of 4 bits, two codes are in a byte, groups in rows.

    >>> code_shapes((10, 13), 8)
    {'codes': (10, 13), 'scales': (3,)}
    >>> code_shapes((10, 13), 4)
    {'codes': (3, 32), 'scales': (3,)}
    """
    groups = -(-prod(shape) // GROUP)
    return {CODES: tuple(shape) if bits == 8 else (groups, GROUP // 2), SCALES: (groups,)}


def stored_bytes(shape: tuple[int, ...], bits: int | None, itemsize: int) -> int:
    """Bytes of an array as it is stored, scales included.

    Args:
        shape: of the array.
        bits: per entry; None for entries of the dtype.
        itemsize: bytes of an entry of the dtype, which the scales have.

    >>> stored_bytes((10, 13), None, 2), stored_bytes((10, 13), 8, 2), stored_bytes((10, 13), 4, 2)
    (260, 136, 102)
    """
    if bits is None:
        return prod(shape) * itemsize
    shapes = code_shapes(shape, bits)
    return prod(shapes[CODES]) + prod(shapes[SCALES]) * itemsize


def entries_within(size: int, bits: int | None, itemsize: int) -> int:
    """The most entries that one array of so many bytes can have.

    >>> entries_within(136, 8, 2), entries_within(137, 8, 2), entries_within(102, 4, 2)
    (130, 131, 192)
    """
    if bits is None:
        return size // itemsize
    groups, left = divmod(size, bits * GROUP // 8 + itemsize)
    # a last group that is not full has a scale of its own
    return GROUP * groups + (max(0, left - itemsize) if bits == 8 else 0)


def code_names(shapes: Mapping[str, tuple[int, ...]], bits: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name of what stands for arrays by name.

    >>> code_names({"factors.input": (10, 13)}, 8)
    {'factors.input.codes': (10, 13), 'factors.input.scales': (3,)}
    """
    return {
        f"{name}.{part}": each
        for name, shape in shapes.items()
        for part, each in code_shapes(shape, bits).items()
    }


def round_to_nearest(array: Array, bits: int, backend: Backend) -> tuple[Array, Array]:
    """Codes and scales of an array.

    Args:
        array: floating-point, of any shape.
        bits: 8 or 4.
        backend: its library.

    Returns:
        ``codes``: int8 in the array's shape; of 4 bits uint8 (groups, 32), a group's first 32
        entries in the lower halves of its bytes and the others in the upper ones, each 8 more than
        it means; ``scales``: one for each 64 entries in row-major order, in the array's dtype.

    Raises:
        ShapeError: entries that are not finite, or beyond 2¹⁰⁰.

    >>> import numpy as np
    >>> from tensormoe_numpy import BACKEND
    >>> round_to_nearest(np.array([-1.0, 0.5, 0.25]), 8, BACKEND)
    (array([-128,   64,   32], dtype=int8), array([0.0078125]))
    >>> codes, scales = round_to_nearest(np.array([-1.0, 0.5, 0.25]), 4, BACKEND)
    >>> codes.shape, codes[0, :3] % 16, scales
    ((1, 32), array([ 0, 12, 10], dtype=uint8), array([0.125]))
    """
    xp, shape = backend.namespace, tuple(array.shape)
    flat = backend.reshape(array, (prod(shape),))
    parts = [
        _rounded(flat[start : start + _ENTRIES], bits, backend)
        for start in range(0, max(flat.shape[0], 1), _ENTRIES)
    ]
    codes, scales = (
        xp.concat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)
    )
    return backend.reshape(codes, code_shapes(shape, bits)[CODES]), scales


def rounded_values(
    codes: Array, scales: Array, shape: tuple[int, ...], bits: int, backend: Backend
) -> Array:
    """The array that codes and scales stand for, in the dtype of the scales.

    Products are computed in float32 at least, in which they are exact, and then rounded: every
    library makes the same.

    Args:
        codes: as :func:`round_to_nearest` makes them.
        scales: the same.
        shape: of the array.
        bits: 8 or 4.
        backend: their library.

    >>> import numpy as np
    >>> from tensormoe_numpy import BACKEND
    >>> rounded_values(np.int8([-128, 64, 32]), np.float32([2**-7]), (3,), 8, BACKEND)
    array([-1.  ,  0.5 ,  0.25], dtype=float32)
    """
    xp, count = backend.namespace, prod(shape)
    wide = _wide(scales.dtype, xp)
    if bits == 4:
        # the lower halves are the first entries: nothing is interleaved
        by_group = xp.concat([codes & 15, codes >> 4], axis=1)
        by_group = xp.astype(by_group, wide) - 8.0
    else:
        by_group = _by_group(xp.astype(backend.reshape(codes, (count,)), wide), backend)
    made = by_group * xp.astype(scales, wide)[:, None]
    found = backend.reshape(made, (made.shape[0] * GROUP,))[:count]
    return xp.astype(backend.reshape(found, tuple(shape)), scales.dtype)


def _rounded(flat: Array, bits: int, backend: Backend) -> tuple[Array, Array]:
    """Flat codes and scales of flat entries, whole groups but for the last one."""
    xp, count = backend.namespace, flat.shape[0]
    groups = _by_group(xp.astype(flat, _wide(flat.dtype, xp)), backend)
    high = xp.max(groups, axis=-1, keepdims=True) if count else groups[:, :1]
    low = xp.min(groups, axis=-1, keepdims=True) if count else groups[:, :1]
    # NaN is no number below
    if not bool(xp.all((high < _LARGEST) & (low > -_LARGEST))):
        raise ShapeError(
            "entries must be finite, and below 2**100, to be rounded to "
            f"{bits} bits; got others. Repair the weights."
        )
    top = 2 ** (bits - 1)
    extreme = xp.where(high > -low, high, low)
    first, *smaller = (_short(extreme * (-k / top), flat.dtype, top, xp) for k in _SHRUNK[bits])
    best, scales = _codes(groups, first, top, xp), first
    # in units in which no square is too large or too small
    unit = xp.where(extreme == 0.0, xp.ones_like(extreme), extreme)
    error = None if not smaller else _squares((best * scales - groups) / unit, xp)
    for tried in smaller:
        codes = _codes(groups, tried, top, xp)
        found = _squares((codes * tried - groups) / unit, xp)
        less = found < error
        best, scales = xp.where(less, codes, best), xp.where(less, tried, scales)
        error = xp.where(less, found, error)
    return _packed(best, count, bits, backend), xp.astype(scales[:, 0], flat.dtype)


def _squares(array: Array, xp: Any) -> Array:
    return xp.sum(array * array, axis=-1, keepdims=True)


def _by_group(flat: Array, backend: Backend) -> Array:
    """Flat entries as rows of a group each, the last one filled up with zeros."""
    xp = backend.namespace
    short = -flat.shape[0] % GROUP
    if short:
        zeros = xp.zeros((short,), dtype=flat.dtype, device=device_of(flat))
        flat = xp.concat([flat, zeros])
    return backend.reshape(flat, (flat.shape[0] // GROUP, GROUP))


def _short(scale: Array, dtype: Any, top: int, xp: Any) -> Array:
    """Scales of eight significant bits, whose products with codes a dtype holds."""
    wide = scale.dtype
    most = float(xp.finfo(dtype).max) * (1 - 2.0**-_SIGNIFICANT) / top
    if most < _LARGEST:
        scale = xp.minimum(scale, xp.full_like(scale, most))
        scale = xp.maximum(scale, xp.full_like(scale, -most))
    # Veltkamp's split: the upper bits of a float, by its arithmetic alone
    digits = 24 if xp.finfo(wide).bits == 32 else 53
    spread = scale * (2.0 ** (digits - _SIGNIFICANT) + 1.0)
    return xp.astype(xp.astype(spread - (spread - scale), dtype), wide)


def _codes(groups: Array, scale: Array, top: int, xp: Any) -> Array:
    """The nearest codes, as floats; zeros where the scale is zero."""
    none = scale == 0.0
    plain = xp.round(groups / xp.where(none, xp.ones_like(scale), scale))
    inside = xp.maximum(xp.minimum(plain, xp.full_like(plain, top - 1)), xp.full_like(plain, -top))
    return xp.where(none, xp.zeros_like(inside), inside)


def _packed(codes: Array, count: int, bits: int, backend: Backend) -> Array:
    """Codes by group in the integers that they are stored in; flat ones of 8 bits."""
    xp = backend.namespace
    if bits == 8:
        flat = backend.reshape(codes, (codes.shape[0] * GROUP,))
        return xp.astype(flat[:count], xp.int8)
    plain = xp.astype(codes + 8.0, xp.uint8)
    return plain[:, : GROUP // 2] + plain[:, GROUP // 2 :] * 16


def _wide(dtype: Any, xp: Any) -> Any:
    """The dtype that scales of a dtype are worked with."""
    return dtype if xp.finfo(dtype).bits >= 32 else xp.float32

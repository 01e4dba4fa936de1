"""How the gates walk over an array: checks, dtype, axis, row blocks, masks and infinities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

from tensormoe.backend import Array, Backend, backend_of
from tensormoe.errors import GateError


@dataclass(frozen=True)
class Rows:
    """Logits as a matrix whose rows are tokens, with what is needed to go back.

    Attributes:
        values: (rows, experts), floating point of at least 32 bits.
        mask: (rows, experts) booleans, true where an expert may be used, or ``None``.
        shape: the logits' shape with the experts' axis moved to the end.
        axis: the experts' axis in the caller's array, counted from the end, hence negative.
    """

    backend: Backend
    values: Array
    mask: Array | None
    shape: tuple[int, ...]
    axis: int

    def restore(self, values: Array) -> Array:
        """A (rows, experts) result in the caller's layout."""
        values = self.backend.reshape(values, self.shape)
        return self.backend.namespace.moveaxis(values, -1, self.axis) if self.axis != -1 else values


def as_rows(
    logits: Array, axis: int = -1, mask: Array | None = None, backend: Backend | None = None
) -> Rows:
    """Check ``logits`` and ``mask`` at the public door and flatten them to rows.

    ``backend`` is that of the arrays, for callers that know it; it is looked up otherwise.
    """
    if backend is None:
        backend = backend_of(logits) if mask is None else backend_of(logits, mask)
    xp = backend.namespace
    if not xp.isdtype(logits.dtype, "real floating"):
        raise GateError(
            f"logits must be real floating point; got dtype {logits.dtype}. Convert them first, "
            "to float32 for instance."
        )
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise GateError(f"axis must be an integer; got {axis!r}. Name one axis, e.g. -1.")
    if not -logits.ndim <= axis < logits.ndim:
        raise GateError(
            f"axis must be in [{-logits.ndim}, {logits.ndim}); got {axis} for logits of shape "
            f"{tuple(logits.shape)}. Name the axis of the experts."
        )
    axis = axis - logits.ndim if axis >= 0 else axis
    if logits.shape[axis] == 0:
        raise GateError(
            f"logits must have at least one expert; got shape {tuple(logits.shape)} with 0 at axis "
            f"{axis}. Give one logit an expert."
        )
    if mask is not None:
        mask = _full_mask(xp, mask, tuple(logits.shape))
    if xp.finfo(logits.dtype).bits < 32:
        logits = xp.astype(logits, xp.float32)
    if axis != -1:
        logits = xp.moveaxis(logits, axis, -1)
        mask = None if mask is None else xp.moveaxis(mask, axis, -1)
    shape = tuple(logits.shape)
    if len(shape) != 2:
        matrix = (prod(shape[:-1]), shape[-1])
        logits = backend.reshape(logits, matrix)
        mask = None if mask is None else backend.reshape(mask, matrix)
    return Rows(backend, logits, mask, shape, axis)


def _full_mask(xp: Any, mask: Array, shape: tuple[int, ...]) -> Array:
    if not xp.isdtype(mask.dtype, "bool"):
        raise GateError(
            f"mask must be boolean, true where an expert may be used; got dtype {mask.dtype}. "
            "Compare it with something, e.g. mask != 0."
        )
    sizes = (1,) * (len(shape) - mask.ndim) + tuple(mask.shape)
    if len(sizes) != len(shape) or any(
        have not in (1, want) for have, want in zip(sizes, shape, strict=True)
    ):
        raise GateError(
            f"mask must broadcast to the logits' shape {shape}; got shape {tuple(mask.shape)}. "
            "Give it the logits' shape, or size 1 where it repeats."
        )
    return xp.broadcast_to(mask, shape)


def block_rows(rows: int, experts: int, itemsize: int, row_block_bytes: int | None) -> int:
    """Rows of one block: all of them where the library wants no blocks, at least one."""
    if row_block_bytes is None:
        return max(rows, 1)
    return max(1, min(rows, row_block_bytes // (experts * itemsize)))


def blocks(rows: Rows) -> Iterator[tuple[int, int]]:
    """Start and stop of each row block; a single empty one for an empty batch."""
    count, experts = rows.values.shape
    if rows.backend.row_block_bytes is None:
        # traced sizes may be symbols, which no loop runs over
        yield 0, count
        return
    itemsize = rows.backend.namespace.finfo(rows.values.dtype).bits // 8
    step = block_rows(count, experts, itemsize, rows.backend.row_block_bytes)
    for start in range(0, max(count, 1), step):
        yield start, min(start + step, count)


def map_rows(rows: Rows, function: Callable[[Array, Array | None, int], Array]) -> Array:
    """Apply ``function(values, mask, first_row)`` to each block of rows and join the results."""
    spans = list(blocks(rows))
    if len(spans) == 1:
        return function(rows.values, rows.mask, 0)
    joined = rows.backend.namespace.empty_like(rows.values)
    for start, stop in spans:
        mask = None if rows.mask is None else rows.mask[start:stop, :]
        joined[start:stop, :] = function(rows.values[start:stop, :], mask, start)
    return joined


@dataclass(frozen=True)
class Finite:
    """A block whose values are finite everywhere, and where its infinities and gaps were.

    Attributes:
        values: the logits, 0 where ``live`` is false.
        live: finite logits of experts that the mask allows.
        infinite: +inf logits of experts that the mask allows; they share their row equally.
    """

    values: Array
    live: Array
    infinite: Array
    crowned: Array

    @property
    def usable(self) -> Any:
        """Experts that can get a coefficient: the infinite ones of a row, else the live ones."""
        return (self.crowned & self.infinite) | (~self.crowned & self.live)


def finite(backend: Backend, values: Array, mask: Array | None, first_row: int) -> Finite:
    """Split infinities and masked experts off, so that arithmetic and its derivative stay finite.

    NaN and rows without any expert are errors where values can be inspected; elsewhere NaN
    propagates and such rows get coefficients of zero.
    """
    xp = backend.namespace
    inf = float("inf")
    infinite = values == inf
    live = ~infinite & (values != -inf)
    if mask is not None:
        infinite = infinite & mask
        live = live & mask
    values = xp.where(live, values, xp.zeros_like(values))
    crowned = xp.any(infinite, axis=-1, keepdims=True)
    if backend.checks_values:
        _refuse_nan(xp, values, first_row)
        dead = ~(crowned[:, 0] | xp.any(live, axis=-1))
        if bool(xp.any(dead)):
            raise GateError(
                "every token must have at least one expert; got none in row "
                f"{first_row + int(xp.argmax(xp.astype(dead, xp.int32)))}, where all logits are "
                "masked or -inf. Leave each token one expert."
            )
    return Finite(values, live, infinite, crowned)


def _refuse_nan(xp: Any, values: Array, first_row: int) -> None:
    bad = xp.isnan(values)
    if bool(xp.any(bad)):
        row, expert = divmod(int(xp.argmax(xp.astype(bad, xp.int32))), values.shape[1])
        raise GateError(
            f"logits must not be NaN; got NaN in row {first_row + row}, expert {expert}. Look for "
            "an overflow in the layers before the gate."
        )


def all_finite(xp: Any, row_statistic: Array) -> bool:
    """Whether a statistic with one entry a row is finite everywhere: one cheap look a block."""
    return isfinite(float(xp.sum(row_statistic)))

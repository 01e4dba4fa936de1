"""Products with roots of moments, and products of matrices that are not carried out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tensormoe.backend import Array, Backend

# a triangular matrix is cut into so many strips of at least so many rows
_STRIPS, _STRIP = 8, 64


@dataclass(frozen=True, eq=False)
class Operator:
    """A product of matrices that is not carried out.

    Args:
        parts: the matrices, the first one leftmost.
        backend: adapter of their library.
    """

    parts: tuple[Array, ...]
    backend: Backend

    @property
    def columns(self) -> int:
        """The product's number of columns."""
        size: int = self.parts[-1].shape[1]
        return size

    @property
    def transposed(self) -> Operator:
        """The product's transpose."""
        turned = (self.backend.permute(each, (1, 0)) for each in reversed(self.parts))
        return Operator(tuple(turned), self.backend)

    def times(self, columns: Array) -> Array:
        """The product with some columns, from the right to the left."""
        for each in reversed(self.parts):
            columns = self.backend.matmul(each, columns)
        return columns

    def after(self, rows: Array) -> Array:
        """The product of some rows with it, from the left to the right."""
        for each in self.parts:
            rows = self.backend.matmul(rows, each)
        return rows


def along(matrix: Array, array: Array, axes: tuple[int, ...], backend: Backend) -> Array:
    """The product of a matrix with an axis of an array.

    Args:
        matrix: (rows, size); or (N, rows, size), one for each entry of other axes.
        array: of any shape.
        axes: these others, if any, and the axis at the end.
        backend: adapter of their library.
    """
    order = (*axes, *(k for k in range(array.ndim) if k not in axes))
    moved = backend.permute(array, order)
    *levels, size = moved.shape[: len(axes)]
    rest = tuple(moved.shape[len(axes) :])
    batch = (prod(levels),) if levels else ()
    flat = backend.matmul(matrix, backend.reshape(moved, (*batch, size, prod(rest))))
    wide = backend.reshape(flat, (*levels, matrix.shape[-2], *rest))
    return backend.permute(wide, tuple(order.index(k) for k in range(array.ndim)))


def transposed(matrix: Array, backend: Backend) -> Array:
    """Rows and columns of a matrix, or of each of several, in turn."""
    return backend.permute(matrix, (1, 0) if matrix.ndim == 2 else (0, 2, 1))


def turned(array: Array, inputs: Array | None, outputs: Array | None, backend: Backend) -> Array:
    """Rᵀ X Q of matrices X (…, in, out) and lower triangular roots; R of all, or (N, in, in).

    Large ones are cut into strips, so that what is zero is not multiplied: nearly half.
    """
    xp = backend.namespace
    if inputs is not None:
        root = transposed(inputs, backend)
        strips = [
            backend.matmul(root[..., start:stop, start:], array[..., start:, :])
            for start, stop in _strips(root.shape[-1])
        ]
        array = strips[0] if len(strips) == 1 else xp.concat(strips, axis=-2)
    if outputs is not None:
        strips = [
            backend.matmul(array[..., start:], outputs[start:, start:stop])
            for start, stop in _strips(outputs.shape[0])
        ]
        array = strips[0] if len(strips) == 1 else xp.concat(strips, axis=-1)
    return array


def _strips(size: int) -> Iterator[tuple[int, int]]:
    """Parts of a triangular matrix: one of a small one."""
    step = size if size < _STRIP * _STRIPS else -(-size // _STRIPS)
    for start in range(0, size, step):
        yield start, min(start + step, size)

"""The tensor that is decomposed, read a few experts at a time, widened and weighted on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import frexp, inf, prod, sqrt
from typing import Any

from tensormoe.backend import Array, Backend, device_of
from tensormoe.decomposition._contractions import SOURCE, Structure, plan_whole
from tensormoe.decomposition._solve import to_host
from tensormoe.execution import execute, plus
from tensormoe.factorizations import Leg
from tensormoe.functional._dtypes import widened
from tensormoe.planning import Program

# powers of two within which squares of entries are far from the ends of a dtype's range
_SAFE = {32: 24, 64: 240}
# entries of a block; larger ones are no faster, and what is made of them costs memory
_BLOCK = 2**17
# a triangular matrix is cut into so many strips of at least so many rows
_STRIPS, _STRIP = 8, 64


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor (experts…, in, out).

    Args:
        array: in any floating-point dtype; its work is done in float32 at least.
        backend: adapter of its library.
        bias: (experts…, out), one more row of every matrix, if any.
        inputs: R, of the input's size and lower triangular, if inputs weigh differently: the tensor
            stands for Rᵀ times itself; (experts₀, …, …) where those of every expert do.
        weights: (experts₀,) of the first level, if experts weigh differently.
        outputs: Q, of the output's size and lower triangular, if outputs weigh differently: itself
            times Q.
        taken: networks that are subtracted, and their factors by name; after all weights.
        scale: a power of two that the array and the bias are multiplied with.
    """

    array: Array
    backend: Backend
    bias: Array | None = None
    inputs: Array | None = None
    weights: Array | None = None
    taken: tuple[tuple[Structure, Mapping[str, Array]], ...] = ()
    scale: float = 1.0
    outputs: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of experts, input (and one for the bias) and output."""
        *experts, rows, columns = self.array.shape
        return (*experts, rows + (self.bias is not None), columns)

    @property
    def dtype(self) -> Any:
        """The dtype that the work is done in."""
        return self.like.dtype

    @property
    def like(self) -> Array:
        """No entries, of the library and device that the work is done on, and in its dtype."""
        return widened(self.array[(slice(0, 0),)], self.backend)

    def block(self, start: int, stop: int) -> Array:
        """Experts ``start`` to ``stop`` of the first level, widened and weighted."""
        found = widened(self.array[start:stop], self.backend)
        if self.bias is not None:
            row = self.backend.namespace.expand_dims(self.bias[start:stop], axis=-2)
            row = widened(row, self.backend)
            found = self.backend.namespace.concat([found, row], axis=-2)
        if self.scale != 1.0:
            found = found * self.scale
        inputs = self.inputs
        if inputs is not None and inputs.ndim == 3:
            inputs = inputs[start:stop]
        found = turned(found, inputs, self.outputs, self.backend)
        if self.weights is not None:
            ones = (1,) * (found.ndim - 1)
            found = found * self.backend.reshape(self.weights[start:stop], (-1, *ones))
        for structure, factors in self.taken:
            program = plan_whole(_narrowed(structure, start, stop))
            arrays = _sliced(structure, factors, start, stop)
            found = found - run(program, arrays, self.backend)
        return found

    def scaled(self) -> Source:
        """The same where squares of entries neither overflow nor underflow, by a power of two."""
        xp = self.backend.namespace
        spans = (self.block(*span) for span in self.blocks())
        largest = max(float(xp.max(xp.abs(block))) for block in spans)
        return replace(self, scale=self.scale * scaling(largest, xp.finfo(self.dtype).bits))

    def without(self, terms: Iterable[Structure], factors: Mapping[str, Array]) -> Source:
        """The rest of the tensor after a sum of networks is subtracted."""
        return replace(self, taken=(*self.taken, *((each, factors) for each in terms)))

    @property
    def plain(self) -> bool:
        """Whether the array is worked on as it is."""
        changed = (self.bias, self.inputs, self.weights, self.outputs)
        same = all(each is None for each in changed) and not self.taken
        return same and self.scale == 1.0 and self.dtype == self.array.dtype

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Start and stop of the experts of the first level that are worked on at a time."""
        count = self.shape[0]
        step = max(1, min(count, _BLOCK // prod(self.shape[1:])))
        for start in range(0, count, step):
            yield start, min(start + step, count)

    def matrices(self) -> Iterator[Array]:
        """One expert's matrix (in, out) after the other."""
        for start, stop in self.blocks():
            block = self.block(start, stop)
            rows = self.backend.reshape(block, (-1, *self.shape[-2:]))
            for index in range(rows.shape[0]):
                yield rows[index]

    def operators(self) -> Iterator[Operator]:
        """One expert's matrix (in, out) after the other, as a product that is not carried out."""
        if self.taken or (self.inputs is None and self.outputs is None):
            for matrix in self.matrices():
                yield Operator((matrix,), self.backend)
            return
        for place, matrix in enumerate(self._bare.matrices()):
            parts = [matrix]
            if self.inputs is not None:
                root = self.inputs if self.inputs.ndim == 2 else self.inputs[place]
                parts.insert(0, self.backend.permute(root, (1, 0)))
            if self.outputs is not None:
                parts.append(self.outputs)
            yield Operator(tuple(parts), self.backend)

    def squared_norm(self) -> float:
        """The sum of squares."""
        return sum(_squares(self.block(*span), self.backend) for span in self.blocks())

    def contract(
        self,
        structure: Structure,
        plan: Callable[[Structure], tuple[Program, tuple[Leg, ...]]],
        factors: Mapping[str, Array],
        at_once: bool = False,
    ) -> Array:
        """A contraction of the tensor with factors, block by block.

        Args:
            structure: the network; its first open leg is the tensor's first axis.
            plan: the program for a structure, and the legs of its result.
            factors: by name.
            at_once: whether blocks save nothing, since the result is the largest array.
        """
        leg, count = structure.open_legs[0], self.shape[0]
        program, legs = plan(structure)
        roots = self._movable(structure, program, legs)
        if roots:
            return self._around(roots, structure, plan, factors, at_once)
        spans = [(0, count)] if self.plain and at_once else list(self.blocks())
        results = (self._part(structure, plan, factors, *span) for span in spans)
        if leg in legs:
            return joined(results, legs.index(leg), count, self.backend)
        total = next(results)
        for result in results:
            total = plus(total, result, self.backend)
        return total

    @property
    def _bare(self) -> Source:
        """The tensor whose inputs and outputs weigh alike."""
        return replace(self, inputs=None, outputs=None)

    def _movable(
        self, structure: Structure, program: Program, legs: tuple[Leg, ...]
    ) -> dict[Leg, Array]:
        """Roots by leg that factors or the result can be multiplied with instead of the tensor.

        Those are far smaller. None of them where one has to stay with the tensor.
        """
        sides = zip(structure.open_legs[-2:], (self.inputs, self.outputs), strict=True)
        roots = {leg: root for leg, root in sides if root is not None}
        used = [each.legs for each in program.operands if each.name != SOURCE]
        for leg, root in roots.items():
            holders = [each for each in (*used, legs) if leg in each]
            if len(holders) != 1 or not set(self._axes(structure, leg, root)) <= set(holders[0]):
                return {}
        return {} if self.taken else roots

    @staticmethod
    def _axes(structure: Structure, leg: Leg, root: Array) -> tuple[Leg, ...]:
        """The leg that a root is of, after that of the experts if each has its own."""
        return (leg,) if root.ndim == 2 else (structure.open_legs[0], leg)

    def _around(
        self,
        roots: Mapping[Leg, Array],
        structure: Structure,
        plan: Callable[[Structure], tuple[Program, tuple[Leg, ...]]],
        factors: Mapping[str, Array],
        at_once: bool,
    ) -> Array:
        """The contraction of the bare tensor with factors that roots were moved to."""
        backend, moved = self.backend, dict(factors)
        program, legs = plan(structure)

        def times(root: Array, array: Array, leg: Leg, its: tuple[Leg, ...]) -> Array:
            axes = tuple(its.index(each) for each in self._axes(structure, leg, roots[leg]))
            return along(root, array, axes, backend)

        for each in program.operands:
            for leg in (leg for leg in roots if leg in each.legs and each.name != SOURCE):
                moved[each.name] = times(roots[leg], moved[each.name], leg, each.legs)
        found = self._bare.contract(structure, plan, moved, at_once)
        for leg in (leg for leg in roots if leg in legs):
            found = times(_transposed(roots[leg], backend), found, leg, legs)
        return found

    def _part(
        self,
        structure: Structure,
        plan: Callable[[Structure], tuple[Program, tuple[Leg, ...]]],
        factors: Mapping[str, Array],
        start: int,
        stop: int,
    ) -> Array:
        """The contraction of experts ``start`` to ``stop`` of the first level."""
        program, _ = plan(_narrowed(structure, start, stop))
        arrays = _sliced(structure, factors, start, stop)
        arrays[SOURCE] = self.block(start, stop)
        return run(program, arrays, self.backend)


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


def _transposed(matrix: Array, backend: Backend) -> Array:
    """Rows and columns of a matrix, or of each of several, in turn."""
    return backend.permute(matrix, (1, 0) if matrix.ndim == 2 else (0, 2, 1))


def turned(array: Array, inputs: Array | None, outputs: Array | None, backend: Backend) -> Array:
    """Rᵀ X Q of matrices X (…, in, out) and lower triangular roots; R of all, or (N, in, in).

    Large ones are cut into strips, so that what is zero is not multiplied: nearly half.
    """
    xp = backend.namespace
    if inputs is not None:
        root = _transposed(inputs, backend)
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
    """:func:`power`, or 1 where squares of numbers up to ``largest`` are in no danger."""
    found = power(largest, bits)
    return found if abs(frexp(found)[1]) > _SAFE[bits] else 1.0


def norm(array: Array, backend: Backend) -> float:
    """The Frobenius norm, of numbers of any scale."""
    (found,) = norms(backend.reshape(array, (1, -1, array.shape[-1])), backend)
    return found


def norms(array: Array, backend: Backend) -> list[float]:
    """The Frobenius norms of matrices (…, rows, columns), each of any scale."""
    xp, info = backend.namespace, backend.namespace.finfo(array.dtype)
    matrices = backend.reshape(array, (-1, *array.shape[-2:]))
    rows = backend.square_sums(backend.reshape(array, (-1, array.shape[-1])))
    squares = xp.sum(backend.reshape(rows, (-1, array.shape[-2])), axis=-1)
    # less may lack squares that are rounded to zero
    least = prod(array.shape[-2:]) * float(info.smallest_normal) / float(info.eps)
    found = []
    for index, total in enumerate(to_host(squares, backend).tolist()):
        scale = 1.0
        if not least <= total < inf:
            matrix = matrices[index]
            scale = power(float(xp.max(xp.abs(matrix))), info.bits)
            total = _squares(matrix * scale, backend)
        found.append(sqrt(total) / scale)
    return found


def _narrowed(structure: Structure, start: int, stop: int) -> Structure:
    """The network of experts ``start`` to ``stop`` of the first level."""
    leg = structure.open_legs[0]
    sizes = tuple((k, stop - start if k == leg else n) for k, n in structure.size_items)
    return replace(structure, size_items=sizes)


def _sliced(
    structure: Structure, factors: Mapping[str, Array], start: int, stop: int
) -> dict[str, Array]:
    """The factors of experts ``start`` to ``stop`` of the first level."""
    leg = structure.open_legs[0]
    found = {}
    for factor in structure.factors:
        array = factors[factor.name]
        if leg in factor.legs:
            axis = (slice(None),) * factor.legs.index(leg)
            array = array[(*axis, slice(start, stop))]
        found[factor.name] = array
    return found


def joined(parts: Iterable[Array], axis: int, count: int, backend: Backend) -> Array:
    """Parts side by side along an axis of ``count`` entries, held twice only where they must be."""
    listed = iter(parts)
    first = next(listed)
    if first.shape[axis] == count:
        return first
    if not backend.eager:
        return backend.namespace.concat([first, *listed], axis=axis)
    shape = tuple(count if k == axis else size for k, size in enumerate(first.shape))
    options: Any = {"dtype": first.dtype, "device": device_of(first)}
    whole = backend.namespace.zeros(shape, **options)
    start = 0
    for part in chain((first,), listed):
        stop = start + part.shape[axis]
        whole[(*(slice(None),) * axis, slice(start, stop))] = part
        start = stop
    return whole


def run(program: Program, arrays: Mapping[str, Array], backend: Backend) -> Array:
    """A program's result for operands by name."""
    operands = [arrays[operand.name] for operand in program.operands]
    return execute(program, operands, backend)[0][0]


def _squares(array: Array, backend: Backend) -> float:
    rows = backend.reshape(array, (-1, array.shape[-1]))
    return float(backend.namespace.sum(backend.square_sums(rows)))

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


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor (experts…, in, out).

    Args:
        array: in any floating-point dtype; its work is done in float32 at least.
        backend: adapter of its library.
        bias: (experts…, out), one more row of every matrix, if any.
        inputs: R, of the input's size, if inputs weigh differently: the tensor stands for Rᵀ times
            itself; (experts₀, …, …) where those of every expert do.
        weights: (experts₀,) of the first level, if experts weigh differently.
        outputs: Q, of the output's size, if outputs weigh differently: itself times Q.
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
        if self.inputs is not None:
            if self.inputs.ndim == 2:
                turned = self.backend.permute(self.inputs, (1, 0))
            else:
                turned = self.backend.permute(self.inputs[start:stop], (0, 2, 1))
            found = self.backend.matmul(turned, found)
        if self.outputs is not None:
            found = self.backend.matmul(found, self.outputs)
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
        _, legs = plan(structure)
        spans = [(0, count)] if self.plain and at_once else list(self.blocks())
        results = (self._part(structure, plan, factors, *span) for span in spans)
        if leg in legs:
            return joined(results, legs.index(leg), count, self.backend)
        total = next(results)
        for result in results:
            total = plus(total, result, self.backend)
        return total

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

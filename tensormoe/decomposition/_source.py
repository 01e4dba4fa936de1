"""The tensor that is decomposed, read a few experts at a time, widened and weighted on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

from tensormoe.backend import Array, Backend, device_of
from tensormoe.decomposition._contractions import SOURCE, Structure, plan_whole
from tensormoe.decomposition._matrices import Operator, along, transposed, turned
from tensormoe.decomposition._norms import scaling, squares
from tensormoe.execution import execute, plus
from tensormoe.factorizations import Leg
from tensormoe.functional._dtypes import widened
from tensormoe.planning import Program

# entries of a block; larger ones are no faster, and what is made of them costs memory
_BLOCK = 2**17


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

    def kept(self) -> Source:
        """The same tensor as an array, in the dtype that the work is done in."""
        blocks = (self.block(*span) for span in self.blocks())
        return Source(joined(blocks, 0, self.shape[0], self.backend), self.backend)

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
        return sum(squares(self.block(*span), self.backend) for span in self.blocks())

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
            found = times(transposed(roots[leg], backend), found, leg, legs)
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

"""Runs programs, forward and reverse, through a backend's primitives.

Nothing here plans: a step already knows its views. The loop holds no reference that it does not
need, so that memory is released as the cost model predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

from tensormoe.backend import Array, Backend, Groups, device_of
from tensormoe.planning._program import Program, Step

__all__ = ["execute", "plus"]


def execute(
    program: Program, arrays: list[Array], backend: Backend, keep: Collection[int] = ()
) -> tuple[tuple[Array, ...], dict[int, Array]]:
    """Run a program.

    Args:
        program: the steps to run.
        arrays: the operands in slot order, data with their leading axes merged into one. The
            list is emptied, so that an array nobody else holds is freed at its last use.
        backend: the adapter of the arrays' library.
        keep: slots to return besides the outputs, for a reverse program.

    Returns:
        The outputs, and the kept slots.
    """
    slots: dict[int, Array] = dict(enumerate(arrays))
    arrays.clear()
    kept = {slot: slots[slot] for slot in keep if slot in slots}
    # asked once: programs run often, and checks of protocols are slow
    multiply = getattr(backend, "matmul_stored", None)
    for step in program.steps:
        operands = [slots[slot] for slot in step.inputs]
        stored = multiply is not None and step.kind in _PRODUCTS
        transposed = [False, False]
        for k, view in enumerate(step.views):
            if view.shape is not None:
                operands[k] = backend.reshape(operands[k], view.shape)
            if stored and view.axes == (1, 0):
                transposed[k] = True
            elif view.axes is not None:
                operands[k] = backend.permute(operands[k], view.axes)
        if multiply is not None and True in transposed:
            result = multiply(operands[0], operands[1], tuple(transposed))
        elif step.in_place and step.inputs[0] not in kept:
            result = plus(operands[0], operands[1], backend)
        else:
            result = _RUN[step.kind](program, step, operands, backend)
        operands.clear()
        if step.shape is not None:
            result = backend.reshape(result, step.shape)
        for slot in step.free:
            del slots[slot]
        slots[step.output] = result
        if step.output in keep:
            kept[step.output] = result
    return tuple([slots[slot] for slot in program.outputs]), kept


def plus(own: Array, other: Array, backend: Backend) -> Array:
    """The sum, in the memory of ``own``, which nobody else holds, where the library runs eagerly.

    Transformations of a traced library may not see writes into an array.
    """
    if not backend.eager:
        return own + other
    own += other
    return own


def _matmul(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    return backend.matmul(operands[0], operands[1])


def _multiply(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    return operands[0] * operands[1]


def _add(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    return operands[0] + operands[1]


def _permute(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    return backend.contiguous(operands[0])


def _reduce(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    axes = tuple(k for k, leg in enumerate(step.input_legs[0]) if leg not in step.legs)
    return backend.sum(operands[0], axes)


def _expand(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    known = iter(operands[0].shape)
    shape = [next(known) if leg in step.input_legs[0] else None for leg in step.legs]
    ones = backend.reshape(operands[0], tuple(1 if size is None else size for size in shape))
    full = tuple(
        program.sizes[leg] if size is None else size
        for leg, size in zip(step.legs, shape, strict=True)
    )
    return backend.namespace.broadcast_to(ones, full)


def _gather(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    array, indices, _ = _flattened(program, step, operands, backend, step.input_legs[0])
    return backend.take(array, indices, step.axis)


def _scatter(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    values, indices, size = _flattened(program, step, operands, backend, step.legs)
    total = backend.scatter_add(values, indices, step.axis, size)
    return backend.reshape(total, tuple(program.sizes[leg] for leg in step.legs))


def _grouped(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    # planned for backends that have it; checks of protocols are slow
    made: Array = cast(Groups, backend).grouped_matmul(*operands)
    return made


def _outer(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    # rows that meet no matrix come last, and have no part in a sum
    counts = operands[2][: program.sizes[step.legs[0]]]
    made: Array = cast(Groups, backend).grouped_outer(operands[0], operands[1], counts)
    return made


def _eye(program: Program, step: Step, operands: list[Array], backend: Backend) -> Array:
    (like,) = operands
    size = program.sizes[step.legs[0]]
    return backend.namespace.eye(size, dtype=like.dtype, device=device_of(like))


def _flattened(
    program: Program,
    step: Step,
    operands: list[Array],
    backend: Backend,
    stored: Sequence[str],
) -> tuple[Array, Array, int]:
    """Several neighbouring indexed modes of a factor as one mode and one flat index."""
    array, *indices = operands
    axis, count = step.axis, len(operands) - 1
    sizes = [program.sizes[leg] for leg in stored[axis : axis + count]]
    flat, size = indices[0], sizes[0]
    for index, more in zip(indices[1:], sizes[1:], strict=True):
        left = (*flat.shape, *(1,) * (index.ndim - 1))
        right = (index.shape[0], *(1,) * (flat.ndim - 1), *index.shape[1:])
        flat = backend.reshape(flat, left) * more + backend.reshape(index, right)
        size *= more
    if step.kind == "gather" and count > 1:
        known = [program.sizes[leg] for leg in stored]
        array = backend.reshape(array, (*known[:axis], size, *known[axis + count :]))
    return array, flat, size


_PRODUCTS = ("linear", "matmul")
_Run = Callable[[Program, Step, list[Array], Backend], Array]
_RUN: Mapping[str, _Run] = {
    "linear": _matmul,
    "matmul": _matmul,
    "grouped": _grouped,
    "outer": _outer,
    "multiply": _multiply,
    "add": _add,
    "permute": _permute,
    "reduce": _reduce,
    "expand": _expand,
    "gather": _gather,
    "scatter": _scatter,
    "eye": _eye,
}

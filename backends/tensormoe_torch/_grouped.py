"""Products of rows that are sorted by expert, each expert's rows with its matrix.

Eagerly they are PyTorch's own grouped product, or one product per expert where that does not take
the dtype or the sizes. Compilers get ``torch.ops.tensormoe.grouped_matmul`` and ``grouped_outer``,
which run the same and are each other's derivatives: a compiler cannot follow one product per
expert, since it does not know how many rows each will have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# one call for all experts, in releases from 2.10 on
_GROUPED: Any = getattr(F, "grouped_mm", None)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16


def grouped_matmul(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """One product per expert: (rows, in), (N, in, out), (N,) → (rows, out).

    With counts of one more entry, so many rows at the end meet no matrix, and give zeros.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = _matmul(rows, matrices, counts)
        return compiled
    return _products(rows, matrices, counts)


def grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Sums of outer products over each expert's rows: (rows, in), (rows, out) → (N, in, out)."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _outer(left, right, counts)
        return compiled
    return _outers(left, right, counts)


def _products(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    experts = len(matrices)
    if _fits(rows, *matrices.shape[1:]):
        ends = _offsets(counts[:experts])
        # gradients of sums are rows that lie on one another in memory
        made: Tensor = _GROUPED(rows.contiguous(), _by_lines(matrices), offs=ends)
        if len(counts) == experts:
            return made
        behind = torch.arange(len(rows), device=rows.device) >= ends[-1]
        # nobody has written there
        return made.masked_fill(behind[:, None], 0.0)
    if not (torch.is_grad_enabled() and (rows.requires_grad or matrices.requires_grad)):
        return _written(rows, matrices, counts)
    parts = [
        rows[some] @ matrices[expert]
        for expert, some in _groups(counts)
        if some is not None and expert < experts
    ]
    left = len(rows) - sum(len(part) for part in parts)
    parts += [rows.new_zeros((left, matrices.shape[2]))] if left or not parts else []
    return torch.cat(parts)


def _written(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """The same without gradients: every product where its rows of the result are."""
    made, end = rows.new_empty((len(rows), matrices.shape[2])), 0
    for expert, some in _groups(counts[: len(matrices)]):
        if some is not None:
            torch.mm(rows[some], matrices[expert], out=made[some])
            end = some.stop
    made[end:].zero_()
    return made


def _outers(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        empty = left.new_zeros((left.shape[1], right.shape[1]))
        return torch.stack(
            [empty if some is None else left[some].T @ right[some] for _, some in _groups(counts)]
        )
    if _fits(left, left.shape[1], right.shape[1]):
        own: Tensor = _GROUPED(left.contiguous().T, right.contiguous(), offs=_offsets(counts))
        return own
    made = left.new_empty((counts.shape[0], left.shape[1], right.shape[1]))
    for expert, some in _groups(counts):
        if some is None:
            made[expert].zero_()
        else:
            torch.mm(left[some].T, right[some], out=made[expert])
    return made


def _fits(rows: Tensor, *sizes: int) -> bool:
    """Whether PyTorch's own grouped product takes such operands.

    It wants rows that begin at multiples of 16 bytes.
    """
    aligned = all(size * rows.dtype.itemsize % _ALIGNMENT == 0 for size in sizes)
    return _GROUPED is not None and rows.dtype in _DTYPES and aligned and len(rows) > 0


def _by_lines(matrices: Tensor) -> Tensor:
    """Matrices whose rows or columns lie in memory as lines: what a factor gives may have none."""
    *outer, row, column = matrices.stride()
    size = matrices.dtype.itemsize
    for line, step in ((row, column), (column, row)):
        if line == 1 and all(each * size % _ALIGNMENT == 0 for each in (*outer, step)):
            return matrices
    return matrices.contiguous()


def _offsets(counts: Tensor) -> Tensor:
    """Ends of each expert's rows."""
    return counts.cumsum(0).to(torch.int32)


def _groups(counts: Tensor) -> Iterator[tuple[int, slice | None]]:
    """Every expert with its rows; None for those that have none."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        yield expert, slice(start, start + count) if count else None
        start += count


@torch.library.custom_op("tensormoe::grouped_matmul", mutates_args=())
def _matmul(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return _products(rows, matrices, counts)


@torch.library.custom_op("tensormoe::grouped_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return _outers(left, right, counts)


@_matmul.register_fake
def _(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], matrices.shape[2]))


@_outer.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty((counts.shape[0], left.shape[1], right.shape[1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, matrices, counts = ctx.saved_tensors
    by_rows, by_matrices, _ = ctx.needs_input_grad
    return (
        _matmul(cotangent, matrices.mT, counts) if by_rows else None,
        _outer(rows, cotangent, counts[: len(matrices)]) if by_matrices else None,
        None,
    )


def _outer_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, counts = ctx.saved_tensors
    by_left, by_right, _ = ctx.needs_input_grad
    return (
        _matmul(right, cotangent.mT, counts) if by_left else None,
        _matmul(left, cotangent, counts) if by_right else None,
        None,
    )


_matmul.register_autograd(_matmul_backward, setup_context=_save)
_outer.register_autograd(_outer_backward, setup_context=_save)

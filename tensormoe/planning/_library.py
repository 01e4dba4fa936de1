"""Properties of an array library that decide on the memory and the steps of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Convolutions = Literal["", "shared", "each"]
"""Convolutions of a library: none, with kernels of all images, or also with kernels of each."""


@dataclass(frozen=True)
class Library:
    """Properties of an array library that peak memory and steps depend on.

    The defaults are those of NumPy, but for the row blocks.

    Args:
        row_block_bytes: largest slice of rows that a gate works on at once, of the backend; None
            for all rows at once.
        copies_transposed: whether a transposed first operand of a large product is copied.
        packs: columns of the second operand of a large product of two matrices that are copied at
            a time where their entries lie apart; 0 for none.
        buffers: most entries of the buffer for an operand that an elementwise step repeats; 0 for
            none.
        merges_batch_axes: whether a product with several batch axes makes one of them first, which
            copies operands where they do not follow one another in memory.
        frees_saved: whether the backward pass frees saved arrays after their last use, as that of
            libraries with automatic differentiation does.
        keeps_input: whether the derivative of a block's activation is computed from its input, and
            not from its result, as a library may do for relu and tanh.
        holds_coefficients: whether coefficients live until a forward call ends, since the call of
            a module holds its arguments.
        sums_rows: whether rows of a table are weighted and summed at once, without a copy of them.
        convolves: the convolutions that its backend has (:class:`tensormoe.backend.Convolves`):
            none (""), with kernels that all images share ("shared"), or also with kernels of each
            image ("each").
    """

    row_block_bytes: int | None = None
    copies_transposed: bool = False
    packs: int = 0
    buffers: int = 0
    merges_batch_axes: bool = False
    frees_saved: bool = False
    keeps_input: bool = True
    holds_coefficients: bool = False
    sums_rows: bool = False
    convolves: Convolutions = ""


DEFAULT = Library()

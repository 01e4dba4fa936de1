"""Memory of a gate's temporaries on a library that runs eagerly."""

from __future__ import annotations

from tensormoe.gates._gate import Gate
from tensormoe.gates._rows import block_rows


def workspace(
    gate: Gate,
    rows: int,
    experts: int,
    itemsize: int,
    row_block_bytes: int | None,
    *,
    backward: bool = False,
) -> int:
    """Bytes at the peak of :func:`activate` or :func:`activate_vjp`, result included.

    Counted are the arrays of one block of rows, the result, which is an array of its own once there
    is more than one block, some vectors with one entry per row, and the buffer by which NumPy
    broadcasts one. Arguments are not counted. Logits are unmasked, finite and roughly normal.

    Args:
        gate: the gate, whose activation and normalization decide on the temporaries.
        rows: tokens, all leading axes multiplied.
        experts: logits per token.
        itemsize: bytes of one logit in at least float32, hence 4 or 8.
        row_block_bytes: largest block of rows that the library works on at once; None for all.
        backward: whether it is the gradient that is computed.

    Example:
        >>> workspace(Gate(), 1024, 1024, 4, 256 * 1024) / (1024 * 1024 * 4)
        1.07086181640625
    """
    block = block_rows(rows, experts, itemsize, row_block_bytes)
    arrays, flags, whole = _backward_arrays(gate) if backward else _forward_arrays(gate)
    whole += block < rows
    entries = block * experts
    small = itemsize * (_VECTORS * block + min(_BUFFER, entries))
    return (arrays * itemsize + flags) * entries + small + whole * itemsize * rows * experts


# vectors of a block that are alive at once, and entries that NumPy buffers at most
_VECTORS, _BUFFER = 9, 8192


# what is alive at once: floating-point and boolean arrays of a block, and arrays of all rows


def _forward_arrays(gate: Gate) -> tuple[int, int, int]:
    if gate.activation == "relu_top_k":
        return 2 + {None: 0, "batch": 1, "layer": 2}[gate.normalization], 2, 0
    if gate.normalization == "layer" and gate.effective_alpha == 1.5:
        return 1, 0, 0
    if gate.activation == "entmax" and gate.alpha not in (1.0, 1.5, 2.0):
        return 7, 2, 0
    return {"sparsemax": (3, 2, 0), "top_k": (4, 1, 0)}.get(gate.activation, (3, 0, 0))


def _backward_arrays(gate: Gate) -> tuple[int, int, int]:
    if gate.normalization == "batch":
        return 5, 1, 1
    smooth = gate.normalization == "layer" and gate.effective_alpha in (1.0, 1.5)
    return 3, 0 if smooth else 1, 0

"""The cores of a ring whose experts are all the same matrix."""

from __future__ import annotations

from typing import Any

from tensormoe.backend import Array, Backend, device_of
from tensormoe.factorizations._base import Split, tiled_columns


def shared_ring(
    experts: tuple[int, ...], bonds: tuple[int, ...], table: Array, split: Split, backend: Backend
) -> dict[str, Array]:
    """Cores by name with tr(C₁[n₁] ⋯ C_E[n_E] C_in[i] C_out[o]) the same matrix for all n.

    The expert cores pass m = min(r₀, …, r_E) channels on, so the matrix may have rank m·s for a
    bond of size s between input and output. Where a bond is larger than m, its entries
    k, k + m, k + 2m, … share channel k: on the input's and the output's bonds each of them owns a
    part of the s components, so that no two are alike.

    Args:
        experts: one size per level.
        bonds: (r₀, …, r_E, s), as a tensor ring takes them.
        table: the matrix (rows, out).
        split: gives the best product of an inner size.
        backend: adapter of the arrays' library.
    """
    xp = backend.namespace
    *outer, inner = bonds
    channels = min(outer)
    left, right = split(channels * inner)
    rows, columns = table.shape
    # neighbours in the order of singular values sit in different channels, which are then about
    # equally strong
    left = backend.permute(backend.reshape(left, (rows, inner, channels)), (0, 2, 1))
    right = backend.reshape(backend.permute(right, (1, 0)), (columns * inner, channels))
    right = backend.reshape(tiled_columns(right, outer[0], xp), (columns, inner, outer[0]))
    stored = {
        "input": tiled_columns(left, outer[-1], xp) * _owned(outer[-1], channels, inner, table, xp),
        "output": right * backend.permute(_owned(outer[0], channels, inner, table, xp), (1, 0)),
    }
    for level, count in enumerate(experts):
        before, after = outer[level], outer[level + 1]
        core = _passing(before, after, channels, table, xp)
        # a bond between two expert modes is summed over: its entries share the channel's strength
        if level > 0:
            core = core / _shares(before, channels, table, xp)[:, None]
        if level < len(experts) - 1:
            core = core / _shares(after, channels, table, xp)[None, :]
        stored[f"expert_{level}"] = xp.broadcast_to(core, (count, before, after))
    return stored


def _passing(rows: int, columns: int, channels: int, like: Array, xp: Any) -> Array:
    """Ones where both bonds carry the same channel."""
    row, column = (xp.arange(size, device=device_of(like)) for size in (rows, columns))
    same = (row % channels)[:, None] == (column % channels)[None, :]
    return xp.astype(same, like.dtype)


def _counts(size: int, channels: int, like: Array, xp: Any) -> Array:
    """For each entry of a bond, how many entries carry its channel."""
    channel = xp.arange(size, device=device_of(like)) % channels
    return (size - 1 - channel) // channels + 1


def _shares(size: int, channels: int, like: Array, xp: Any) -> Array:
    return xp.sqrt(xp.astype(_counts(size, channels, like, xp), like.dtype))


def _owned(size: int, channels: int, inner: int, like: Array, xp: Any) -> Array:
    """(size, inner): ones where an entry of a bond owns a component of its channel."""
    place = xp.arange(size, device=device_of(like)) // channels
    component = xp.arange(inner, device=device_of(like))
    counts = _counts(size, channels, like, xp)
    return xp.astype((component[None, :] % counts[:, None]) == place[:, None], like.dtype)

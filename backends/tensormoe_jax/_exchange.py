"""Slices of both halves of an axis, from one contiguous slice of it per device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["exchanged", "rounds"]


def exchanged(array: Array, axis: int, name: str) -> Array:
    """A device's slices of both halves of an axis.

    A ``PartitionSpec`` gives each device one contiguous slice of an axis. In a gated block, a
    device multiplies its slice of one half of the hidden features by that of the other half. So
    factors of the first layer are exchanged, two slices per device, and no activations.

    Args:
        array: the contiguous slice.
        axis: whose halves are meant.
        name: of the mesh axis.

    Returns:
        The slice of the first half, with that of the second behind it.
    """
    devices = jax.lax.axis_size(name)
    if devices == 1:
        return array
    position = jax.lax.axis_index(name)
    # whole array: 2 P pieces; device d holds 2 d and 2 d + 1, and needs d and P + d
    pieces = jnp.stack(jnp.split(array, 2, axis=axis))
    received = []
    for sent in rounds(devices):
        by_source = {piece // 2: piece for piece in sent}
        chosen = jnp.array([by_source[device] % 2 for device in range(devices)])[position]
        piece = jax.lax.dynamic_index_in_dim(pieces, chosen, keepdims=False)
        pairs = [(each // 2, each % devices) for each in sent]
        received.append(jax.lax.ppermute(piece, name, pairs))  # type: ignore[no-untyped-call]
    first = {piece % devices: piece for piece in rounds(devices)[0]}
    is_second = jnp.array([first[device] >= devices for device in range(devices)])[position]
    one, other = received
    halves = jnp.where(is_second, other, one), jnp.where(is_second, one, other)
    return jnp.concatenate(halves, axis=axis)


def rounds(devices: int) -> tuple[list[int], list[int]]:
    """Pieces that devices send in two rounds, in each of which they send and receive one.

    >>> rounds(2)
    ([0, 3], [2, 1])
    """
    found: tuple[list[int], list[int]] = ([], [])
    for start in range(2 * devices):
        piece = start
        while piece not in found[0] and piece not in found[1]:
            other = (piece + devices) % (2 * devices)  # which goes to the same device
            found[0].append(piece)
            found[1].append(other)
            piece = other ^ 1  # which comes from the same device as that one
    return found

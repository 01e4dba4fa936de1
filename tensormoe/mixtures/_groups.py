"""Router outputs that share an expert, since experts were merged."""

from __future__ import annotations

from collections.abc import Sequence

from tensormoe._validation import brief
from tensormoe.backend import Array, Backend, default_integer, device_of
from tensormoe.errors import SpecError


def checked_groups(groups: Sequence[int], experts: int) -> tuple[int, ...]:
    """Groups as a tuple: the expert behind each of the router's outputs.

    Raises:
        SpecError: not numbers of these experts, or an expert that no output leads to.
    """
    given: object = groups
    found = tuple(groups) if isinstance(given, list | tuple) else ()
    if not found or not all(type(each) is int and 0 <= each < experts for each in found):
        raise SpecError(
            f"groups must be a number of an expert, 0 to {experts - 1}, for each of the router's "
            f"outputs; got {brief(groups)}."
        )
    reached = {*found}
    if len(reached) < experts:
        absent = next(each for each in range(experts) if each not in reached)
        raise SpecError(
            f"groups must lead to every expert; none of the router's {len(found)} outputs leads to "
            f"expert {absent}. Leave that expert out."
        )
    return found


def grouped_index(index: Array, groups: Sequence[int], backend: Backend) -> Array:
    """The experts behind choices of the router.

    A token two of whose choices lead to one expert gets it with the sum of their weights.

    Args:
        index: (tokens, k) numbers of the router's outputs.
        groups: the expert behind each output.
        backend: the adapter of the index's library.
    """
    xp = backend.namespace
    table = xp.asarray(groups, dtype=default_integer(xp), device=device_of(index))
    flat = backend.take(table, backend.reshape(index, (-1,)), 0)
    return backend.reshape(flat, tuple(index.shape))

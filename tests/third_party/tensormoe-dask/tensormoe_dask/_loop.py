"""A loop as one task for each chunk, so that graphs don't grow with its steps."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.core import get_dependencies, toposort
from dask.highlevelgraph import HighLevelGraph

from tensormoe.backend import State, Step

__all__ = ["while_loop"]

Key = Hashable
Keys = list[Key]


def while_loop(step: Step, state: State, max_steps: int, tolerance: float) -> State:
    """One step is recorded, and its tasks run again and again inside a task.

    They may read values there, and end early. A step that does not work on each chunk by itself is
    recorded as often as it runs.
    """
    first, chunks = state[0], state[0].chunks
    holes = [_hole(each, f"hole-{k}-{first.name}") for k, each in enumerate(state)]
    after, change = step(*holes)
    ends = (*after, change)
    layers = HighLevelGraph.merge(*(each.dask for each in (*state, *ends)))
    graph = dict(layers)
    loops = None
    if all(each.chunks == chunks for each in (*state, *ends)):
        loops = _loops(graph, holes, ends, max_steps, tolerance)
    if loops is None:
        for _ in range(max_steps):
            state, _ = step(*state)
        return state
    name = "while-loop-" + tokenize(*(each.name for each in (*state, *ends)), max_steps, tolerance)
    tasks = {
        (name, *place): (loop, [(each.name, *place) for each in state], loop.outside)
        for place, loop in loops.items()
    }
    # every layer that the loop reads, or Dask's optimization could melt it into another one
    owner = {key: layer for layer, keys in layers.layers.items() for key in keys}
    used = {key for _, begin, outside in tasks.values() for key in (*begin, *outside)}
    wired = HighLevelGraph(
        {**layers.layers, name: tasks}, {**layers.dependencies, name: {owner[key] for key in used}}
    )
    found = da.Array(wired, name, chunks, dtype=object)
    return tuple(
        found.map_blocks(itemgetter(k), dtype=each.dtype, meta=each._meta)
        for k, each in enumerate(state)
    )


@dataclass(frozen=True)
class _Loop:
    """The tasks of a step for one chunk, and the keys by which they are wired."""

    tasks: Mapping[Key, Any]
    starts: Keys
    ends: Keys
    outside: Keys
    max_steps: int
    tolerance: float

    def __call__(self, state: list[np.ndarray], given: list[np.ndarray]) -> list[np.ndarray]:
        known = {**self.tasks, **dict(zip(self.outside, given, strict=True))}
        for _ in range(self.max_steps):
            wired = {**known, **dict(zip(self.starts, state, strict=True))}
            *state, change = dask.get(wired, self.ends)
            if np.max(change, initial=0.0) <= self.tolerance:
                break
        return state


def _loops(
    graph: Mapping[Key, Any],
    holes: Iterable[da.Array],
    ends: Iterable[da.Array],
    max_steps: int,
    tolerance: float,
) -> dict[tuple[int, ...], _Loop] | None:
    """A loop for every chunk; ``None`` where one needs the state of another."""
    needs = {key: get_dependencies(graph, key) for key in graph}
    numbers = [range(len(sizes)) for sizes in next(iter(ends)).chunks]
    places = list(product(*numbers))
    starts = {place: [(hole.name, *place) for hole in holes] for place in places}
    # the chunks whose state a task depends on
    reach: dict[Key, set[tuple[int, ...]]] = {k: {p} for p in places for k in starts[p]}
    for key in toposort(graph, needs):
        reach.setdefault(key, set().union(*(reach[each] for each in needs[key])))
    loops = {}
    for place in places:
        last: Keys = [(end.name, *place) for end in ends]
        inside = _inside(last, needs, reach, starts[place])
        if any(reach[key] != {place} for key in inside):
            return None
        used = {each for key in inside for each in needs[key]} | set(last)
        outside = [key for key in used - set(inside) if not reach[key]]
        tasks = {key: graph[key] for key in inside}
        loops[place] = _Loop(tasks, starts[place], last, outside, max_steps, tolerance)
    return loops


def _inside(
    last: Keys,
    needs: Mapping[Key, Collection[Key]],
    reach: Mapping[Key, Collection[Any]],
    starts: Keys,
) -> Keys:
    """The tasks between one state and the next."""
    found: dict[Key, None] = {}
    left = [*last]
    while left:
        key = left.pop()
        if key not in found and key not in starts and reach[key]:
            found[key] = None
            left.extend(needs[key])
    return [*found]


def _hole(like: da.Array, name: str) -> da.Array:
    """An array without values, in whose place the state of a step comes."""
    tasks = {(name, *key[1:]): None for key in dask.core.flatten(like.__dask_keys__())}
    layers = HighLevelGraph.from_collections(name, tasks, dependencies=[])
    return da.Array(layers, name, like.chunks, meta=like._meta)

"""Random layers, and their programs by other rules than the planner's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import exp, log, prod
from typing import Any, cast
from unittest import mock

from opt_einsum.paths import DynamicProgramming

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.planning import Program, _draft, _path, _regimes
from tensormoe.planning._cost import batch_sizes, program_cost
from tensormoe.planning._path import Node

KINDS = (
    *(CP(1), TensorRing(1), TensorTrain(1), Tucker(1), Hadamard()),
    *(SharedBasis(1), BaseDelta(1), SharedDelta(1), Dense()),
)
MOST_EXPERTS = {1: 512, 2: 32, 3: 10}

Layer = tuple[LayerSpec, int]


def layers(count: int, seed: int = 0) -> Iterator[Layer]:
    """Layers with a batch: one to three levels, every size drawn evenly by its logarithm.

    Layers of more than 16 million parameters, and calls of less than 10⁴ or more than 10⁹ FLOPs,
    are drawn again.
    """
    rng = random.Random(seed)

    def size(least: int, most: int) -> int:
        return round(exp(rng.uniform(log(least), log(most))))

    made = 0
    while made < count:
        kind = KINDS[made % len(KINDS)]
        levels = rng.choice((1, 2, 3))
        features = size(16, 1024), size(16, 1024)
        experts = tuple(size(2, MOST_EXPERTS[levels]) for _ in range(levels))
        largest = 1024 if isinstance(kind, CP) else 96
        kind = kind.with_rank(tuple(size(2, largest) for _ in kind.rank_pattern(levels)))
        batch = size(1, 2048)
        spec = LayerSpec(*features, experts, kind, bias=rng.random() < 0.5)
        if spec.num_parameters <= 16e6:
            cost = spec.cost(batch)
            if 1e4 < cost.flops < 1e9 and cost.peak_memory < 256e6:
                made += 1
                yield spec, batch


def planned(layer: Layer) -> Program:
    """The planner's program."""
    return _regimes.batch_program(layer[0].network, layer[1])


@contextmanager
def weight(value: int) -> Iterator[None]:
    """The planner with another weight of entries that are written."""
    with (
        mock.patch.object(_path, "WRITE_WEIGHT", value),
        mock.patch.object(_regimes, "WRITE_WEIGHT", value),
        mock.patch.object(_draft, "WRITE_WEIGHT", value),
    ):
        yield


@contextmanager
def fewest_flops() -> Iterator[None]:
    """The planner with opt_einsum's exact search for the fewest FLOPs, outer products included.

    Within 0.5 % of its ``optimal``, which takes a hundred times as long.
    """
    with (
        mock.patch.object(_regimes, "search_tree", _fewest),
        mock.patch.object(_regimes, "tree_cost", _tree_flops),
        weight(0),
    ):
        yield


def _fewest(
    operands: Sequence[Sequence[str]], output: Sequence[str], sizes: Mapping[str, int]
) -> Node:
    legs = [tuple(each) for each in operands]
    if len(legs) == 1:
        return Node(frozenset(legs[0]), 0)
    search = DynamicProgramming(minimize="flops", search_outer=True)
    path = search(cast(Any, legs), cast(Any, tuple(output)), dict(sizes))
    return _path._tree_of(legs, tuple(tuple(pair) for pair in path), output)


def _tree_flops(node: Node, sizes: Mapping[str, int], weight: int) -> tuple[int, int]:
    """Constant and slope, over the batch, of a tree's FLOPs: sums take an addition per product."""
    if not node.children:
        return 0, 0
    left, right = node.children
    touched = left.legs | right.legs
    work = (2 if touched - node.legs else 1) * prod(sizes[leg] for leg in touched if leg != "b")
    below = [_tree_flops(child, sizes, weight) for child in node.children]
    const, slope = (sum(pair) for pair in zip(*below, strict=True))
    return (const, slope + work) if "b" in touched else (const + work, slope)


def flops(program: Program, batch: int) -> int:
    """FLOPs of a program."""
    steps = program_cost(program, batch_sizes(program, batch))
    return sum(step.matmul_flops + step.elementwise_flops for step in steps)


def operands(program: Program, batch: int, rng: Any) -> list[Any]:
    """Random arrays for a program."""
    sizes = batch_sizes(program, batch)
    shapes = [[sizes[leg] for leg in operand.legs] for operand in program.operands]
    return [rng.standard_normal(shape, dtype="float32") for shape in shapes]


@contextmanager
def apart() -> Iterator[None]:
    """The planner without plans that multiply the coefficients of all levels out first."""

    def plain(network: Any, routing: Any) -> list[Any]:
        return [_draft.Draft(network, routing)]

    with mock.patch.object(_regimes, "_drafts", plain):
        yield


def path_of(program: Program) -> object:
    """Pairs of operands that a program contracts, whatever the order of steps and legs."""
    steps = ((*sorted(map(sorted, step.input_legs)), sorted(step.legs)) for step in program.steps)
    return tuple(sorted(map(str, steps)))

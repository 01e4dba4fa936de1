"""Experts of groups averaged, and put where the old ones were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensormoe.compression import ExpertGroups, merge_stacks
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._put import dense_layers, put_experts, sparse_parent
from tensormoe_torch.compression._reduce_report import ReducedModule
from tensormoe_torch.compression._samples import Samples, output_squares, watched
from tensormoe_torch.surgery._inputs import evaluating, run_model
from tensormoe_torch.surgery._replace import at


@dataclass(frozen=True, eq=False)
class Grouped:
    """The experts of a layer, and which of them become one.

    Args:
        source: all of them.
        groups: of them.
        frequencies: how often each was chosen.
    """

    source: DenseExperts
    groups: ExpertGroups
    frequencies: tuple[float, ...]


def merge(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    layers: Sequence[Grouped],
    align: bool,
    batches: list[Any],
    tell: Callable[[int], None],
) -> tuple[ReducedModule, ...]:
    """Merge experts, compare their outputs, then put them where the old ones were.

    Args:
        model: it holds them.
        chosen: the modules of experts by name.
        layers: their groups.
        align: whether hidden units are permuted.
        batches: that the model runs, as it was, to compare outputs.
        tell: called with the number of batches that it ran.
    """
    made: dict[int, FactorizedExperts] = {}
    for place, layer in enumerate(layers):
        source = layer.source
        if len(layer.groups.dominant) < source.count:
            with at(source.name):
                made[place] = _merged(source, layer.groups, align)
    errors = _errors(model, layers, made, batches, tell)
    new = {id(layers[place].source.module): place for place in made}
    for name, old in chosen.items():
        if id(old) not in new:
            continue
        place = new[id(old)]
        experts, behind = made[place], layers[place].groups.groups
        if sparse_parent(model, name) is None:
            put_experts(model, name, old, experts)
        else:
            # the configuration has them
            experts.groups = None
            put_experts(model, name, old, experts, groups=behind)
    return tuple(
        ReducedModule(
            layer.source.name,
            type(layer.source.module).__name__,
            (layer.source.count, len(layer.groups.dominant)),
            layer.groups.members,
            layer.frequencies,
            None,
            layer.groups.similarity,
            layer.source.parameters_of(len(layer.groups.dominant)),
            errors[place],
        )
        for place, layer in enumerate(layers)
    )


def _errors(
    model: nn.Module,
    layers: Sequence[Grouped],
    made: Mapping[int, FactorizedExperts],
    batches: list[Any],
    tell: Callable[[int], None],
) -> list[float]:
    """Errors of outputs, relative to those of the old experts, which the model still has."""
    missing, whole = [0.0] * len(layers), [0.0] * len(layers)

    def take(place: int, samples: Samples) -> None:
        if place in made:
            off, size = output_squares(layers[place].source, made[place], samples)
            missing[place] += off
            whole[place] += size

    with watched([layer.source for layer in layers], take), evaluating(model):
        for count, batch in enumerate(batches, 1):
            run_model(model, batch)
            tell(count)
    return [(off / size) ** 0.5 if size else 0.0 for off, size in zip(missing, whole, strict=True)]


@torch.no_grad()
def _merged(source: DenseExperts, groups: ExpertGroups, align: bool) -> FactorizedExperts:
    weights = {role: stack.weights for role, stack in source.stacks.items()}
    biases = {r: stack.biases for r, stack in source.stacks.items() if stack.biases is not None}
    merged = merge_stacks(weights, groups, biases=biases, align=align)
    new = FactorizedExperts(dense_layers(*merged), source.act)
    device = next(new.parameters()).device
    new.groups = torch.tensor(groups.groups, device=device)
    return new

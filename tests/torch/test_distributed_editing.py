"""Experts of layers that are spread over processes: edited as one process edits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tensormoe import CP, Gate, TensorRing
from tensormoe.errors import BackendError, SpecError
from tensormoe_torch import (
    MuMoE,
    MuMoEMLP,
    merge_experts,
    permute_experts,
    replace_expert,
    restored,
    scale_experts,
    silence_experts,
)
from tests.torch._helpers import normal, randomize
from tests.torch._ranks import Ranks

EDITS: dict[str, Callable[[Any], object]] = {
    "scale": lambda layer: scale_experts(layer, {0: 0.5, 2: -2.0}),
    "silence": lambda layer: silence_experts(layer, [1, 2]),
    "copy": lambda layer: replace_expert(layer, 2, source=0),
    "replace": lambda layer: replace_expert(
        layer, 1, normal(6, 5, seed=3, dtype=torch.float32), torch.ones(5)
    ),
    "merge": lambda layer: merge_experts(layer, [2, 0], [1, 3]),
    "permute": lambda layer: permute_experts(layer, [2, 0, 1]),
}


def layer_of(kind: Any = None) -> Any:
    kind = CP(7) if kind is None else kind
    return randomize(MuMoE(6, 5, experts=3, factorization=kind, gate=Gate(bias=True)))


def by_hand(layer: MuMoE) -> MuMoE:
    """Every factor distributed in another manner, over a mesh of two axes."""
    mesh = init_device_mesh("cpu", (2, 1))
    for place, (name, factor) in enumerate(layer.factors.items()):
        placements = [(Shard(0), Replicate()), (Replicate(), Shard(0)), (Shard(-1), Shard(0))]
        spread = distribute_tensor(factor.detach(), mesh, placements[place % 3])
        layer.factors[name] = nn.Parameter(spread)
    return layer


def over_tensor_parallel(layer: MuMoE) -> Any:
    """Factors distributed along their first axis, and their parts sharded along the same."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    for name, factor in layer.factors.items():
        spread = distribute_tensor(factor.detach(), mesh["model"], [Shard(0)])
        layer.factors[name] = nn.Parameter(spread)
    return fully_shard(layer, mesh=mesh["data"])


def whole(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: array.full_tensor() if isinstance(array, DTensor) else array.clone()
        for name, array in layer.state_dict().items()
    }


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def sharded() -> Iterator[tuple[Any, Any]]:
    """Layers that are spread, and the same in one process."""
    for kind in (CP(7), TensorRing((2, 2, 3))):
        yield fully_shard(layer_of(kind)), layer_of(kind)
        yield by_hand(layer_of(kind)), layer_of(kind)
        yield over_tensor_parallel(layer_of(kind)), layer_of(kind)


def edit(rank: int) -> None:
    for spread, alone in sharded():
        before = whole(spread)
        objects = [*spread.parameters()]
        for name, change in EDITS.items():
            with restored(alone):
                error = change(alone)
                with restored(spread):
                    assert change(spread) == error, name
                    assert_equal(whole(spread), whole(alone))
                    weight, bias = spread.expert(1)
                    assert torch.equal(weight, alone.expert(1)[0])
                    assert torch.equal(bias, alone.expert(1)[1])
                    assert torch.equal(spread.materialize()[0], alone.materialize()[0])
            assert_equal(whole(spread), before)
        assert all(a is b for a, b in zip(objects, spread.parameters(), strict=True))


def test_edits(ranks: Ranks) -> None:
    ranks(edit)


def edit_between_shards(rank: int) -> None:
    """After a call, the gathered parameters are in the layer's place until the next reshard."""
    x = torch.ones(2, 6)
    model = nn.Sequential(nn.Linear(6, 6), layer_of()).eval()
    alone = layer_of().eval()
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    fully_shard(model, reshard_after_forward=False)
    for change in EDITS.values():
        model(x)
        assert not isinstance(model[1].factors["input"], DTensor)
        with restored(model), restored(alone):
            change(model[1])
            change(alone)
            for _ in range(2):
                torch.testing.assert_close(model(x), alone(x), rtol=0.0, atol=0.0)
                model.reshard()
        assert torch.equal(model(x), alone(x))


def test_edits_of_gathered_layers(ranks: Ranks) -> None:
    ranks(edit_between_shards)


def train_on(rank: int) -> None:
    """Optimizers go on with what was edited; both layers of a block are."""
    block, alone = (
        randomize(MuMoEMLP(6, 7, 5, experts=3, rank=3, dtype=torch.float64)) for _ in range(2)
    )
    fully_shard(block)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (block, alone)]
    for step in range(3):
        for layer, optimizer in zip((block, alone), optimizers, strict=True):
            layer(normal(4, 6, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            silence_experts(layer, step)
    for name, array in whole(block).items():
        torch.testing.assert_close(array, alone.state_dict()[name])


def test_training_goes_on(ranks: Ranks) -> None:
    ranks(train_on)


def call_parts(rank: int) -> None:
    layer = fully_shard(layer_of())
    x = torch.ones(2, 6)
    with pytest.raises(BackendError, match="x must be a DTensor as the layer's parameters are"):
        layer.coefficients(x)
    assert layer(x).shape == (2, 5)
    torch.distributed.fsdp.register_fsdp_forward_method(layer, "coefficients")
    assert torch.equal(layer.coefficients(x)[0], layer_of().coefficients(x)[0])
    with pytest.raises(BackendError, match="x must be a DTensor"):
        by_hand(layer_of())(x)


def test_parts_of_sharded_layers_say_how_to_call_them(ranks: Ranks) -> None:
    ranks(call_parts)


def test_computed_factors_are_refused() -> None:
    layer = layer_of()
    nn.utils.parametrize.register_parametrization(layer.factors, "expert_0", nn.Identity())
    for change in (*EDITS.values(), restored, lambda each: each.reset_parameters()):
        with pytest.raises(SpecError, match="own names to be changed; got a computed 'expert_0'"):
            change(layer)

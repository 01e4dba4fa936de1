"""Layers that start on the meta device and are spread before they have values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from tensormoe import CP, Gate, SharedDelta, TensorRing
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP
from tensormoe_torch.compression import FactorizedExperts
from tests._torch_helpers import normal, randomize
from tests.torch._ranks import Ranks

BATCH = Gate(normalization="batch", bias=True)


def build_experts() -> FactorizedExperts:
    return FactorizedExperts(
        {
            role: MuMoE(*sizes, experts=3, rank=5, bias=False, gate=None)
            for role, sizes in (("up_proj", (6, 7)), ("down_proj", (7, 6)))
        },
        nn.functional.silu,
    )


BUILD: dict[str, Callable[[], Any]] = {
    "CP": lambda: MuMoE(6, 5, experts=(3, 2), factorization=CP(7), gate=BATCH),
    "ring": lambda: MuMoE(6, 5, experts=3, factorization=TensorRing(3)),
    "sum": lambda: MuMoE(6, 5, experts=3, factorization=SharedDelta(3), init="paper"),
    "block": lambda: MuMoEMLP(6, 9, experts=3, rank=4),
    "table": lambda: MuMoEEmbedding(11, 5, experts=3, rank=4),
    "experts": build_experts,
}


def reset(module: nn.Module) -> None:
    """As those do who start on the meta device: each module with a method of this name."""
    for each in module.modules():
        if not isinstance(each, nn.ParameterDict) and hasattr(each, "reset_parameters"):
            each.reset_parameters()


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: array.full_tensor() if isinstance(array, DTensor) else array.clone()
        for name, array in module.state_dict().items()
    }


def start(rank: int) -> None:
    for name, build in BUILD.items():
        alone = build()
        torch.manual_seed(3)
        reset(alone)
        for seed in (3, 3 + rank):  # also where processes draw different numbers
            with torch.device("meta"):
                spread = build()
            fully_shard(spread)
            spread.to_empty(device="cpu")
            torch.manual_seed(seed)
            reset(spread)
            found, wanted = whole(spread), alone.state_dict()
            assert found.keys() == wanted.keys()
            for key in wanted:
                assert torch.equal(found[key], wanted[key]), (name, key)


def test_meta_then_sharded_then_reset(ranks: Ranks) -> None:
    """The values of one process with the first one's generator, whatever the others draw."""
    ranks(start)


def start_replicated(rank: int) -> None:
    """Replicas stay equal, on a mesh with an axis of shards beside them."""
    mesh = init_device_mesh("cpu", (2, 1))
    layer = BUILD["CP"]()
    for name, factor in layer.factors.items():
        spread = distribute_tensor(factor.detach(), mesh, (Replicate(), Shard(0)))
        layer.factors[name] = nn.Parameter(spread)
    distribute_module(layer.gate, mesh)
    torch.manual_seed(rank)
    reset(layer)
    for factor in layer.factors.values():
        here = factor.to_local().detach().clone()
        torch.distributed.broadcast(here, 0)
        assert torch.equal(here, factor.to_local())
    alone = BUILD["CP"]()
    torch.manual_seed(0)
    reset(alone)
    assert all(torch.equal(a, alone.state_dict()[name]) for name, a in whole(layer).items())


def test_replicas_start_alike(ranks: Ranks) -> None:
    ranks(start_replicated)


def trained(seed: int, spread: bool) -> tuple[Any, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 6), randomize(BUILD["CP"](), seed), BUILD["block"]())
    model[2] = randomize(MuMoEMLP(5, 9, 6, experts=3, rank=4), seed)
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    if spread:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(normal(4, 6, seed=seed, dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def write_by_dcp(rank: int, folder: Path) -> None:
    model, optimizer = trained(1, spread=True)
    state, moments = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder)
    # and back into shards, from other values
    other, following = trained(2, spread=True)
    state, moments = get_state_dict(other, following)
    held = {"model": state, "optimizer": moments}
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(
        other, following, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    assert all(torch.equal(array, whole(model)[name]) for name, array in whole(other).items())
    # the whole, from one process to all
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    full = get_model_state_dict(model, options=options)
    third, _ = trained(3, spread=True)
    set_model_state_dict(third, full, options=options)
    assert all(torch.equal(array, whole(model)[name]) for name, array in whole(third).items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoints_change_the_number_of_processes(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks(write_by_dcp, tmp_path / "saved")
    wanted, _ = trained(1, spread=False)
    model, optimizer = trained(2, spread=False)
    state, moments = get_state_dict(model, optimizer)
    held = {"model": state, "optimizer": moments}
    dcp.load(held, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    for name, array in model.state_dict().items():
        torch.testing.assert_close(array, wanted.state_dict()[name])

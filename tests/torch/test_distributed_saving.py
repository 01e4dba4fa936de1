"""Layers spread over processes: saved whole by one of them, or refused in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

from tensormoe import CP, Gate, TensorRing
from tensormoe.checkpoint import peek_checkpoint
from tensormoe.errors import SpecError
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP, SparseMoE
from tensormoe_torch.adapters import (
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from tests.torch._helpers import normal, randomize
from tests.torch._ranks import Ranks

BATCH = Gate(normalization="batch", bias=True)


class Mine(MuMoE):
    """A user's own layer."""


def layers() -> dict[str, Any]:
    """One of each kind, equal in every process; no size is a multiple of the processes."""
    made = {
        "MuMoE": MuMoE(6, 5, experts=3, rank=7, gate=BATCH),
        "MuMoEMLP": MuMoEMLP(5, 7, experts=(3, 2), factorization=TensorRing(3)),
        "MuMoEEmbedding": MuMoEEmbedding(7, 5, experts=3, rank=1),
        "Mine": Mine(6, 5, experts=3, factorization=CP(3)),
    }
    return {name: randomize(layer) for name, layer in made.items()}


def values(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: array.detach().clone() for name, array in layer.state_dict().items()}


def save_sharded(rank: int, folder: Path) -> dict[str, bool]:
    """Whether every process finds the whole file as soon as ``save`` returns."""
    found = {}
    for name, layer in layers().items():
        before = values(layer)
        fully_shard(layer)
        layer.save(folder / name)
        kind = MuMoE if name == "Mine" else type(layer).__mro__[2]
        again = kind.load(folder / name)
        same = {key: torch.equal(array, before[key]) for key, array in again.state_dict().items()}
        found[name] = all(same.values()) and again.state_dict().keys() == before.keys()
    return found


def test_fully_sharded_layers(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(save_sharded, tmp_path):
        assert found == dict.fromkeys(layers(), True)
    kinds = {name: peek_checkpoint(tmp_path / name).block for name in layers()}
    assert kinds == {name: name for name in layers()} | {"Mine": "MuMoE"}
    assert Mine.load(tmp_path / "Mine").__class__ is Mine
    # to the byte what one process writes
    for name, layer in layers().items():
        layer.save(tmp_path / "alone")
        assert (tmp_path / "alone").read_bytes() == (tmp_path / name).read_bytes()


def run_sharded_mixture(rank: int, folder: Path) -> None:
    """Parts sharded one by one, as for models, and then the whole."""
    x = normal(6, 6, dtype=torch.float32)
    options: dict[str, Any] = {"experts": 3, "top_k": 2, "shared_features": 4}
    plain, sharded = (
        randomize(SparseMoE(6, 7, factorization=("dense", CP(4)), **options)) for _ in range(2)
    )
    before = values(plain)
    for part in (sharded.experts.projections["down_proj"], sharded.router, sharded):
        fully_shard(part)
    outputs = [layer(x) for layer in (plain, sharded)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    grads = {name: each.grad.full_tensor() for name, each in sharded.named_parameters()}
    for name, each in plain.named_parameters():
        torch.testing.assert_close(grads[name], each.grad, msg=name)
    sharded.save(folder / "mixture")
    again = SparseMoE.load(folder / "mixture").state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(array, before[name]) for name, array in again.items())
    sharded.reset_parameters()


def test_sharded_mixtures(ranks: Ranks, tmp_path: Path) -> None:
    ranks(run_sharded_mixture, tmp_path)


def save_between_shards(rank: int, folder: Path) -> bool:
    """In a model, with parameters that are still gathered from the last call."""
    layer = layers()["MuMoE"].eval()
    model = nn.Sequential(nn.Linear(6, 6), layer)
    before = values(layer)
    fully_shard(model, reshard_after_forward=False)
    model(torch.ones(2, 6))
    layer.save(folder / "layer")
    again = MuMoE.load(folder / "layer").state_dict()
    return all(torch.equal(array, before[name]) for name, array in again.items())


def test_layers_inside_of_sharded_models(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(save_between_shards, tmp_path) == [True, True]


def save_distributed(rank: int, folder: Path) -> dict[str, bool]:
    """Some parameters on one mesh, some on another, some in every process."""
    found = {}
    line = init_device_mesh("cpu", (2,))
    for shape in ((1, 2), (2, 1)):
        layer = layers()["MuMoE"]
        before = values(layer)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        for name, placements in (
            ("input", (Shard(0), Shard(1))),
            ("output", (Replicate(), Shard(0))),
        ):
            spread = distribute_tensor(layer.factors[name].detach(), mesh, placements)
            layer.factors[name] = nn.Parameter(spread)
        spread = distribute_tensor(layer.gate.projection_0.detach(), line, [Shard(1)])
        layer.gate.projection_0 = nn.Parameter(spread)
        layer.save(folder / "layer")
        again = MuMoE.load(folder / "layer").state_dict()
        found[str(shape)] = all(torch.equal(again[name], before[name]) for name in before)
    return found


def test_distributed_tensors_on_several_meshes(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(save_distributed, tmp_path):
        assert found == {"(1, 2)": True, "(2, 1)": True}


def save_nowhere(rank: int, folder: Path) -> str:
    layer = distribute_module(layers()["MuMoE"], init_device_mesh("cpu", (2,)))
    # only the first process is to write, so only there is the folder missing
    try:
        layer.save(folder / "missing" / "layer" if rank == 0 else folder / "layer")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_an_error_of_one_process_is_an_error_of_all(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(save_nowhere, tmp_path)
    assert first.startswith("CheckpointError: the folder of a checkpoint must exist")
    assert second == first
    assert not [*tmp_path.iterdir()]


def test_a_class_of_the_users_saves_and_loads(tmp_path: Path) -> None:
    layer = layers()["Mine"]
    layer.save(tmp_path / "layer")
    for kind in (Mine, MuMoE):
        again = kind.load(tmp_path / "layer")
        assert type(again) is kind
        assert torch.equal(again(torch.ones(2, 6)), layer(torch.ones(2, 6)))
    with pytest.raises(Exception, match="must hold a MuMoEEmbedding; got a MuMoE"):
        MuMoEEmbedding.load(tmp_path / "layer")


def adapted_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), _Experts())
    add_adapters(model, ["0", "2.experts"], experts=3, rank=2)
    return randomize(model)


class _Experts(nn.Module):
    """Experts of two layers, all of them on every input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = SparseMoE(5, 7, experts=3, top_k=2).experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts)  # type: ignore[return-value]


def save_sharded_adapters(rank: int, folder: Path) -> dict[str, Any]:
    """Adapters of a sharded model in one file, which a whole one and a sharded one open."""
    model, other = adapted_model(), adapted_model()
    with torch.no_grad():
        for each in other.parameters():
            if each.requires_grad:
                each.zero_()
    x = normal(4, 6, seed=1, dtype=torch.float32)
    wanted = model(x)
    for each in (model, other):
        fully_shard(each[0])
        fully_shard(each)
    save_adapters(model, folder / "adapters")
    load_adapters(other, folder / "adapters")
    with torch.no_grad():
        found = {"sharded": torch.allclose(other(x), wanted, atol=1e-5)}
    try:
        merge_adapters(model)
    except SpecError as error:
        found["merged"] = "must be whole to be merged" not in str(error)
    delta = model[0].delta(torch.ones(3))[0]
    found["delta"] = torch.allclose(delta, adapted_model()[0].delta(torch.ones(3))[0], atol=1e-5)
    return found


def test_sharded_adapters(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(save_sharded_adapters, tmp_path):
        assert found == {"sharded": True, "merged": False, "delta": True}
    save_adapters(adapted_model(), tmp_path / "alone")
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "adapters").read_bytes()

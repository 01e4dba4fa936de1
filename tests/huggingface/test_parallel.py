"""Compressed models under transformers' tensor parallelism, in two processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe_torch import MuMoE, MuMoEMLP
from tensormoe_torch.compression import FactorizedExperts
from tensormoe_torch.huggingface._quantizer import _cut
from tests.huggingface._models import compressed
from tests.torch._ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.stop()


@torch.no_grad()
def load(rank: int, folder: Path, again: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    tokens = torch.arange(24).reshape(2, 12)
    wanted = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    experts = [each for each in model.modules() if isinstance(each, FactorizedExperts)]
    assert experts
    factors = [each for part in experts for each in part.parameters()]
    assert all(isinstance(each, DTensor) for each in factors)
    assert any(each.to_local().numel() < each.numel() for each in factors)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    # what was cut is saved whole
    model.save_pretrained(again)
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(again)
    torch.testing.assert_close(whole(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_plan_of_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    compressed("olmoe").save_pretrained(tmp_path / "folder")
    ranks(load, tmp_path / "folder", tmp_path / "again")


class Meshes:
    def get_mesh(self, name: str) -> Any:
        assert name == "tp"
        return init_device_mesh("cpu", (2,))


def stay_whole(rank: int) -> None:
    def layer(*sizes: int) -> MuMoE:
        return MuMoE(*sizes, experts=3, rank=5, bias=False, gate=None)

    layers = {"gate_up_proj": layer(6, 8), "down_proj": layer(4, 6)}
    halves = FactorizedExperts(layers, lambda both: both.chunk(2, -1)[0])
    odd = FactorizedExperts({"up_proj": layer(5, 7), "down_proj": layer(7, 5)}, nn.functional.silu)
    even = FactorizedExperts({"up_proj": layer(5, 8), "down_proj": layer(8, 5)}, nn.functional.silu)
    parts = {"halves": halves, "odd": odd, "even": even, "block": MuMoEMLP(4, 6, experts=2, rank=2)}
    parts["gated"] = MuMoEMLP(4, 6, gated=True, experts=2, rank=2)
    model = nn.ModuleDict(parts)
    _cut(model, parts)
    assert not any(isinstance(each, DTensor) for each in model.parameters())
    model._mesh_manager, model._tp_size = Meshes(), 2  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="odd stays whole on every device: .*multiple of the 2"):
        _cut(model, parts)
    cut = {
        name: any(isinstance(each, DTensor) for each in part.parameters())
        for name, part in model.items()
    }
    assert cut == {"halves": False, "odd": False, "even": True, "block": True, "gated": False}


def test_what_stays_whole_under_a_plan(ranks: Ranks) -> None:
    ranks(stay_whole)

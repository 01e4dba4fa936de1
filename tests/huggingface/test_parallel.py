"""Compressed models under transformers' tensor parallelism, in two processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe_torch.compression import FactorizedExperts
from tensormoe_torch.parallel import parallelize
from tests.huggingface._models import compressed
from tests.torch._ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.stop()


@torch.no_grad()
def compare(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    tokens = torch.arange(24).reshape(2, 12)
    wanted = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    config = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    experts = [each for each in model.modules() if isinstance(each, FactorizedExperts)]
    assert experts
    assert not any(isinstance(each, DTensor) for part in experts for each in part.parameters())
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    parallelize(model, init_device_mesh("cpu", (2,)))
    assert all(isinstance(each, DTensor) for part in experts for each in part.parameters())
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_plan_of_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    compressed("olmoe").save_pretrained(tmp_path)
    ranks(compare, tmp_path)

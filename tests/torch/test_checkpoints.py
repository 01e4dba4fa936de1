"""What PyTorch's layers write and open: their dtype, memory of their own, any layout."""

from __future__ import annotations

from pathlib import Path

import torch

from tensormoe import CP, Gate
from tensormoe.checkpoint import peek_checkpoint
from tensormoe_torch import MuMoE, MuMoEEmbedding
from tests.torch._helpers import randomize

BATCH = Gate(normalization="batch", bias=True, momentum=0.3)


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    layer = randomize(MuMoE(6, 5, 4, CP(3), gate=BATCH, dtype=torch.bfloat16))
    layer.save(tmp_path / "layer")
    dtypes = {name: info.dtype for name, info in peek_checkpoint(tmp_path / "layer").arrays.items()}
    assert {dtypes[name] for name in dtypes if "running" not in name} == {"bfloat16"}
    assert {dtypes[name] for name in dtypes if "running" in name} == {"float32"}
    again = MuMoE.load(tmp_path / "layer")
    for name, tensor in layer.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name], tensor)


def test_trained_after_loading(tmp_path: Path) -> None:
    """What is loaded are parameters of its own, and nothing of the file's."""
    layer = randomize(MuMoE(6, 5, 4, CP(3)))
    layer.save(tmp_path / "layer")
    content = (tmp_path / "layer").read_bytes()
    again = MuMoE.load(tmp_path / "layer")
    again(torch.ones(3, 6)).sum().backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert (tmp_path / "layer").read_bytes() == content
    assert not torch.equal(again.factors["input"], layer.factors["input"])


def test_frozen_and_transposed_parameters_are_written_as_they_are(tmp_path: Path) -> None:
    table = randomize(MuMoEEmbedding(6, 5, 4, CP(3)))
    table.requires_grad_(False)
    turned = table.factors["input"].t().contiguous().t()
    table.factors["input"] = torch.nn.Parameter(turned, requires_grad=False)
    assert not table.factors["input"].is_contiguous()
    table.save(tmp_path / "table")
    assert torch.equal(MuMoEEmbedding.load(tmp_path / "table").factors["input"], turned)


def test_pytorchs_safetensors_read_it_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    layer = randomize(MuMoE(6, 5, (3, 2), CP(3), gate=BATCH))
    layer.save(tmp_path / "layer")
    found = load_file(tmp_path / "layer")
    assert found.keys() == layer.state_dict().keys()
    assert all(torch.equal(found[name], each) for name, each in layer.state_dict().items())
    again = MuMoE.of(layer.config)
    again.load_state_dict(found)
    assert torch.equal(again.eval()(torch.ones(2, 6)), layer.eval()(torch.ones(2, 6)))

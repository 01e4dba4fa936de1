"""Attributes of ``nn.Linear``: given where they have a meaning, refused where values are read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from tensormoe.errors import SpecError
from tensormoe_torch import MuMoE, MuMoEEmbedding, replace


def test_what_is_said() -> None:
    layer = MuMoE(8, 4, experts=3, rank=2, dtype=torch.bfloat16)
    dense = nn.Linear(8, 4, dtype=torch.bfloat16)
    assert (layer.in_features, layer.out_features) == (8, 4)
    for found, wanted in ((layer.weight, dense.weight), (layer.bias, dense.bias)):
        assert isinstance(found, Tensor)
        for name in ("dtype", "device", "shape", "ndim", "itemsize", "requires_grad", "is_cuda"):
            assert getattr(found, name) == getattr(wanted, name), name
        assert (found.size(), found.dim()) == (wanted.size(), wanted.dim())
        assert found.is_floating_point()
    assert MuMoE(8, 4, experts=3, rank=2, bias=False).bias is None
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert MuMoE(8, 4, experts=3, rank=2, device="meta").weight.device.type == "meta"
    table = MuMoEEmbedding(9, 4, experts=3, rank=2)
    assert (table.num_embeddings, table.embedding_dim) == (9, 4)


USES: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda w: w.sum(),
    "plus": lambda w: w + 1.0,
    "equal": lambda w: w == w,
    "linear": lambda w: F.linear(torch.ones(2, 8), w),
    "matmul": lambda w: torch.ones(2, 4) @ w,
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "init": lambda w: nn.init.normal_(w),
    "parameter": lambda w: nn.Parameter(w),
    "to": lambda w: w.to(torch.float64),
    "like": lambda w: torch.zeros_like(w),
    "numel": lambda w: w.numel(),
    "list": lambda w: w.tolist(),
    "pointer": lambda w: w.data_ptr(),
    "copy": lambda w: copy.deepcopy(w),
    "pickle": lambda w: pickle.dumps(w),
    "transpose": lambda w: w.T,
    "index": lambda w: w[0],
    "copy in": lambda w: torch.ones(4, 8).copy_(w),
}


@pytest.mark.parametrize("name", USES)
def test_values_are_refused(name: str) -> None:
    layer = MuMoE(8, 4, experts=3, rank=2)
    with pytest.raises(SpecError, match=r"weight of MuMoE has no values: .*expert\(…\)"):
        USES[name](layer.weight)
    assert repr(layer.weight) == "<no values: weight of MuMoE>"


def test_nothing_of_it_is_stored() -> None:
    layer = MuMoE(8, 4, experts=3, rank=2)
    names = [name for name, _ in layer.named_parameters()]
    _ = layer.weight, layer.bias
    assert [name for name, _ in layer.named_parameters()] == names
    assert not any(name in ("weight", "bias") for name in layer.state_dict())
    pickle.dumps(copy.deepcopy(layer))
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.ones(4, 8))  # type: ignore[misc]


class Caster(nn.Module):
    """As T5's feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wo = MuMoE(8, 4, experts=3, rank=2)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.wo.weight, Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        result: Tensor = self.wo(x)
        return result


def test_compilers_read_the_dtype() -> None:
    model, x = Caster(), torch.randn(5, 8, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))

    def sums(x: Tensor) -> Tensor:
        return x @ model.wo.weight.T

    with pytest.raises(Exception, match=r"(?i)device"):
        torch.compile(sums, fullgraph=True, backend="aot_eager")(x.float())


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_t5_runs_after_surgery_of_its_last_layers(activation: str, dtype: torch.dtype) -> None:
    """Which it keeps in float32 while the rest is narrower."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        feed_forward_proj=activation,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).to(dtype).eval()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    ids = torch.randint(3, 40, (2, 5))
    example = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    with torch.no_grad():
        wanted = model(**example).logits
    surgery = replace(model, "**.wo", experts=4, rank=17, example=example)
    assert len(surgery.names) == 2
    with torch.no_grad():
        found = model(**example).logits
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))

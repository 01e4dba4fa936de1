"""Gated MLPs of other code become gated blocks that compute what those compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import ACT2FN

from tensormoe.errors import SpecError
from tensormoe_torch import MuMoEMLP, from_mlp, replace

CAUSAL = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "gemma": GemmaConfig,
}


def causal(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    head = {"head_dim": 8} if kind in ("gemma", "qwen3") else {}
    config = CAUSAL[kind](
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **head,
    )
    return AutoModelForCausalLM.from_config(config), {"input_ids": torch.randint(3, 40, (2, 5))}


def t5(activation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj=activation,
        decoder_start_token_id=0,
    )
    ids = torch.randint(3, 40, (2, 5))
    return T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :3]}


MODELS: dict[str, tuple[Any, Any, str, str, bool, int]] = {
    # make, its argument, select, activation, gated, number of blocks
    **{
        kind: (causal, kind, "model.layers.*.mlp", "silu", True, 2)
        for kind in CAUSAL
        if kind != "gemma"
    },
    "gemma": (causal, "gemma", "model.layers.*.mlp", "gelu_tanh", True, 2),
    "t5": (t5, "relu", "**.DenseReluDense", "relu", False, 4),
    "t5 gated": (t5, "gated-gelu", "**.DenseReluDense", "gelu_tanh", True, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_did(name: str) -> None:
    torch.manual_seed(0)
    make, argument, select, activation, gated, count = MODELS[name]
    model, example = make(argument)
    model.eval()
    with torch.no_grad():
        wanted = model(**example).logits
    before = [module for key, module in model.named_modules() if key.endswith(select[-4:])]
    surgery = replace(model, select, experts=(3, 2), rank=17, example=example, drop=0.0)
    found = model(**example).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert len(surgery.names) == count
    for each, old in zip(surgery.replacements, before, strict=True):
        block = model.get_submodule(each.name)
        assert isinstance(block, MuMoEMLP)
        assert (block.config.act_layer, block.config.gated) == (activation, gated)
        assert each.sizes == (16, 24, 16)
        assert (block.in_features, block.hidden_features, block.out_features) == each.sizes
        assert block.first.out_features == (48 if gated else 24)
        assert each.fit is not None
        assert each.fit.error < 1e-5
        dense = sum(parameter.numel() for parameter in old.parameters())
        assert each.fit.parameters_before == each.before.parameters == dense
    found.float().square().sum().backward()
    for each in surgery.names:
        for key, parameter in model.get_submodule(each).named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key


class Gated(nn.Module):
    """As timm's SwiGLU and Hugging Face's, with names, order and the activation to choose."""

    def __init__(self, act: Any, what: str = "", bias: bool = True) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(6, 9), nn.Linear(6, 9, bias)
        self.down, self.act, self.what = nn.Linear(9, 5, bias), act, what
        self.drop = nn.Dropout(0.25 if what == "dropout" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x) if self.what == "up first" else None
        gate = self.act(self.gate(x))
        if self.what == "dropped between":
            gate = F.dropout(gate, 0.5, self.training)
        up = self.up(2.0 * x if self.what == "scaled" else x) if up is None else up
        h = gate + up if self.what == "sum" else gate * gate * up if self.what == "square" else 0
        h = up * gate if isinstance(h, int) else h
        return self.drop(self.down(self.drop(h)))


class Fused(nn.Module):
    """As timm's GluMlp: one layer makes both halves."""

    def __init__(self, act: Any, gate_last: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 18), nn.Linear(9, 5)
        self.act, self.gate_last = act, gate_last

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.fc1(x).chunk(2, dim=-1)
        h = first * self.act(last) if self.gate_last else self.act(first) * last
        result: Tensor = self.fc2(h)
        return result


BLOCKS: dict[str, tuple[nn.Module, str | None]] = {
    "module": (Gated(nn.SiLU()), "silu"),
    "function": (Gated(F.gelu), "gelu"),
    "in place": (Gated(nn.SiLU(inplace=True)), "silu"),
    "up first": (Gated(F.silu, "up first"), "silu"),
    "dropout": (Gated(nn.SiLU(), "dropout"), "silu"),
    "one bias": (Gated(F.relu, bias=False), "relu"),
    "narrow": (Gated(ACT2FN["gelu_new"]).to(torch.bfloat16), "gelu_tanh"),
    "own": (Gated(nn.PReLU(init=0.3)), None),
    "sigmoid": (Gated(nn.Sigmoid(), "up first"), None),
    "gate last": (Fused(nn.SiLU(), True), "silu"),
    "gate first": (Fused(F.gelu, False), "gelu"),
    "fused sigmoid": (Fused(nn.Sigmoid(), True), None),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_equals_the_mlp(name: str) -> None:
    torch.manual_seed(1)
    mlp, activation = copy.deepcopy(BLOCKS[name])
    dtype = next(mlp.parameters()).dtype
    block, fit = from_mlp(mlp, (3, 2), "cp", rank=8, noise=0.2)
    assert block.training
    assert all(each.training for each in mlp.modules())
    assert (block.config.act_layer, block.config.gated) == (activation, True)
    assert block.config.drop == (0.25 if name == "dropout" else 0.0)
    x = torch.randn(2, 4, 6).to(dtype)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    wanted = mlp.eval()(x)
    torch.testing.assert_close(block.eval()(x), wanted, rtol=0, atol=tolerance)
    exact, _ = from_mlp(mlp, 4, "cp", rank=8)
    given = torch.softmax(torch.randn(2, 4, 4), -1).to(dtype)
    torch.testing.assert_close(exact(x, given), wanted, rtol=0, atol=tolerance)
    own = sum(p.numel() for p in mlp.act.parameters()) if activation is None else 0
    assert fit.parameters_before == sum(p.numel() for p in mlp.parameters()) - own
    shared = {p.data_ptr() for p in mlp.parameters()} & {p.data_ptr() for p in block.parameters()}
    assert not shared


@pytest.mark.parametrize(
    ("act", "what", "message"),
    [
        (F.silu, "sum", "the activation of mlp must be one of"),
        (F.silu, "square", "the activation of mlp must be one of"),
        (F.silu, "dropped between", "the activation of mlp must be one of"),
        (F.mish, "", "the activation of mlp must be one of"),
        (F.silu, "scaled", "does more than"),
    ],
)
def test_what_is_no_gated_mlp(act: Any, what: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_mlp(Gated(act, what), 4)


def test_norms_inside_are_refused() -> None:
    mlp = Gated(nn.SiLU())
    mlp.drop = nn.LayerNorm(9)
    with pytest.raises(SpecError, match=r"besides three linear layers it holds 'drop.weight'"):
        from_mlp(mlp, 4)


def test_parts() -> None:
    torch.manual_seed(2)
    gate, up, down = nn.Linear(6, 9), nn.Linear(6, 9, bias=False), nn.Linear(9, 5)
    x = torch.randn(4, 6)
    for act, function in (("silu", F.silu), (nn.Mish(), F.mish), (F.elu, F.elu)):
        block, fit = from_mlp((gate, act, up, down), 3, rank=8)
        wanted = down(function(gate(x)) * up(x))
        torch.testing.assert_close(block(x), wanted, rtol=0, atol=1e-5)
        assert fit.parameters_before == sum(
            p.numel() for part in (gate, up, down) for p in part.parameters()
        )
        assert len(fit.parts) == 2


def test_too_small_a_rank_is_the_truncated_svd_of_both_halves_together() -> None:
    torch.manual_seed(3)
    mlp = Gated(nn.SiLU()).double()
    block, fit = from_mlp(mlp, 3, rank=4)
    table = torch.cat(
        [torch.cat([part.weight.t(), part.bias[None]]) for part in (mlp.gate, mlp.up)], dim=1
    )
    values = torch.linalg.svdvals(table.detach())
    wanted = values[4:].norm() / values.norm()
    assert fit.parts[0].error == pytest.approx(float(wanted), rel=1e-6)
    (matrix, bias), _ = block.expert(1)
    assert matrix.shape == (6, 18)
    assert bias is not None
    off = (torch.cat([matrix, bias[None]]) - table).norm() / table.norm()
    assert float(off.detach()) == pytest.approx(float(wanted), rel=1e-6)


def test_fresh_blocks() -> None:
    model = nn.ModuleDict({"mlp": Gated(nn.PReLU(init=0.3))})
    surgery = replace(model, "mlp", experts=3, rank=4, start="variance", drop=0.0)
    block = model["mlp"]
    assert isinstance(block, MuMoEMLP)
    assert isinstance(block.act, nn.PReLU)
    assert float(block.act.weight.detach()) == pytest.approx(0.3)
    assert block.config.gated
    assert surgery.replacements[0].fit is None

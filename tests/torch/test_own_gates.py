"""Experts that gate in a way of their own, or get a block of tokens each, compressed in place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tensormoe import LayerSpec, Tucker
from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch import MuMoE, compress
from tensormoe_torch.adapters import add_adapters
from tensormoe_torch.allocation import model_sites
from tensormoe_torch.allocation._weights import read_weights
from tensormoe_torch.compression import FactorizedExperts, reduce_experts
from tensormoe_torch.compression._read import read_experts
from tensormoe_torch.compression._samples import collect
from tensormoe_torch.huggingface._activations import activation_of
from tests._compress_models import logits
from tests._more_models import RANK, experts_of, low_rank

TOKENS = torch.arange(24).reshape(2, 12)


class Clamped(nn.Module):
    """Stacked experts that clamp, far from where a trial would notice it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 24, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 12))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=30)) * up.clamp(-30, 30)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        both = torch.einsum("ti,koi->tko", hidden_states, self.gate_up_proj)
        every = torch.einsum("tkh,koh->tko", self._apply_gate(both), self.down_proj)
        chosen = every.gather(1, top_k_index[..., None].expand(-1, -1, 8))
        return (chosen * top_k_weights[..., None]).sum(1)


def test_a_clamp_that_a_trial_does_not_reach_is_kept() -> None:
    model = nn.ModuleDict({"experts": Clamped()})
    dense: Any = copy.deepcopy(model["experts"])
    (report,) = compress(model, "dense").modules
    assert [each.role for each in report.projections] == ["gate_up_proj", "down_proj"]
    experts: Any = model["experts"]
    x, index, weights = 40 * torch.randn(9, 8), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    wanted = dense(x, index, weights)
    torch.testing.assert_close(experts(x, index, weights), wanted, rtol=1e-4, atol=1e-2)
    unclamped = copy.deepcopy(dense)
    unclamped._apply_gate = lambda both: dense.act_fn(both[..., :12]) * both[..., 12:]
    assert bool(((unclamped(x, index, weights) - wanted).abs() > 100).any())
    assert "act_fn): Own(Clamped)" in repr(experts)


def test_gpt_oss_keeps_its_gate_and_biases() -> None:
    model = low_rank("gpt_oss")
    before = logits(model)
    dense = copy.deepcopy(experts_of(model)[0])
    report = compress(model, "tucker", rank=RANK, inputs=TOKENS, weighted=True)
    assert all(
        each.output_error is not None and each.output_error < 1e-3 for each in report.modules
    )
    experts = model.model.layers[0].mlp.experts
    assert [*experts.projections] == ["gate_up_proj", "down_proj"]
    assert not any(layer.spec.bias for layer in experts.projections.values())
    for role in experts.projections:
        name = f"{role}_bias"
        assert torch.equal(experts.get_parameter(name), dense.get_parameter(name))
    # nothing is shared with what was replaced, and copies are whole
    assert experts.down_proj_bias.data_ptr() != dense.down_proj_bias.data_ptr()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-3)
    # no weight of the dense experts is held any more
    assert experts.act_fn._experts[0].gate_up_proj is None


def test_what_own_gates_cannot_be() -> None:
    model = low_rank("gpt_oss")
    with pytest.raises(SpecError, match=r"take turns.*align=False"):
        reduce_experts(model, TOKENS, how="merge", keep=0.5)
    with pytest.raises(SpecError, match="gate in a way of their own"):
        add_adapters(model, rank=2)
    with pytest.raises(SpecError, match="gate and up projection as one layer; got two"):
        activation_of(None, experts_of(model)[0], fused=False)
    reduce_experts(model, TOKENS, how="merge", keep=0.5, align=False)
    assert isinstance(model.model.layers[0].mlp.experts, FactorizedExperts)
    assert logits(model).isfinite().all()


def test_trained_gpt_oss_experts_follow() -> None:
    model = low_rank("gpt_oss")
    compress(model, "tucker", rank=RANK)
    model(TOKENS, labels=TOKENS).loss.backward()
    experts = model.model.layers[1].mlp.experts
    assert all(each.grad is not None and each.grad.any() for each in experts.parameters())


def test_allocations_take_gate_and_up_projection_as_one() -> None:
    model = low_rank("gpt_oss")
    site, *_ = model_sites(model, "experts")
    roles = [
        (each.role, each.in_features, each.out_features, each.bias) for each in site.projections
    ]
    assert roles == [("gate_up_proj", 16, 48, False), ("down_proj", 24, 16, False)]
    for each, role in zip(read_weights(model, site), ("gate_up_proj", "down_proj"), strict=True):
        assert each.weights[0] is not None
        assert torch.equal(each.weights[0], experts_of(model)[0].get_parameter(role))
        assert each.biases == (None,)
    first, second = (
        LayerSpec(*sizes, (4,), Tucker(RANK), bias=False) for sizes in ((16, 48), (24, 16))
    )
    before = logits(model)
    for each, spec in zip(read_weights(model, site), (first, second), strict=True):
        weights, biases, _ = each.approximated(spec, None, 0)
        with each.replaced(weights, biases):
            torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-3)


def layers(count: int = 4) -> dict[str, MuMoE]:
    torch.manual_seed(0)
    sizes = [("gate_proj", 6, 8), ("up_proj", 6, 8), ("down_proj", 8, 5)]
    return {r: MuMoE(i, o, experts=count, rank=2, bias=False, gate=None) for r, i, o in sizes}


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_blocks_are_rows_of_one_expert_each(rows: int) -> None:
    experts = FactorizedExperts(layers(), nn.functional.silu)
    merged = FactorizedExperts(layers(), nn.functional.silu, groups=torch.tensor([2, 0, 0, 1, 3]))
    for each in (experts, merged):
        count = each.num_experts
        x = torch.randn(count * rows, 6)
        index = torch.arange(count).repeat_interleave(rows)
        wanted = each.routed(x, index)
        assert each(x).shape == (count * rows, 5)
        torch.testing.assert_close(each(x), wanted)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(4, 6)), experts(torch.ones(4, 6)))


def test_blocks_must_be_equal() -> None:
    experts = FactorizedExperts(layers(), nn.functional.silu)
    for shape in ((5, 6), (4, 2, 6)):
        with pytest.raises(ShapeError, match=r"\(4 · rows, in\)"):
            experts(torch.zeros(shape))
    with pytest.raises(ShapeError, match="both, or neither"):
        experts(torch.zeros(4, 6), torch.zeros(4, 1, dtype=torch.long))


def test_llama_4_is_calibrated_with_what_its_router_chose() -> None:
    model = low_rank("llama4_text")
    before = logits(model)
    block = model.model.layers[1].feed_forward
    chosen: list[Tensor] = []
    handle = block.router.register_forward_hook(lambda _, __, made: chosen.append(made[0] > 0))
    # not the token for padding, which is zero everywhere
    (sample,) = collect(model, [read_experts(block.experts, "x")], TOKENS + 1)
    handle.remove()
    # expert by expert, as its blocks of rows are
    assert torch.equal(sample.index[:, 0], chosen[0].T.nonzero()[:, 0])
    report = compress(model, "tucker", rank=RANK, inputs=TOKENS, weighted=True)
    assert report.modules[0].output_error is not None
    assert report.modules[0].output_error < 1e-3
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-3)
    with pytest.raises(SpecError, match="a block of tokens each"):
        reduce_experts(low_rank("llama4_text"), TOKENS, how="merge", keep=0.5)


def test_experts_of_gpt_oss_are_known_by_their_class() -> None:
    from tensormoe_torch.compression._gate import has_own_gate

    model = low_rank("qwen3_moe")
    assert not any(map(has_own_gate, experts_of(model)))
    gpt = low_rank("gpt_oss")
    assert all(has_own_gate(each) and isinstance(each, GptOssExperts) for each in experts_of(gpt))

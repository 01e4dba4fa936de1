"""Gate and up projection of experts in place as one layer, as two, or as loses less."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe import CP
from tensormoe.compression import GATE_UP
from tensormoe.decomposition import Search
from tensormoe.errors import SpecError
from tensormoe_torch import SparseMoE, compress
from tensormoe_torch.allocation import model_sites
from tensormoe_torch.compression import (
    FactorizedExperts,
    calibrate,
    evaluate,
    heal,
    next_token_loss,
    reduce_experts,
)
from tests._compress_models import logits
from tests._more_models import RANK, experts_of, low_rank
from tests._torch_moe import TOKENS, Expert, OneByOne, Plain, Stored, dense, sparse

QUICK = Search(sweeps=8, polish=1)
BOTH, TWO = ["gate_up_proj", "down_proj"], ["gate_proj", "up_proj", "down_proj"]


def roles(report: Any) -> list[list[str]]:
    return [[each.role for each in module.projections] for module in report.modules]


def filled(original: nn.Module, compressed: nn.Module) -> Any:
    """A copy of a model with stacks, and what the factors of joined layers stand for in them."""
    model = copy.deepcopy(original)
    for name, module in compressed.named_modules():
        if isinstance(module, FactorizedExperts):
            assert module.gate_up_proj is not None
            old: Any = model.get_submodule(name)
            with torch.no_grad():
                old.gate_up_proj.copy_(dense(module.gate_up_proj)[0].transpose(1, 2))
                old.down_proj.copy_(dense(module.down_proj)[0].transpose(1, 2))
    return model


@pytest.mark.parametrize("kind", ["tensor_ring", "low_rank", "shared_basis"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_joined_layers_compute_what_their_dense_reconstruction_does(name: str, kind: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    report = compress(model, kind, budget=0.5, search=QUICK, gate_up="joined", inputs=TOKENS)
    assert all(each == BOTH for each in roles(report))
    before, after = report.parameters
    assert after <= 0.5 * before
    wanted = filled(original, model)
    found, expected = model(TOKENS).logits, wanted(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (found - original(TOKENS).logits).norm() > 0.01 * found.norm()
    # gradients of what both have, by the chain rule over matrices
    for each in (model, wanted):
        each(TOKENS).logits.square().sum().backward()
    mine, theirs = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert sum(key in theirs for key in mine) > 5
    for key, parameter in mine.items():
        assert parameter.grad is not None
        if key in theirs:
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-7, atol=1e-9)


def test_every_way_of_calling_agrees() -> None:
    model = sparse("qwen3_moe", torch.float32)
    original = copy.deepcopy(model)
    compress(model, "low_rank", budget=0.5, gate_up="joined")
    wanted = filled(original, model)
    experts: Any = model.model.layers[0].mlp.experts
    old: Any = wanted.model.layers[0].mlp.experts
    torch.manual_seed(0)
    for rows in (0, 1, 7, 64):
        x, weights = torch.randn(rows, 16), torch.rand(rows, 2)
        index = torch.stack([torch.randperm(4)[:2] for _ in range(rows)] or [torch.zeros(2)]).long()
        given = x, index[:rows], weights
        expected = old(*given)
        for enabled in (False, True):
            # without gradients what experts share is multiplied once
            with torch.set_grad_enabled(enabled):
                torch.testing.assert_close(experts(*given), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        sum(experts[n](x) for n in range(4)), experts.every(x).sum(0), rtol=1e-4, atol=1e-5
    )
    # steps with a cache of keys and values
    for cache in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
        said = (each.generate(TOKENS[:1, :5], **options) for each in (model, wanted))
        assert torch.equal(*said)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(TOKENS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [None, 8])
def test_joined_models_are_saved_and_loaded(bits: int | None, tmp_path: Path) -> None:
    model = sparse("mixtral", torch.float32)
    compress(model, "low_rank", budget=0.5, gate_up="joined", bits=bits)
    model.save_pretrained(tmp_path / "model")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    again.set_experts_implementation("eager")
    assert torch.equal(logits(again), logits(model))
    assert [*again.model.layers[0].mlp.experts.projections] == BOTH


@pytest.mark.parametrize("bias", [False, True])
def test_lists_of_experts_are_joined(bias: bool) -> None:
    torch.manual_seed(0)
    model: Any = OneByOne([Expert(bias=bias) for _ in range(4)])
    if bias:
        # one of both without
        for each in model.experts:
            each.w3.bias = None
    x = torch.randn(9, 6)
    before = model(x)
    again, report = model, compress(model, "dense", gate_up="joined")
    assert roles(report) == [BOTH]
    assert report.modules[0].projections[0].sizes == (6, 16)
    torch.testing.assert_close(again(x), before, rtol=1e-5, atol=1e-5)
    assert again.experts.gate_up_proj.spec.bias is bias
    # and taken apart again, as dense experts of ours
    assert roles(compress(model, "dense", gate_up="apart")) == [TWO]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert model.experts.act_fn is F.silu or isinstance(model.experts.act_fn, nn.SiLU)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stacks_of_every_kind(transposed: bool, turns: bool, bias: bool) -> None:
    torch.manual_seed(0)
    stored = Stored(transposed, turns, bias, gated=True)
    x, index, weights = torch.randn(5, 6), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    before = stored(x, index, weights)
    for way, wanted in (("joined", BOTH), ("apart", TWO), ("stored", TWO)):
        model = nn.ModuleDict({"experts": copy.deepcopy(stored)})
        assert roles(compress(model, "dense", gate_up=way)) == [wanted]
        found = model["experts"](x, index, weights)
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


def shared_inputs(model: Any) -> None:
    """Gate and up projections of the first layer use three directions of inputs, the second's two
    times three."""
    with torch.no_grad():
        for layer, each in enumerate(experts_of(model)):
            experts, width, rows = each.gate_up_proj.shape
            parts = []
            left = torch.randn(2, experts, 3, rows)
            for place in range(2):
                right = torch.randn(experts, width // 2, 3)
                parts.append(right @ left[0 if layer == 0 else place])
            each.gate_up_proj.copy_(torch.cat(parts, dim=1) / 8)


@pytest.mark.parametrize(
    "how", ["weights", "inputs", "moments", "gradients", "sensitivity", "bits"]
)
def test_each_layer_gets_the_way_that_loses_less(how: str) -> None:
    model = sparse("mixtral", torch.float32)
    shared_inputs(model)
    options: dict[str, Any] = {"budget": 0.3}
    tokens = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(0))
    if how == "inputs":
        options |= {"inputs": tokens, "weighted": True}
    elif how != "weights":
        loss = None if how == "moments" else next_token_loss
        options["calibration"] = calibrate(model, tokens, loss=loss, per_expert=True)
    if how == "sensitivity":
        options["share"] = how
    if how == "bits":
        options["bits"] = "auto"
    found = {}
    for way in GATE_UP[1:]:
        each = copy.deepcopy(model)
        found[way] = each, compress(each, "low_rank", gate_up=way, **options)
    _, report = found["auto"]
    before, after = report.nbytes
    assert after <= 0.3 * before
    if how in ("weights", "inputs", "moments", "gradients"):
        assert roles(report) == [BOTH, TWO]
        # the same factors as where all layers are taken that way
        for place, way in enumerate(("joined", "apart")):
            mine, theirs = (found[w][0].model.layers[place].mlp.experts for w in ("auto", way))
            for key, value in mine.state_dict().items():
                assert torch.equal(value, theirs.state_dict()[key])
    if how == "gradients":
        predicted = {way: each.predicted_loss for way, (_, each) in found.items()}
        assert predicted["auto"] < min(predicted["joined"], predicted["apart"])
    assert logits(found["auto"][0]).isfinite().all()


def test_what_comes_out_goes_on() -> None:
    original = sparse("mixtral", torch.float32)
    model = copy.deepcopy(original)
    compress(model, "shared_basis", budget=0.5, gate_up="joined")
    found = evaluate(original, model, [TOKENS], layers=True)
    assert found.divergence > 0
    before = copy.deepcopy(model.state_dict())
    heal(model, original, [TOKENS], steps=2)
    trained = [
        key for key, each in model.state_dict().items() if not torch.equal(each, before[key])
    ]
    assert any("gate_up_proj.factors" in key for key in trained)
    plain = copy.deepcopy(original)
    compress(plain, "dense", gate_up="joined")
    torch.testing.assert_close(logits(plain), logits(original), rtol=1e-4, atol=1e-4)
    sites = model_sites(plain, "experts")
    assert [each.role for each in sites[0].projections] == BOTH
    compress(plain, CP(6), gate_up="joined")


def test_what_cannot_be_is_refused() -> None:
    model = sparse("mixtral", torch.float32)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    with pytest.raises(SpecError, match=r"gate_up must be one of 'stored'.*got 'one'"):
        compress(model, "cp", rank=2, gate_up="one")
    for size in ({"rank": 2}, {"budget": 500}, {"tolerance": 0.1}):
        with pytest.raises(SpecError, match=r"gate_up='auto' .* needs a budget that is a share"):
            compress(model, "cp", gate_up="auto", **size)
    lone = nn.ModuleDict({"experts": nn.ModuleList(Plain() for _ in range(3))})
    for way in GATE_UP[1:]:
        with pytest.raises(SpecError, match=r"needs experts with a gate; those of 'experts'"):
            compress(lone, "cp", budget=0.5, gate_up=way)
    own = low_rank("gpt_oss")
    for way in ("apart", "auto"):
        with pytest.raises(SpecError, match=r"GptOssExperts\) gate in a way of their own"):
            compress(own, "cp", budget=0.5, gate_up=way)
    assert roles(compress(own, "tucker", rank=RANK, gate_up="joined")) == [BOTH, BOTH]
    mixture = nn.ModuleDict({"moe": SparseMoE(6, 8, experts=4, top_k=2)})
    with pytest.raises(SpecError, match="belong to a mixture that has both in one layer"):
        compress(mixture, "cp", budget=0.5, gate_up="apart")
    assert roles(compress(mixture, "cp", budget=0.5, gate_up="joined")) == [BOTH]
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


def test_merged_experts_are_joined_as_well() -> None:
    model = sparse("mixtral", torch.float32)
    reduce_experts(model, TOKENS, how="merge", keep=0.5)
    before = logits(model)
    compress(model, "dense", gate_up="joined")
    experts: Any = model.model.layers[0].mlp.experts
    assert [*experts.projections] == BOTH
    assert experts.groups is not None
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_experts_of_one_function_cannot_be_taken_apart() -> None:
    def whole(both: Tensor) -> Tensor:
        return both[..., ::2] * both[..., 1::2]

    model = sparse("mixtral", torch.float32)
    compress(model, "dense", gate_up="joined")
    experts: Any = model.model.layers[0].mlp.experts
    experts.act_fn = whole
    with pytest.raises(SpecError, match="a function of both that can't be taken apart"):
        compress(model, "dense", gate_up="apart")

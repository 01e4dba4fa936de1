"""Experts of PyTorch models, merged and pruned in place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe.decomposition import Search
from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch import CartesianMoE, SparseMoE, compress, reduce_experts
from tensormoe_torch.compression import FactorizedExperts
from tests._torch_moe import STACKED, TOKENS, Expert, OneByOne, sparse

QUICK = Search(sweeps=5, polish=0)
HERE = "model.layers.0.mlp.experts"


def mixture(**options: Any) -> SparseMoE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"experts": 6, "top_k": 2, "dtype": torch.float64} | options
    return SparseMoE(5, None if options.get("kind") == "linear" else 7, **sizes)


def tokens(count: int = 40, features: int = 5) -> Tensor:
    return torch.randn(
        count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def equal_in_pairs(layer: SparseMoE) -> None:
    """Experts 2n and 2n + 1 compute the same, with hidden units in another order."""
    order = torch.randperm(7)
    up: Any = layer.experts.gate_up_proj
    for n in range(0, 6, 2):
        weight = up.factors["weight"]
        weight[n + 1] = weight[n][:, torch.cat([order, order + 7])]
        down = layer.experts.down_proj.factors["weight"]
        down[n + 1] = down[n][order]
        # the router's logits are as similar
        layer.router.projection[:, n + 1] = 0.02 * layer.router.projection[:, n]


def test_experts_that_differ_in_the_order_of_units_merge_without_loss() -> None:
    layer = mixture()
    equal_in_pairs(layer)
    model = nn.Sequential(layer)
    x = tokens()
    wanted = layer(x)
    rough = copy.deepcopy(layer)
    report = reduce_experts(model, x, keep=3)
    assert report.modules[0].experts == (6, 3)
    assert {frozenset(each) for each in report.modules[0].groups} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
        frozenset({4, 5}),
    }
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
    assert report.modules[0].output_error is not None
    assert report.modules[0].output_error < 1e-7
    # without alignment, the order of units matters
    wrapped = nn.Sequential(rough)
    blurred = reduce_experts(wrapped, x, keep=3, align=False)
    assert blurred.modules[0].output_error is not None
    assert blurred.modules[0].output_error > 0.1


def test_two_choices_of_one_expert_count_with_the_sum_of_their_weights() -> None:
    layer = mixture()
    x = tokens()
    model = nn.Sequential(layer)
    reduce_experts(model, x, keep=1)
    assert layer.config.groups == (0,) * 6
    index = torch.zeros(40, 1, dtype=torch.long)
    routes = layer.route(x)
    assert routes.logits.shape == (40, 6)
    total = routes.top_k_weights.sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x, routes), layer.experts(x, index, total))


def test_one_expert_per_group_changes_nothing() -> None:
    layer = mixture()
    before = layer.config
    experts = layer.experts
    report = reduce_experts(nn.Sequential(layer), tokens(), keep=1.0)
    assert layer.config == before
    assert layer.experts is experts
    assert report.modules[0].output_error == 0.0
    assert report.parameters[0] == report.parameters[1]


@pytest.mark.parametrize("kind", ["swiglu", "mlp", "linear"])
@pytest.mark.parametrize("how", ["merge", "prune"])
def test_sparse_mixtures_are_saved_rebuilt_and_trained(kind: str, how: str, tmp_path: Any) -> None:
    import tensormoe_numpy

    shared: dict[str, Any] = {} if kind == "linear" else {"shared_features": 3, "mix_shared": True}
    layer = mixture(kind=kind, bias=True, router="sigmoid", dtype=torch.float32, **shared)
    x = tokens().float()
    hooked: list[Any] = []
    layer.router.register_forward_hook(lambda *each: hooked.append(each[-1]))
    reduce_experts(nn.Sequential(layer), x, keep=3, how=how)
    hooked.clear()
    wanted = layer(x)
    assert hooked[0].scores.shape == (40, 6 if how == "merge" else 3)
    layer.save(tmp_path / "file")
    torch.testing.assert_close(SparseMoE.load(tmp_path / "file")(x), wanted)
    ours = tensormoe_numpy.SparseMoE.load(tmp_path / "file")
    torch.testing.assert_close(torch.tensor(ours(x.detach().numpy())), wanted.detach())
    again = eval(repr(layer), {"SparseMoE": SparseMoE, "torch": torch, **_names()})
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), wanted)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(_bare(layer)))):
        torch.testing.assert_close(twin(x), wanted)
    assert layer.num_parameters == sum(each.numel() for each in layer.parameters())
    assert layer.cost(10).parameters == layer.num_parameters
    torch._dynamo.reset()
    compiled = torch.compile(_bare(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    wanted.sum().backward()
    assert all(each.grad is not None for each in layer.parameters())
    assert layer(torch.empty(0, 5)).shape == (0, 5)


def _bare(layer: SparseMoE) -> SparseMoE:
    found = copy.deepcopy(layer)
    found.router._forward_hooks.clear()
    return found


def _names() -> dict[str, Any]:
    import tensormoe
    from tensormoe.routing import Router

    return {"Router": Router} | {
        n: getattr(tensormoe, n) for n in ("Dense", "CP", "float32") if hasattr(tensormoe, n)
    }


def test_pruned_routers_normalize_over_what_is_left() -> None:
    layer = mixture(dtype=torch.float64)
    original = copy.deepcopy(layer)
    x = tokens()
    report = reduce_experts(nn.Sequential(layer), x, keep=3, how="prune")
    kept = [each for (each,) in report.modules[0].groups]
    frequencies = report.modules[0].frequencies
    assert sorted(frequencies[n] for n in kept) == sorted(frequencies)[3:]
    with torch.no_grad():
        masked = original.route(x).logits[:, kept].softmax(-1)
        weights, index = masked.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        wanted = original.experts(x, torch.tensor(kept)[index], weights)
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("how", ["merge", "prune"])
def test_mixtures_are_compressed_further(how: str, tmp_path: Any) -> None:
    layer = mixture(dtype=torch.float32)
    model = nn.Sequential(layer)
    x = tokens().float()
    reduce_experts(model, x, keep=4, how=how)
    dense = layer(x).detach()
    size = layer.num_parameters
    report = compress(model, "tucker", budget=0.6, inputs=x, search=QUICK)
    assert [each.role for each in report.modules[0].projections] == ["gate_up_proj", "down_proj"]
    assert layer.num_parameters < size
    assert layer.config.experts.down.factorization.name == "tucker"
    found = layer(x).detach()
    gap = float((found - dense).norm() / dense.norm())
    assert 0.0 < gap < 1.0
    layer.save(tmp_path / "file")
    torch.testing.assert_close(SparseMoE.load(tmp_path / "file")(x).detach(), found)
    with pytest.raises(SpecError, match="the model must hold experts"):
        compress(model, "cp", budget=0.5, search=QUICK)


@pytest.mark.parametrize("name", STACKED)
def test_models_of_transformers_merge(name: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    report = reduce_experts(model, TOKENS, keep=2)
    assert report.modules[0].experts == (4, 2)
    assert report.parameters[1] * 2 == report.parameters[0]
    experts: Any = model.get_submodule(report.names[0])
    assert isinstance(experts, FactorizedExperts)
    assert experts.num_experts == 4
    old: Any = original.get_submodule(report.names[0])
    first, groups = old.gate_up_proj, report.modules[0].groups
    frequencies = torch.tensor(report.modules[0].frequencies)
    place = next(k for k, each in enumerate(groups) if len(each) > 1)
    shares = frequencies[list(groups[place])]
    assert shares.argmax() == 0
    # the sum over hidden units does not know their order
    wanted = (shares / shares.sum()).double() @ first[list(groups[place])].sum(1)
    made = torch.cat(
        [each.factors["weight"][place] for each in (experts.gate_proj, experts.up_proj)], 1
    )
    torch.testing.assert_close(made.sum(1), wanted)
    out = model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 5


@pytest.mark.parametrize("name", STACKED)
def test_models_of_transformers_are_pruned_as_they_are(name: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = sparse(name, torch.float32)
    original = copy.deepcopy(model)
    kind = type(model)
    report = reduce_experts(model, TOKENS, keep=3, how="prune")
    assert report.modules[0].experts == (4, 3)
    for each in report.modules:
        block = each.name.removesuffix(".experts")
        old, new = (held.get_submodule(block).state_dict() for held in (original, model))
        left = [n for (n,) in each.groups]
        assert new["experts.down_proj"].shape[0] == new["gate.weight"].shape[0] == 3
        for key, array in new.items():
            whole = old[key]
            assert torch.equal(array, whole if array.shape == whole.shape else whole[left]), key
    wanted = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is kind
    again.set_experts_implementation("eager")
    torch.testing.assert_close(again(TOKENS).logits, wanted)


@pytest.mark.parametrize("factorized", [False, True])
def test_merged_models_of_transformers_are_saved(factorized: bool, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    import tensormoe_torch.huggingface  # noqa: F401

    model = sparse("mixtral", torch.float32)
    reduce_experts(model, TOKENS, keep=0.5)
    if factorized:
        compress(model, "cp", rank=4, inputs=TOKENS, search=QUICK)
    wanted = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, wanted)
    for name, module in model.named_modules():
        if isinstance(module, FactorizedExperts):
            assert torch.equal(again.get_submodule(name).groups, module.groups)
    again.load_state_dict(model.state_dict())


def test_reported_errors_of_merged_experts_that_are_compressed() -> None:
    model = sparse("mixtral")
    reduce_experts(model, TOKENS, keep=2)
    merged: Any = copy.deepcopy(model.get_submodule(HERE))
    given: list[Any] = []
    model.get_submodule(HERE).register_forward_pre_hook(lambda _, each: given.append(each))
    report = compress(model, "cp", rank=4, inputs=TOKENS, search=QUICK)
    new: Any = model.get_submodule(HERE)
    with torch.no_grad():
        wanted = merged(*given[0])
        gap = float((new(*given[0]) - wanted).norm() / wanted.norm())
    assert 0.1 < gap < 1.5
    assert report.modules[0].output_error == pytest.approx(gap, rel=1e-5)


@pytest.mark.parametrize("how", ["merge", "prune"])
def test_lists_of_experts(how: str) -> None:
    torch.manual_seed(0)
    model = OneByOne([Expert(bias=True) for _ in range(4)])
    original = copy.deepcopy(model)
    x = torch.randn(60, 6)
    report = reduce_experts(model, x, keep=3, how=how)
    assert report.modules[0].experts == (4, 3)
    assert len(model.experts) == (4 if how == "merge" else 3)
    found = model(x)
    assert found.shape == x.shape
    if how == "merge":
        alone = next(k for k, each in enumerate(report.modules[0].groups) if len(each) == 1)
        (number,) = report.modules[0].groups[alone]
        torch.testing.assert_close(model.experts[number](x), original.experts[number](x))
    else:
        assert model.gate.out_features == 3
        assert model.gate.weight.shape == (3, 6)


@pytest.mark.parametrize("how", ["merge", "prune"])
def test_dtype_mode_flags_and_hooks_stay(how: str) -> None:
    model = sparse("mixtral", torch.bfloat16).train()
    calls: list[int] = []
    block: Any = model.get_submodule(HERE.removesuffix(".experts"))
    for each in (block.experts, block.gate):
        each.register_forward_hook(lambda *_: calls.append(1))
    block.experts.requires_grad_(False)
    reduce_experts(model, TOKENS, keep=3, how=how)
    assert model.training
    assert block.experts.training
    assert all(each.dtype == torch.bfloat16 for each in model.parameters())
    assert not any(each.requires_grad for each in block.experts.parameters())
    assert block.gate.weight.requires_grad
    calls.clear()
    model(TOKENS).logits.sum().backward()
    assert calls == [1, 1]
    assert block.gate.weight.grad is not None


def test_a_model_that_fails_when_it_is_pruned_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = OneByOne([Expert() for _ in range(4)])
    x = torch.randn(30, 6)
    wanted = model(x)
    # two experts per token, which only the model itself knows
    refused(model, "must run with fewer experts", inputs=x, keep=1, how="prune")
    assert torch.equal(model(x), wanted)
    assert model.gate.out_features == 4
    assert [*dict(model.experts.named_children())] == ["0", "1", "2", "3"]
    reduce_experts(model, x, keep=2, how="prune")
    assert len(model.experts) == 2


def test_shares_of_all_experts_are_allotted_to_layers() -> None:
    model = sparse("mixtral")
    report = reduce_experts(model, TOKENS, keep=0.5)
    assert sum(each.experts[1] for each in report.modules) == 4
    kept = [[each.frequencies[group[0]] for group in each.groups] for each in report.modules]
    left = [
        sorted(set(each.frequencies) - set(found), reverse=True)
        for each, found in zip(report.modules, kept, strict=True)
    ]
    rest = [value for each in kept for value in sorted(each)[:-1]]
    assert all(value >= most for value in rest for each in left for most in each[:1])
    assert "whole model" in str(report)
    assert report.to_dict()["modules"][0]["experts"] == report.modules[0].experts
    assert "<table" in report._repr_html_()


def test_parts_of_other_mixtures_are_left_alone() -> None:
    torch.manual_seed(0)
    inner = CartesianMoE(6, 8, experts=4, top_k=2)
    model = nn.Sequential(inner)
    refused(model, "must hold experts", inputs=torch.randn(20, 6))
    outer = SparseMoE(6, 8, experts=4, top_k=2)
    model = nn.Sequential(inner, outer)
    report = reduce_experts(model, torch.randn(20, 6), keep=2)
    assert report.names == ("1.experts",)
    assert inner.config.half.experts.num_experts == 4
    found = compress(model, "cp", rank=2, search=QUICK)
    assert found.names == ("1.experts",)


def refused(
    model: nn.Module, message: str, inputs: Any = TOKENS, kind: Any = SpecError, **options: Any
) -> None:
    before = {key: each.clone() for key, each in model.state_dict().items()}
    modules = [type(each) for each in model.modules()]
    with pytest.raises(kind, match=message):
        reduce_experts(model, inputs, **{"keep": 2} | options)
    assert [type(each) for each in model.modules()] == modules
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, each in before.items():
        torch.testing.assert_close(after[key], each, equal_nan=True, rtol=0, atol=0)


def test_bad_input() -> None:
    model = sparse("mixtral")
    for keep in (0, -1, True, "2", None):
        refused(model, "keep must be a positive integer", keep=keep)
    refused(model, "keep must be 1 to 4 experts per layer; got 5", keep=5)
    refused(model, "keep must be a share in", keep=1.5)
    refused(model, "keep must leave every layer 1 experts, 2 of 8; got 0.1", keep=0.1)
    refused(model, "how must be", how="drop")
    refused(model, "keep must be 2 to 4", keep=1, how="prune")
    refused(model, "equally many experts in every layer", keep=0.5, how="prune")
    refused(model, "all layers of a model", how="prune", select=HERE)
    refused(model, "tokens", inputs=[])
    refused(model, "inputs must be", inputs=3)
    refused(nn.Linear(2, 2), "must hold experts")
    with pytest.raises(SpecError, match=r"nn\.Module"):
        reduce_experts(3, TOKENS, keep=2)  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = torch.nan
    refused(model, "finite", kind=ShapeError, inputs=TOKENS, keep=1)


def test_experts_that_were_merged_before_are_refused() -> None:
    model = sparse("mixtral")
    reduce_experts(model, TOKENS, keep=3)
    refused(model, "merged before", keep=2)
    layer = mixture()
    reduce_experts(nn.Sequential(layer), tokens(), keep=3)
    refused(nn.Sequential(layer), "merged before", inputs=tokens(), keep=2)


def test_lists_of_experts_of_different_sizes_and_without_a_router_are_refused() -> None:
    model = OneByOne([Expert(), Expert(hidden=9)])
    refused(model, "same shapes", kind=ShapeError, inputs=torch.randn(9, 6), keep=1)
    model = OneByOne([Expert() for _ in range(3)])
    model.gate = Wide()
    refused(model, "must have one router beside them", inputs=torch.randn(9, 6), keep=1)
    model = OneByOne([Expert() for _ in range(3)])
    model.gate = Reading()
    refused(model, "must be called", inputs=torch.randn(9, 6), keep=1)


class Wide(nn.Module):
    """A router without a weight (experts, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class Reading(nn.Module):
    """A router that reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight)


def test_routers_of_several_layers() -> None:
    torch.manual_seed(0)
    model = OneByOne([Expert() for _ in range(3)])
    model.gate = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))  # type: ignore[assignment]
    x = torch.randn(50, 6)
    logits = model.gate(x).detach().double()
    report = reduce_experts(model, x, keep=2)
    cosines = nn.functional.normalize(logits, dim=0)
    group = max(report.modules[0].groups, key=len)
    similarity = report.modules[0].similarity
    assert similarity is not None
    wanted = float(cosines[:, group[0]] @ cosines[:, group[1]])
    assert similarity[group[1]] == pytest.approx(wanted, abs=1e-6)

"""Experts of PyTorch models, pruned by REAP and merged by average outputs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn

from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch import SparseMoE, compress, reduce_experts
from tensormoe_torch.compression import ReductionReport
from tests._more_models import low_rank
from tests._torch_moe import STACKED, TOKENS, Expert, OneByOne, sparse


def given(model: nn.Module, name: str, tokens: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Experts of a layer, and what they get: tokens, numbers and weights."""
    found: list[Any] = []
    experts = model.get_submodule(name)
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: found.append([*args, *kwargs.values()]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    rows, index, weights = found[0]
    return experts, rows, index, weights


def alone(experts: Any, n: int, rows: Tensor) -> Tensor:
    """One expert's outputs, by the model's own code."""
    index = torch.full((len(rows), 1), n)
    with torch.no_grad():
        found: Tensor = experts(rows, index, torch.ones(len(rows), 1, dtype=rows.dtype))
    return found


def saliency(experts: Any, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The definition, expert by expert."""
    found = []
    for n in range(4):
        token, place = torch.where(index == n)
        norms = alone(experts, n, rows[token]).norm(dim=-1)
        found.append((weights[token, place] * norms).mean() if len(token) else torch.tensor(0.0))
    return torch.stack(found).double()


@pytest.mark.parametrize("name", STACKED)
def test_saliency_decides_which_experts_stay(name: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    report = reduce_experts(model, [TOKENS[:1], TOKENS[1:]], keep=3, how="prune", score="reap")
    assert (report.how, report.criterion, report.tokens) == ("prune", "reap", TOKENS.numel())
    differs = False
    for each in report.modules:
        wanted = saliency(*given(original, each.name, TOKENS))
        assert each.saliency is not None
        torch.testing.assert_close(
            torch.tensor(each.saliency).double(), wanted, rtol=1e-5, atol=1e-9
        )
        kept = [n for (n,) in each.groups]
        assert kept == sorted(wanted.topk(3).indices.tolist())
        frequent = sorted(torch.tensor(each.frequencies).topk(3).indices.tolist())
        differs |= kept != frequent
        router, old = (
            held.get_submodule(each.name.removesuffix(".experts")).gate.weight
            for held in (model, original)
        )
        assert torch.equal(router, old[kept])
    # not what frequencies would have kept
    assert differs or name == "deepseek_v2"
    assert "REAP" in str(report)
    assert report.to_dict()["criterion"] == "reap"


@pytest.mark.parametrize("name", STACKED)
def test_average_outputs_decide_what_is_merged(name: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    report = reduce_experts(model, [TOKENS[:1], TOKENS[1:]], keep=2, groups="outputs", align=False)
    assert report.criterion == "outputs"
    for each in report.modules:
        experts, rows, index, weights = given(original, each.name, TOKENS)
        # over all tokens, also those of other experts
        means = torch.stack([alone(experts, n, rows).mean(0) for n in range(4)])
        labels = fcluster(linkage(means.numpy(), "average"), 2, "maxclust")
        wanted = {frozenset(n for n in range(4) if labels[n] == label) for label in {*labels}}
        assert {frozenset(group) for group in each.groups} == wanted
        assert each.similarity is not None
        for group in each.groups:
            for n in group:
                cosine = torch.cosine_similarity(means[n], means[group[0]], dim=0)
                assert each.similarity[n] == pytest.approx(float(cosine), abs=1e-6)
        # averages are weighted by frequencies
        new: Any = model.get_submodule(each.name)
        shares = torch.tensor(each.frequencies).double()
        for place, group in enumerate(each.groups):
            own = shares[list(group)]
            own = own / own.sum() if own.sum() else torch.eye(len(group)).double()[0]
            down = torch.einsum("n,noh->ho", own, experts.down_proj[list(group)])
            torch.testing.assert_close(new.down_proj.factors["weight"][place], down)
        with torch.no_grad():
            missing = new(rows, index, weights) - experts(rows, index, weights)
            error = float(missing.norm() / experts(rows, index, weights).norm())
        assert each.output_error == pytest.approx(error, rel=1e-5)
        assert error > 0.05


def test_several_batches_count_as_one() -> None:
    options: list[dict[str, Any]] = [
        {"how": "prune", "score": "reap"},
        {"groups": "outputs"},
        {"groups": "router"},
        {"how": "prune"},
    ]
    for each in options:
        one, other = sparse("mixtral"), sparse("mixtral")
        ran: list[int] = []
        first = reduce_experts(one, TOKENS, keep=3, **each)
        second = reduce_experts(
            other, [TOKENS[:1], TOKENS[1:]], keep=3, callback=ran.append, **each
        )
        assert ran == [1, 2, 3, 4]
        assert first.tokens == second.tokens == 24
        for module, twin in zip(first.modules, second.modules, strict=True):
            assert module.groups == twin.groups
            assert module.output_error == pytest.approx(twin.output_error)
        torch.testing.assert_close(one(TOKENS).logits, other(TOKENS).logits)


@pytest.mark.parametrize(
    "options", [{}, {"groups": "outputs"}, {"how": "prune"}, {"how": "prune", "score": "reap"}]
)
def test_batches_of_any_shape_and_reports_as_json(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = SparseMoE(5, 7, experts=6, top_k=2)
    batches = [torch.empty(0, 5), torch.randn(30, 5), torch.randn(2, 3, 5)]
    report = reduce_experts(nn.Sequential(layer), batches, keep=3, **options)
    assert report.tokens == 36
    assert ReductionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    model = nn.Sequential(SparseMoE(5, 7, experts=6, top_k=2))
    with pytest.raises(SpecError, match="must give all selected experts tokens"):
        reduce_experts(model, torch.empty(0, 5), keep=3, **options)


def test_lists_of_experts_merge_by_outputs() -> None:
    torch.manual_seed(0)
    model = OneByOne([Expert(bias=True) for _ in range(4)])
    x = torch.randn(60, 6)
    with torch.no_grad():
        means = torch.stack([expert(x).mean(0) for expert in model.experts])
    report = reduce_experts(model, x, keep=2, groups="outputs")
    labels = fcluster(linkage(means.numpy(), "average"), 2, "maxclust")
    wanted = {frozenset(n for n in range(4) if labels[n] == label) for label in {*labels}}
    assert {frozenset(group) for group in report.modules[0].groups} == wanted
    assert report.tokens == 60
    model = OneByOne([Expert() for _ in range(4)])
    with pytest.raises(SpecError, match=r"needs the router's weights; .* called one by one"):
        reduce_experts(model, x, keep=2, how="prune", score="reap")


def test_sparse_mixtures_of_ours() -> None:
    torch.manual_seed(0)
    layer: Any = SparseMoE(5, 7, experts=6, top_k=2, bias=True, dtype=torch.float64)
    x = torch.randn(40, 5, dtype=torch.float64)
    with torch.no_grad():
        # it has few tokens, but gives much
        layer.experts.down_proj.factors["weight"][3] *= 50.0
        layer.router.projection[:, 3] *= 0.3
    merged = copy.deepcopy(layer)
    report = reduce_experts(nn.Sequential(layer), x, keep=2, how="prune", score="reap")
    assert (3,) in report.modules[0].groups
    saliency = report.modules[0].saliency
    assert saliency is not None
    assert saliency[3] == max(saliency)
    report = reduce_experts(nn.Sequential(merged), x, keep=3, groups="outputs")
    assert merged.config.groups is not None
    # far from all others
    assert (3,) in report.modules[0].groups


@pytest.mark.parametrize("how", ["merge", "prune"])
def test_a_uniform_share_is_of_every_layer(how: str) -> None:
    model = sparse("mixtral")
    report = reduce_experts(model, TOKENS, keep=0.5, how=how, uniform=True)
    assert [each.experts for each in report.modules] == [(4, 2), (4, 2)]
    with pytest.raises(SpecError, match=r"keep must leave every layer 2 experts; got 0.25, 1 of 4"):
        reduce_experts(sparse("mixtral"), TOKENS, keep=0.25, how="prune", uniform=True)
    with pytest.raises(SpecError, match=r"keep must leave every layer 1 experts; got 0.1, 0 of 4"):
        reduce_experts(sparse("mixtral"), TOKENS, keep=0.1, uniform=True)


def test_what_cannot_be_is_refused() -> None:
    def refused(message: str, inputs: Any = TOKENS, kind: Any = SpecError, **options: Any) -> None:
        model = sparse("mixtral")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match=message):
            reduce_experts(model, inputs, **{"keep": 2} | options)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], each) for key, each in before.items())

    refused("groups must be", groups="cosine")
    refused("score must be", score="norm", how="prune")
    refused("uniform must be", uniform=1)
    refused("got groups='outputs' with how='prune'", groups="outputs", how="prune")
    refused("got score='reap' with how='merge'", score="reap")
    refused("do not compare", score="reap", how="prune", keep=0.5)
    refused(
        r"must choose at least the 3 experts that stay; the 1 tokens .* chose 2 of 4",
        inputs=TOKENS[:1, :1],
        keep=3,
        how="prune",
    )
    refused(r"chose 2 of 4", inputs=TOKENS[:1, :1], keep=3)
    # clusters do not need choices
    reduce_experts(sparse("mixtral"), TOKENS[:1, :1], keep=3, groups="outputs")


@pytest.mark.parametrize(
    "options", [{"how": "prune", "score": "reap"}, {"groups": "outputs"}, {"groups": "router"}]
)
def test_activations_that_are_not_finite_are_refused(options: dict[str, Any]) -> None:
    model = sparse("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = torch.inf
    with pytest.raises(ShapeError, match=r"finite.*layers.1.mlp.experts|layers.1.*finite"):
        reduce_experts(model, TOKENS, keep=2, **options)


def test_experts_with_a_gate_of_their_own() -> None:
    model = low_rank("gpt_oss")
    original = copy.deepcopy(model)
    report = reduce_experts(model, TOKENS, keep=3, how="prune", score="reap")
    for each in report.modules:
        wanted = saliency(*given(original, each.name, TOKENS))
        assert each.saliency is not None
        torch.testing.assert_close(
            torch.tensor(each.saliency).double(), wanted, rtol=1e-4, atol=1e-7
        )
    model = low_rank("gpt_oss")
    report = reduce_experts(model, TOKENS, keep=2, groups="outputs", align=False)
    assert report.parameters[0] == 2 * report.parameters[1]


@pytest.mark.parametrize("how", ["merge", "prune"])
def test_rounded_experts_are_refused_and_merged_ones_rounded(how: str) -> None:
    model = sparse("mixtral", torch.float32)
    compress(model, "dense", budget=1.0, bits=8)
    with pytest.raises(SpecError, match=r"'model.layers.0.mlp.experts' are rounded to 8 bits"):
        reduce_experts(model, TOKENS, keep=3, how=how)
    model = sparse("mixtral", torch.float32)
    reduce_experts(model, TOKENS, keep=3, how=how)
    before = model(TOKENS).logits
    compress(model, "dense", budget=1.0, bits=8)
    assert (model(TOKENS).logits - before).norm() < 0.05 * before.norm()

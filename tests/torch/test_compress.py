"""Experts of sparse models in factors: what the model computes is what the factors stand for."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe import CP, Dense, TensorRing, Tucker
from tensormoe.decomposition import Search
from tensormoe_torch import MuMoE, compress
from tensormoe_torch.compression import FactorizedExperts
from tests._torch_moe import (
    STACKED,
    TOKENS,
    Expert,
    OneByOne,
    Plain,
    Stored,
    dense,
    rebuilt,
    sparse,
)

QUICK = Search(sweeps=8, polish=1)


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


def routed(model: nn.Module, tokens: Tensor = TOKENS) -> dict[str, tuple[Tensor, ...]]:
    """What every module of experts gets, and gives."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith("experts") and not name.endswith("shared_experts"):

            def hook(_: Any, args: Any, output: Tensor, name: str = name) -> None:
                seen[name] = (*(each.detach() for each in args), output.detach())

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", STACKED)
def test_a_compressed_model_computes_what_its_dense_reconstruction_does(name: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    report = compress(model, "tensor_ring", budget=0.5, search=QUICK)
    assert report.names == tuple(routed(original))
    wanted = rebuilt(original, model)
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-9, atol=1e-11)
    # and not what the original does
    assert (logits(model) - logits(original)).norm() > 0.01 * logits(original).norm()
    # the router's choices and weights in the first such layer are those of the original
    first = report.names[0]
    for found, kept in zip(routed(model)[first][:3], routed(original)[first][:3], strict=True):
        torch.testing.assert_close(found, kept)


@pytest.mark.parametrize("name", STACKED)
def test_gradients_are_those_of_the_dense_reconstruction(name: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    compress(model, "cp", rank=5, search=QUICK)
    wanted = rebuilt(original, model)
    for each in (model, wanted):
        logits(each).square().sum().backward()
    found, expected = dict(model.named_parameters()), dict(wanted.named_parameters())
    shared = found.keys() & expected.keys()
    assert any("gate.weight" in key for key in shared)
    for key in shared:
        torch.testing.assert_close(found[key].grad, expected[key].grad, rtol=1e-7, atol=1e-9)
    for key, parameter in found.items():
        # the factors' own, and nothing else is new
        assert key in expected or "_proj.factors." in key
        assert parameter.grad is not None
    module = next(each for each in model.modules() if isinstance(each, FactorizedExperts))
    _check_factor_gradients(module)


def _check_factor_gradients(module: FactorizedExperts) -> None:
    """By the chain rule over matrices that autograd sees, on fresh tokens."""
    torch.manual_seed(1)
    x = torch.randn(7, module.up_proj.spec.in_features, dtype=torch.float64)
    index = torch.stack([torch.randperm(module.num_experts)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, dtype=torch.float64)
    layers: list[Any] = [module.gate_proj, module.up_proj, module.down_proj]
    factors = [each for layer in layers for each in layer.factors.values()]
    found = torch.autograd.grad(module(x, index, weights).square().sum(), factors)
    gate, up, down = (layer.materialize()[0] for layer in layers)
    out = torch.zeros_like(x)
    for k in range(2):
        chosen = index[:, k]
        hidden = module.act_fn(torch.einsum("ti,tio->to", x, gate[chosen]))
        hidden = hidden * torch.einsum("ti,tio->to", x, up[chosen])
        out = out + weights[:, k, None] * torch.einsum("ti,tio->to", hidden, down[chosen])
    wanted = torch.autograd.grad(out.square().sum(), factors)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [CP(6), TensorRing((2, 2, 3)), Tucker((3, 6, 6)), Dense()])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_of_running_dense_experts_agrees(kind: Any, implementation: str) -> None:
    model = sparse("mixtral", torch.float32)
    model.set_experts_implementation(implementation)
    original = copy.deepcopy(model)
    compress(model, kind, search=QUICK)
    wanted = rebuilt(original, model)
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-4, atol=1e-5)


def test_enough_rank_leaves_the_model_as_it_was() -> None:
    model = sparse("olmoe")
    before = logits(model)
    report = compress(model, "dense")
    assert max(p.report.error for each in report.modules for p in each.projections) < 1e-12
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-11)


def test_the_report_is_what_was_lost() -> None:
    model = sparse("qwen3_moe")
    original = copy.deepcopy(model)
    tokens = [TOKENS, (TOKENS + 5,), {"input_ids": TOKENS[:1] + 9}]
    report = compress(model, "cp", rank=9, inputs=iter(tokens), search=QUICK)
    wanted = rebuilt(original, model)
    before = sum(each.numel() for each in original.parameters())
    after = sum(each.numel() for each in model.parameters())
    assert report.model_parameters == (before, after)
    assert report.parameters[0] - report.parameters[1] == before - after > 0
    for each in report.modules:
        assert (each.kind, each.experts) == ("Qwen3MoeExperts", 4)
        old: Any = original.get_submodule(each.name)
        new: Any = wanted.get_submodule(each.name)
        missing = whole = 0.0
        for batch in (TOKENS, TOKENS + 5, TOKENS[:1] + 9):
            x, index, weights, output = routed(original, batch)[each.name]
            missing += float((new(x, index, weights).detach() - output).square().sum())
            whole += float(output.square().sum())
        assert each.output_error == pytest.approx((missing / whole) ** 0.5, rel=1e-6)
        gate, up, down = each.projections
        assert [p.role for p in each.projections] == ["gate_proj", "up_proj", "down_proj"]
        halves = [(a[:, :12], b[:, :12]) for a, b in [(old.gate_up_proj, new.gate_up_proj)]]
        halves += [(old.gate_up_proj[:, 12:], new.gate_up_proj[:, 12:])]
        halves += [(old.down_proj, new.down_proj)]
        for projection, (given, made) in zip((gate, up, down), halves, strict=True):
            error = float((given - made).detach().norm() / given.detach().norm())
            assert projection.report.error == pytest.approx(error, rel=1e-6)
            assert projection.rank == 9
            assert projection.report.dense_parameters == given.numel()
    text = str(report)
    assert f"{before:,} → {after:,}" in text
    line = next(each for each in text.splitlines() if "1.mlp.experts.down_proj" in each)
    shown = report.modules[1].projections[2].report
    assert (
        line.split()
        == (
            f"model.layers.1.mlp.experts.down_proj 4 × 12 × 16 CP(rank=9) 768 → 288 37.5% "
            f"{shown.error:.1%} {shown.svd_error:.1%} {shown.joint.error:.1%} "
            f"{shown.output_error:.1%}"
        ).split()
    )
    line = next(
        each for each in text.splitlines() if each.startswith("model.layers.1.mlp.experts ")
    )
    off = report.modules[1].output_error
    assert line.split() == f"model.layers.1.mlp.experts 2,304 → 864 37.5% {off:.1%}".split()
    place = next(k for k, each in enumerate(text.splitlines()) if each.startswith("whole model"))
    assert "total" in text.splitlines()[place - 1]
    closer = [p.report.closer for each in report.modules for p in each.projections]
    assert text.count("closer at no more parameters") == sum(each is not None for each in closer)
    assert report.to_dict()["modules"][1]["projections"][2]["rank"] == 9


def test_errors_of_a_projection_are_those_of_the_rows_that_it_gets() -> None:
    model = sparse("mixtral")
    original = copy.deepcopy(model)
    report = compress(model, "cp", rank=9, inputs=TOKENS, search=QUICK)
    module = report.modules[0]
    x, index, weights, _ = routed(original)[module.name]
    old: Any = original.get_submodule(module.name)
    new: Any = rebuilt(original, model).get_submodule(module.name)
    squares = torch.zeros(3, 2, dtype=torch.float64)
    with torch.no_grad():
        for token in range(len(x)):
            for n, w in zip(index[token], weights[token], strict=True):
                gate, up = (old.gate_up_proj[n] @ x[token]).chunk(2)
                rows = (x[token], x[token], torch.nn.functional.silu(gate) * up)
                pairs = [
                    *zip(old.gate_up_proj[n].chunk(2), new.gate_up_proj[n].chunk(2), strict=True),
                    (old.down_proj[n], new.down_proj[n]),
                ]
                for role, ((given, made), row) in enumerate(zip(pairs, rows, strict=True)):
                    squares[role, 0] += (w * ((given - made) @ row)).square().sum()
                    squares[role, 1] += (w * (given @ row)).square().sum()
    wanted = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    assert [p.report.output_error for p in module.projections] == pytest.approx(wanted, rel=1e-6)


def test_weighted_compression_lowers_the_error_of_outputs() -> None:
    def embedded() -> Any:
        model = sparse("mixtral")
        with torch.no_grad():
            # few directions of the inputs matter, as in trained models
            model.model.embed_tokens.weight *= torch.logspace(0, -3, 16, dtype=torch.float64)
        return model

    errors = {}
    for weighted in (False, True):
        report = compress(embedded(), "cp", rank=8, inputs=TOKENS, weighted=weighted)
        errors[weighted] = report.modules[0].output_error
        gate = report.modules[0].projections[0].report
        errors[weighted, "gate"] = gate.output_error
    assert errors[True, "gate"] < 0.8 * errors[False, "gate"]
    assert errors[True] < errors[False]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
def test_lists_of_experts_are_called_one_by_one(names: Any, bias: bool) -> None:
    torch.manual_seed(0)
    model = OneByOne([Expert(names, bias) for _ in range(5)]).double()
    original = copy.deepcopy(model)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    report = compress(model, "tensor_ring", budget=0.7, inputs=x)
    module: Any = model.experts
    assert isinstance(module, FactorizedExperts)
    assert len(module) == 5
    wanted = rebuilt(original, model)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-10, atol=1e-12)
    for found, expected in zip(module, wanted.experts, strict=True):
        torch.testing.assert_close(found.forward(x), expected(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module[-1](x), module[4](x))
    with pytest.raises(IndexError, match=r"expert must be in \[0, 5\); got 5"):
        module[5]
    # of the rows that each expert gets
    missing = whole = 0.0
    chosen = original.gate(x).topk(2, dim=-1).indices
    for place, (old, new) in enumerate(zip(original.experts, wanted.experts, strict=True)):
        output, made = (each(x[(chosen == place).any(-1)]).detach() for each in (old, new))
        missing += float((output - made).square().sum())
        whole += float(output.square().sum())
    assert report.modules[0].output_error == pytest.approx((missing / whole) ** 0.5, rel=1e-6)
    model(x).sum().backward()
    assert all(each.grad is not None for each in module.parameters())


def test_experts_without_a_gate_and_all_together() -> None:
    torch.manual_seed(0)
    model = OneByOne([Plain() for _ in range(4)])
    original = copy.deepcopy(model)
    compress(model, "dense")
    module: Any = model.experts
    assert isinstance(module.act_fn, nn.GELU)
    x = torch.randn(9, 6)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-5)
    index, weights = torch.randint(0, 4, (9, 3)), torch.rand(9, 3)
    wanted = torch.stack(
        [
            sum(w * original.experts[int(n)](row) for n, w in zip(*each, strict=True))
            for row, *each in zip(x, index, weights, strict=True)
        ]
    )
    torch.testing.assert_close(module(x, index, weights), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [*itertools.product([False, True], repeat=4)])
def test_stacks_are_read_however_they_are_stored(options: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Stored(*options))
    given = torch.randn(9, 6), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    with torch.no_grad():
        wanted = model[0](*given)
        compress(model, "dense")
        assert isinstance(model[0], FactorizedExperts)
        torch.testing.assert_close(model[0](*given), wanted, rtol=1e-4, atol=1e-4)


def test_layers_hold_what_decompose_found() -> None:
    model = sparse("olmoe", torch.float32)
    compress(model, "cp", rank=4, search=QUICK)
    experts: Any = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_proj, MuMoE)
    weights, _ = dense(experts.down_proj)
    assert weights.shape == (4, 12, 16)
    assert experts.num_experts == 4

"""Which parameters decay: every trainable one in exactly one group, each where it belongs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tensormoe import CP, Gate, LayerSpec, TensorRing
from tensormoe.errors import SpecError
from tensormoe.functional import parameter_rules
from tensormoe.routing import Router
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP, SparseMoE, parameter_groups
from tensormoe_torch.official import PreNormed
from tests._kinds import KINDS
from tests.torch._helpers import build, normal


def names(model: nn.Module, groups: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Names of the parameters in each group; an error if one is there twice."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [[known[id(each)] for each in group["params"]] for group in groups]
    assert len({*listed[0], *listed[1]}) == len(listed[0]) + len(listed[1])
    return set(listed[0]), set(listed[1])


def mixed() -> nn.ModuleDict:
    """Every kind of layer there is, and some of PyTorch's."""
    return nn.ModuleDict(
        {
            "tokens": nn.Embedding(11, 8),
            "table": MuMoEEmbedding(11, 8, experts=(3, 2), rank=4),
            "norm": nn.LayerNorm((3, 8)),
            "scale": nn.RMSNorm(8),
            "batch": nn.BatchNorm1d(8),
            "linear": nn.Linear(8, 8),
            "conv": nn.Conv1d(8, 8, 3),
            "layer": MuMoE(8, 8, (3, 2), TensorRing(2), gate=Gate(bias=True)),
            "block": PreNormed(MuMoEMLP(8, 16, experts=3, factorization=CP(4))),
        }
    )


def test_a_model_of_every_kind() -> None:
    model = mixed()
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, kept = names(model, groups)
    assert decayed == {
        "table.factors.output",
        "linear.weight",
        "conv.weight",
        "layer.factors.input",
        "layer.factors.output",
        "layer.gate.projection_0",
        "layer.gate.projection_1",
        "block.block.first.factors.input",
        "block.block.first.factors.output",
        "block.block.second.factors.input",
        "block.block.second.factors.output",
        "block.block.gate.projection_0",
    }
    assert kept == {name for name, _ in model.named_parameters()} - decayed


@pytest.mark.parametrize("init", ["variance", "paper"])
@pytest.mark.parametrize("experts", [(3,), (3, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_factors_that_start_around_zero_decay(
    kind: Any, experts: tuple[int, ...], init: str
) -> None:
    model = MuMoE(8, 6, experts, kind, gate=Gate(bias=True), init=init)
    decayed, kept = names(model, parameter_groups(model, 0.1))
    biases = {f"gate.bias_{level}" for level in range(len(experts))}
    # a sum has a bias in each term
    biases |= {f"factors.{name}" for name in model.factors if name.startswith("bias")}
    centers = {name for name in model.factors if name.startswith(("expert_", "mixing"))}
    assert kept == biases | {f"factors.{name}" for name in centers}
    assert {name for name in decayed if "factors" in name} == {
        f"factors.{name}" for name in set(model.spec.shapes) - centers - {"bias", "bias_1"}
    }
    assert {name for name in decayed if "gate" in name} == {
        f"gate.projection_{level}" for level in range(len(experts))
    }


def test_routers_are_gates() -> None:
    router = Router("sigmoid", bias=True, balance=0.01)
    layer = SparseMoE(
        8, 12, experts=3, top_k=2, factorization=("dense", CP(4)), router=router, bias=True
    )
    groups = parameter_groups(nn.Sequential(layer), 0.1, lr=1e-3, gate_lr=1e-4)
    known = {id(each): name for name, each in layer.named_parameters()}
    listed = [(known[id(each)], group) for group in groups for each in group["params"]]
    assert sorted(name for name, _ in listed) == sorted(known.values())
    gates = {name: group for name, group in listed if group["lr"] == 1e-4}
    assert {*gates} == {"router.projection", "router.bias"}
    assert gates["router.projection"]["weight_decay"] == 0.1
    assert gates["router.bias"]["weight_decay"] == 0.0
    kept = {name for name, group in listed if group["weight_decay"] == 0.0}
    down = "experts.projections.down_proj.factors."
    assert {f"{down}bias", f"{down}expert_0"} <= kept
    assert "experts.projections.gate_up_proj.factors.weight" not in kept


def test_dense_tables_do_not_decay() -> None:
    model = MuMoEEmbedding(11, 8, 3, "dense")
    assert names(model, parameter_groups(model, 0.1)) == (set(), {"factors.weight"})


def test_frozen_parameters_are_left_out_and_shared_ones_are_there_once() -> None:
    model = mixed()
    model["again"] = nn.Linear(8, 8)
    model["again"].weight = model["linear"].weight
    model["head"] = nn.Linear(8, 11, bias=False)
    model["head"].weight = model["tokens"].weight
    model["twin"] = model["layer"]
    model["conv"].requires_grad_(False)
    model["layer"].factors["input"].requires_grad_(False)
    decayed, kept = names(model, parameter_groups(model, 0.1))
    assert "linear.weight" in decayed
    assert "tokens.weight" in kept  # the embedding keeps it from decay
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    assert decayed | kept == trainable


def test_adamw_decays_what_it_should() -> None:
    """Without gradients, a step multiplies by 1 - lr · decay, or by one."""
    model = mixed()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1, betas=(0.0, 0.0))
    decayed, _ = names(model, optimizer.param_groups)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_decay_leaves_experts_with_what_they_share() -> None:
    """Decayed to the end, a layer goes to zero through its other factors alone."""
    layer = build(LayerSpec(6, 5, 4, CP(3), bias=False), dtype=torch.float32)
    optimizer = torch.optim.SGD(parameter_groups(layer, 0.5), lr=0.1)
    start = layer.materialize()[0].detach().clone()
    layer(normal(3, 6, dtype=torch.float32), torch.zeros(3, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.materialize()[0].detach(), 0.95**2 * start)


def test_models_without_decay_or_without_parameters() -> None:
    assert [len(group["params"]) for group in parameter_groups(nn.LayerNorm(3), 0.1)] == [0, 2]
    assert [len(group["params"]) for group in parameter_groups(nn.ReLU(), 0)] == [0, 0]
    optimizer = torch.optim.AdamW(parameter_groups(nn.LayerNorm(3), 0.1))
    optimizer.step()


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_decay_must_be_a_number(decay: Any) -> None:
    with pytest.raises(SpecError, match="weight_decay must be a number of at least 0; got"):
        parameter_groups(nn.Linear(2, 2), decay)


def test_only_modules_have_groups() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got list"):
        parameter_groups([nn.Parameter(torch.ones(2))], 0.1)  # type: ignore[arg-type]


def test_gates_with_their_own_learning_rate() -> None:
    model = mixed()
    together = names(model, parameter_groups(model, 0.1))
    groups = parameter_groups(model, 0.1, gate_lr=0.5)
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept, projections, biases = [
        {known[id(each)] for each in group["params"]} for group in groups
    ]
    assert projections == {name for name in together[0] if "gate.projection" in name}
    assert biases == {name for name in together[1] if "gate.bias" in name} != set()
    assert decayed | projections == together[0]
    assert kept | biases == together[1]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert [each["lr"] for each in optimizer.param_groups] == [0.1, 0.1, 0.5, 0.5]
    assert [each["weight_decay"] for each in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.1 * before[name] if name in together[0] else 0.0
        rate = 0.5 if ".gate." in name else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] - rate * (1.0 + decay))


@pytest.mark.parametrize("rate", [-0.1, float("nan"), "0.1", True])
def test_the_rate_of_gates_must_be_a_number(rate: Any) -> None:
    with pytest.raises(SpecError, match="gate_lr must be a number of at least 0; got"):
        parameter_groups(MuMoE(4, 3, 2, rank=2), 0.1, gate_lr=rate)


def test_what_expert_factors_are_computed_from_does_not_decay() -> None:
    layer = MuMoE(8, 6, 3, CP(4))
    prune.l1_unstructured(layer.factors, "expert_0", 2)
    prune.l1_unstructured(layer.factors, "input", 2)
    nn.utils.parametrize.register_parametrization(layer.factors, "bias", nn.Identity())
    decayed, kept = names(layer, parameter_groups(layer, 0.1))
    assert decayed == {"factors.input_orig", "factors.output", "gate.projection_0"}
    assert kept == {"factors.expert_0_orig", "factors.parametrizations.bias.original"}


def test_learning_rates_of_factors() -> None:
    model = mixed()
    together = names(model, parameter_groups(model, 0.1))
    groups = parameter_groups(model, 0.1, lr=0.01)
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(known[id(each)], group) for group in groups for each in group["params"]]
    rates = {name: group["lr"] for name, group in listed}
    decays = {name: group["weight_decay"] for name, group in listed}
    assert sorted(rates) == sorted(name for name, _ in listed) == sorted(known.values())
    wanted = dict.fromkeys(rates, 0.01)
    for prefix in ("table", "layer", "block.block"):
        layer = model.get_submodule(prefix)
        for name, rule in parameter_rules(layer.config).items():
            wanted[f"{prefix}.{name}"] = 0.01 * rule.multiplier
    assert rates == pytest.approx(wanted)
    assert len({*rates.values()}) > 5
    for name, decay in decays.items():
        assert decay * rates[name] == pytest.approx(0.1 * 0.01 if name in together[0] else 0.0)


def test_rates_of_gates_among_others() -> None:
    model = mixed()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, lr=0.01, gate_lr=0.5))
    gates = {id(each) for name, each in model.named_parameters() if ".gate." in name}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["lr"] == 0.5) == (id(parameter) in gates)


def test_a_layer_moves_like_a_linear_one() -> None:
    """At any rank, where one rate for all is too small for some and too large for others."""
    x = normal(256, 64, dtype=torch.float64)
    x[:, 4:] = x[:, :4] @ normal(4, 60, dtype=torch.float64) / 2  # few directions, as in data
    head, target = normal(64, 10, dtype=torch.float64) / 8, torch.randint(10, (256,))
    even = [torch.full((256, 8), 1 / 8, dtype=torch.float64)]
    moved = {}
    for rank in (None, 4, 32, 512):
        for lr in (None, 1e-4):
            torch.manual_seed(0)
            if rank is None:
                model = nn.Linear(64, 64, dtype=torch.float64)
                run = partial(model, x)
            else:
                model = MuMoE(64, 64, 8, CP(rank), gate=None, dtype=torch.float64)
                run = partial(model, x, even)
            adam = torch.optim.AdamW(parameter_groups(model, 0.0, lr=lr), lr=1e-4)
            before = run()
            nn.functional.cross_entropy(before @ head, target).backward()
            adam.step()
            moved[rank, lr] = (run() - before).square().mean().sqrt().item()
    for lr in (None, 1e-4):
        ratios = [moved[rank, lr] / moved[None, lr] for rank in (4, 32, 512)]
        alike = max(ratios) < 2.0 and min(ratios) > 0.5
        assert alike == (lr is not None), ratios


def test_shared_factors_have_the_smallest_rate() -> None:
    model = nn.Sequential(MuMoE(16, 4, 3, CP(4)), MuMoE(4, 16, 3, CP(4)))
    model[1].factors["expert_0"] = model[0].factors["expert_0"]
    rates = [parameter_rules(each.config)["factors.expert_0"].multiplier for each in model]
    groups = parameter_groups(model, 0.1, lr=1.0)
    shared = model[0].factors["expert_0"]
    found = [group["lr"] for group in groups if any(each is shared for each in group["params"])]
    assert found == [min(rates)]
    assert rates[0] != rates[1]


@pytest.mark.parametrize("rate", [-0.1, float("nan"), "0.1", True])
def test_the_rate_of_linear_layers_must_be_a_number(rate: Any) -> None:
    with pytest.raises(SpecError, match=r"^lr must be a number of at least 0; got"):
        parameter_groups(MuMoE(4, 3, 2, rank=2), 0.1, lr=rate)

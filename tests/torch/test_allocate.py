"""Allocations carried out on models, and sensitivities measured on them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import CP
from tensormoe.decomposition import Search, decompose
from tensormoe.errors import BudgetError, SpecError
from tensormoe.selection import Allocation, allocate
from tensormoe_torch import MuMoE, MuMoEMLP, SparseMoE, compress, from_linear
from tensormoe_torch import replace as surgery
from tensormoe_torch.allocation import measure_sensitivities, model_sites
from tests._torch_moe import TOKENS, Expert, OneByOne, sparse

QUICK = Search(sweeps=4, polish=1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(12, 20, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Net(nn.Module):
    """Ids to logits, by a linear layer in attention's place and an MLP, twice."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 12)
        self.attention = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.mlp = nn.ModuleList(Mlp() for _ in range(2))
        self.head = nn.Linear(12, 16)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for place, (mix, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + mix(x)
            x = x + (self.scale if place else 1.0) * mlp(x)
        logits: Tensor = self.head(x)
        return logits


def net(scale: float = 1.0) -> Net:
    torch.manual_seed(0)
    return Net(scale)


IDS = torch.arange(32).reshape(4, 8) * 7 % 16


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


# --- carried out


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_compress(family: str) -> None:
    model = sparse(family)
    names = [name for site in model_sites(model) for name in site.unit_names]
    weights = {name: 1.0 + index for index, name in enumerate(names)}
    found = allocate(model, "60%", sensitivities=weights)
    report = compress(model, found, search=QUICK)
    assert report.names == found.names
    assert report.parameters == (found.parameters_before, found.parameters)
    for module, layer in zip(report.modules, found.layers, strict=True):
        kinds = tuple(each.factorization for each in module.projections)
        assert kinds == layer.factorizations
        roles = tuple(each.role for each in layer.site.projections)
        assert roles == tuple(each.role for each in module.projections)
    assert torch.isfinite(model(TOKENS).logits).all()


def test_compress_some_layers_only() -> None:
    model = sparse("mixtral")
    sites = model_sites(model)[1:]
    report = compress(model, allocate(sites, "50%"), search=QUICK)
    assert report.names == (sites[0].name,)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


def test_lists_of_experts_and_sparse_mixtures() -> None:
    torch.manual_seed(0)
    listed = OneByOne([Expert() for _ in range(4)])
    ours = nn.ModuleDict({"moe": SparseMoE(6, 8, experts=4, top_k=2)})
    for model in (nn.ModuleDict({"moe": listed}), ours):
        found = allocate(model, "70%")
        report = compress(model, found, search=QUICK)
        assert report.parameters == (found.parameters_before, found.parameters)


def test_replace() -> None:
    model = net()
    found = allocate(model, "90%", what=("mlp", "attention"), experts=2, by="size", gate="softmax")
    assert found.names == ("attention.0", "attention.1", "mlp.0", "mlp.1")
    before = sum(each.numel() for each in model.parameters())
    report = surgery(model, found, batch=8)
    assert report.names == found.names
    for layer in found.layers:
        module: Any = model.get_submodule(layer.name)
        assert sum(each.numel() for each in module.parameters()) == layer.parameters
        if layer.kind == "linear":
            assert isinstance(module, MuMoE)
            assert module.config.gate == layer.gate
            assert module.spec == layer.specs[0]
        else:
            assert isinstance(module, MuMoEMLP)
            assert module.config.gated
            assert (module.first.spec, module.second.spec) == layer.specs
    after = sum(each.numel() for each in model.parameters())
    assert before - after == found.parameters_before - found.parameters
    assert model(IDS).shape == (4, 8, 16)


def test_experts_and_the_rest_are_two_calls() -> None:
    model = sparse("mixtral").float()
    found = allocate(model, "70%", what=("experts", "attention"), experts=1)
    with pytest.raises(SpecError, match=r"of_kind\('experts'\), and the rest to replace"):
        compress(model, found)
    with pytest.raises(SpecError, match=r"of_kind\('linear', 'mlp'\), and the rest to compress"):
        surgery(model, found)
    compress(model, found.of_kind("experts"), search=QUICK)
    surgery(model, found.of_kind("linear"))
    assert model(TOKENS).logits.isfinite().all()


def test_allocations_that_do_not_fit() -> None:
    model = sparse("mixtral")
    found = allocate(model, "50%")
    before = state(model)
    other = sparse("olmoe")
    for wrong, said in (
        (allocate(other, "50%"), "sizes of the model's layers"),
        (found.of_kind(), "at least one layer"),
    ):
        with pytest.raises(SpecError, match=said):
            compress(model, wrong)
    layer = found.layers[0]
    named = replace(layer, site=replace(layer.site, name="model.layers.0.mlp.expert"))
    with pytest.raises(SpecError, match=r"no 'model.layers.0.mlp.expert'. Nearest: "):
        compress(model, Allocation((named,), "equal", 10))
    specs = tuple(replace(each, experts=(3,)) for each in layer.specs)
    fewer = replace(layer, site=replace(layer.site, experts=3), specs=specs)
    with pytest.raises(SpecError, match="as many experts as the model"):
        compress(model, Allocation((fewer,), "equal", 10))
    for options in ({"rank": 2}, {"budget": 0.5}, {"tolerance": 0.1}, {"select": "**.experts"}):
        with pytest.raises(SpecError, match="must be left out of compress with an allocation"):
            compress(model, found, **options)
    assert same(model, before)
    dense = net()
    plan = allocate(dense, "90%", what="mlp", experts=2)
    for options in (
        {"experts": 2},
        {"rank": 2},
        {"budget": 10},
        {"factorization": "tucker"},
        {"gate": "softmax"},
    ):
        with pytest.raises(SpecError, match="must be left out of replace with an allocation"):
            surgery(dense, plan, **options)
    with pytest.raises(SpecError, match="experts must be given"):
        surgery(dense, "mlp.0")


# --- measured


def test_losses_are_those_of_the_model_with_one_projection_in_factors() -> None:
    model = sparse("mixtral")
    before = state(model)
    batches = [TOKENS[:1], TOKENS[1:]]
    (first, *_), points = model_sites(model), []
    errors: list[Tensor] = []
    stack_of: Any = model.get_submodule(first.name).gate_up_proj
    squares = torch.zeros_like(stack_of).detach()
    found = measure_sensitivities(model, batches, shares=(0.3, 0.7), search=QUICK)
    assert [each.name for each in found] == [
        name for site in model_sites(model) for name in site.unit_names
    ]
    assert same(model, before)

    def loss(of: Any) -> float:
        with torch.no_grad():
            return sum(float(of(each, labels=each).loss) for each in batches) / 2

    for point in found[1].points:
        changed = copy.deepcopy(model)
        stack = changed.get_submodule(first.name).gate_up_proj
        weight = stack.detach().transpose(1, 2)[..., 24:]
        made = decompose(weight, point.factorization, search=QUICK)
        rebuilt, _ = MuMoE.restore(made.config(), made.parameters).materialize()
        errors.append((rebuilt - weight).detach().transpose(1, 2))
        stack.data[:, 24:] = rebuilt.detach().transpose(1, 2)
        assert point.parameters == made.spec.num_parameters
        points.append(point.loss)
        assert point.loss == pytest.approx(loss(changed) - loss(model), abs=1e-6)
    assert len(set(points)) == 2
    for batch in batches:
        # mean squared gradients of a part of a parameter
        squares = squares + torch.autograd.grad(model(batch, labels=batch).loss, stack_of)[0] ** 2
    by_gradient = measure_sensitivities(
        model, batches, shares=(0.3, 0.7), search=QUICK, measure="gradient"
    )
    for point, off in zip(by_gradient[1].points, errors, strict=True):
        wanted = float((0.5 * squares[:, 24:] * off**2).sum() / 2)
        assert point.loss == pytest.approx(wanted, rel=1e-6)


def test_gradients() -> None:
    model = net().double()
    before, flags = state(model), [each.requires_grad for each in model.parameters()]
    batches = [IDS[:2], IDS[2:]]
    found = measure_sensitivities(
        model, batches, what="attention", experts=1, shares=(0.5,), measure="gradient"
    )
    assert same(model, before)
    assert [each.requires_grad for each in model.parameters()] == flags
    assert all(each.grad is None for each in model.parameters())
    layers: Any = model.attention
    for each, layer in zip(found, layers, strict=True):
        rank: Any = each.points[0].factorization.rank
        table = torch.cat([layer.weight.detach().T, layer.bias.detach()[None]])
        left, values, right = torch.linalg.svd(table, full_matrices=False)
        off = (left[:, :rank] * values[:rank] @ right[:rank] - table)[:-1].T
        total = torch.zeros(())
        for batch in batches:
            model.zero_grad()
            logits = model(batch)
            loss: Any = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            total = total + (layer.weight.grad.square() * off.square()).sum() / len(batches)
        assert each.points[0].loss == pytest.approx(float(0.5 * total), rel=1e-6)


@pytest.mark.parametrize("what", ["attention", "mlp"])
def test_errors_of_outputs(what: str) -> None:
    model = net().double()
    found = measure_sensitivities(
        model, IDS, what=what, experts=1, shares=(0.4, 0.8), measure="error"
    )
    seen: list[Tensor] = []
    layer: Any = model.attention[1] if what == "attention" else model.mlp[1].down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(IDS)
    handle.remove()
    for point in found[-1].points:
        made, _ = from_linear(layer, 1, point.factorization, gate=None)
        ones = torch.ones(*seen[0].shape[:-1], 1, dtype=torch.float64)
        with torch.no_grad():
            right = layer(seen[0])
            off = made(seen[0], ones) - right
        wanted = float(off.square().sum() / right.square().sum())
        assert point.loss == pytest.approx(wanted, rel=1e-6)


def test_layers_that_do_not_matter_get_less() -> None:
    model = net(scale=0.0)
    wanted = model(IDS).detach()

    def distance(given: nn.Module, ids: Tensor) -> Tensor:
        apart: Tensor = (given(ids) - wanted).square().mean()
        return apart

    options: Any = {"what": "mlp", "experts": 1}
    known = measure_sensitivities(model, IDS, loss=distance, **options)
    assert {point.loss for each in known[2:] for point in each.points} == {0.0}
    found = allocate(model, "45%", sensitivities=known, gate=None, **options)
    used, unused = (layer.parameters for layer in found.layers)
    assert unused < 0.6 * used
    assert found.parameters <= found.limit
    again = allocate(model, "70%", inputs=[IDS], gate=None, **options)
    assert again.by == "sensitivity"
    assert again.parameters <= again.limit


@pytest.mark.parametrize("measure", ["loss", "gradient", "error"])
def test_experts_of_all_kinds(measure: str) -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self, moe: nn.Module) -> None:
            super().__init__()
            self.table, self.moe, self.head = nn.Embedding(9, 6), moe, nn.Linear(6, 9)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            logits: Tensor = self.head(x + self.moe(x.flatten(0, 1)).reshape(x.shape))
            return logits

    for moe in (SparseMoE(6, 8, experts=4, top_k=2), OneByOne([Expert() for _ in range(4)])):
        model, ids = Tokens(moe), IDS % 9
        before = state(model)
        found = measure_sensitivities(model, ids, shares=(0.4, 0.8), measure=measure, search=QUICK)
        assert same(model, before)
        assert all(len(each.points) == 2 for each in found)
        losses = [point.loss for each in found for point in each.points]
        assert all(loss == loss for loss in losses)
        assert max(losses) > 0
        compress(model, allocate(model, "60%", sensitivities=found), search=QUICK)


def test_training_mode_and_weighted() -> None:
    model = sparse("mixtral").train()
    plain, weighted = (
        measure_sensitivities(
            model, TOKENS, shares=(0.4,), search=QUICK, measure="error", weighted=each
        )
        for each in (False, True)
    )
    assert model.training
    total = [sum(e.points[0].loss for e in found) for found in (plain, weighted)]
    assert total[1] < total[0]


def test_what_cannot_be_measured() -> None:
    model = net()
    for options, said in (
        ({"measure": "rank"}, "measure must be one of"),
        ({"shares": ()}, "shares must be numbers"),
        ({"shares": (1.5,)}, "shares must be numbers"),
        ({"what": "experts"}, "must have layers of the part 'experts'"),
        ({"sites": model_sites(model), "what": "mlp"}, "exclude one another"),
        ({"loss": lambda *_: 3.0}, "scalar tensor"),
        ({"loss": lambda net, ids: net(ids)}, "scalar tensor"),
        ({"loss": lambda net, ids: net(ids).sum() * float("nan")}, "finite"),
    ):
        with pytest.raises(SpecError, match=said):
            measure_sensitivities(model, IDS, **{"experts": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="at least one batch"):
        measure_sensitivities(model, [])
    floats = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SpecError, match="loss must be given"):
        measure_sensitivities(floats, torch.randn(3, 4), experts=1)
    with pytest.raises(SpecError, match="meta device"):
        allocate(net().to("meta"), 0.5, what="mlp", inputs=IDS.to("meta"))
    with pytest.raises(SpecError, match=r"an nn\.Module"):
        model_sites(3)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="at least"):
        allocate(model, 20, what="mlp")
    with pytest.raises(SpecError, match="none that are known"):
        allocate(nn.ReLU(), 0.5)


def test_failures_leave_the_model_as_it_was() -> None:
    model, calls = net(), []

    def fails(given: nn.Module, ids: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        found: Tensor = given(ids).square().mean()
        return found

    before = state(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_sensitivities(model, IDS, experts=1, loss=fails)
    assert same(model, before)


def test_points_are_told() -> None:
    told: list[str] = []
    measure_sensitivities(
        net(),
        IDS,
        what="attention",
        experts=1,
        shares=(0.3, 0.6),
        callback=lambda name, _: told.append(name),
    )
    assert told == ["attention.0", "attention.0", "attention.1", "attention.1"]
    found = measure_sensitivities(net(), IDS, what="attention", experts=1, shares=(0.3,))
    assert isinstance(found[0].points[0].factorization, CP)

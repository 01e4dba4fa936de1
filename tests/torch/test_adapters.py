"""Adapters added to models: linear layers, lists of experts, and the library's own mixtures."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensormoe_numpy
from tensormoe.errors import BudgetError, CheckpointError, RankError, SpecError
from tensormoe_torch import (
    DiverseMoE,
    MultiGateMoE,
    ResidualExperts,
    SoftMoE,
    SparseMoE,
    compress,
    from_mlp,
    replace,
)
from tensormoe_torch.adapters import (
    AdaptedExperts,
    add_adapters,
    freeze,
    load_adapters,
    merge_adapters,
    save_adapters,
)


def _net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


class _Expert(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(6, 8, bias), nn.Linear(6, 8, bias)
        self.w2 = nn.Linear(8, 6, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class _Listed(nn.Module):
    """A sparse model that calls its experts one by one."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_Expert(bias) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert(x) for expert in self.experts])


def _listed(bias: bool = True) -> nn.Module:
    torch.manual_seed(4)
    return _Listed(bias)


def _sparse() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(SparseMoE(6, 8, experts=4, top_k=2, shared_features=3))


def _soft() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(SoftMoE(6, 8, experts=4, slots=2, bias=True))


def _tasks() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(MultiGateMoE(6, 8, 5, tasks=2, experts=4))


def _sizes() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(DiverseMoE(6, 8, experts=4, top_k=2))


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1))


def _moved(model: nn.Module, scale: float = 0.5) -> nn.Module:
    torch.manual_seed(8)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_().mul_(scale)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (_net, {"select": nn.Linear, "experts": 1}),
    "list": (_listed, {}),
    "sparse": (_sparse, {}),
    "soft": (_soft, {"factorization": "tucker"}),
    "tasks": (_tasks, {}),
    "sizes": (_sizes, {"factorization": "tensor_ring"}),
}


@pytest.fixture(params=MODELS)
def kind(request: Any) -> str:
    return str(request.param)


def _added(kind: str) -> tuple[nn.Module, nn.Module, Any]:
    """A model, and one with adapters."""
    make, options = MODELS[kind]
    model, report = add_adapters(make(), rank=2, **options)
    return make(), model, report


def test_only_adapters_train(kind: str) -> None:
    plain, model, report = _added(kind)
    x = _x(2, 5)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(".adapter." in name for name in trained)
    assert report.parameters == sum(each.numel() for each in trained.values())
    assert report.model_parameters == sum(each.numel() for each in plain.parameters())
    assert f"{report.parameters:,} trained ones" in str(report)
    assert all(isinstance(model.get_submodule(name), ResidualExperts) for name in report.names)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved <= trained.keys()
    # a gate, or a router's choice, of one expert has nothing to learn
    still = {name for name in trained.keys() - moved if "gate" not in name}
    assert not still, still


def test_merged(kind: str) -> None:
    plain, model, _ = _added(kind)
    _moved(model)
    x = _x(2, 5)
    wanted = model(x)
    assert (wanted - plain(x)).abs().max() > 1e-2
    assert merge_adapters(model) is model
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]
    # as a model like any other
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), model(x))
    with pytest.raises(SpecError, match=r"must have adapters"):
        merge_adapters(model)


def test_files(kind: str, tmp_path: Path) -> None:
    plain, model, report = _added(kind)
    _moved(model)
    file = tmp_path / "adapters"
    save_adapters(model, file)
    x = _x(2, 5)
    loaded = load_adapters(copy.deepcopy(plain), file)
    assert torch.equal(loaded(x), model(x))
    assert {n for n, each in loaded.named_parameters() if each.requires_grad} == {
        n for n, each in model.named_parameters() if each.requires_grad
    }
    _, other, _ = _added(kind)
    assert load_adapters(other, file) is other
    assert torch.equal(other(x), model(x))
    # a whole state dict, into a model with adapters
    _, other, _ = _added(kind)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    # one of them, elsewhere
    name = report.names[-1]
    spec = model.get_submodule(name).spec
    ours = tensormoe_numpy.ResidualExperts.from_adapter(
        _Sized(spec.in_features, spec.out_features), file, name
    )
    theirs = model.get_submodule(name).adapter.state_dict()  # type: ignore[union-attr]
    assert {*ours.adapter.arrays} == {*theirs}


class _Sized:
    def __init__(self, rows: int, columns: int) -> None:
        self.in_features, self.out_features = rows, columns

    def __call__(self, x: Any) -> Any:
        return x


def test_experts_of_a_list_are_adapted_one_by_one() -> None:
    model, _ = add_adapters(_listed(bias=False), rank=3, scale=0.5)
    _moved(model)
    adapted: Any = model.experts
    assert isinstance(adapted, AdaptedExperts)
    wanted = _listed(bias=False)
    with torch.no_grad():
        for role, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            f = adapted.projections[role].adapter.factors
            delta = torch.einsum("nr,ir,or->noi", f["expert_0"], f["input"], f["output"])
            for n, expert in enumerate(wanted.experts):  # type: ignore[arg-type]
                getattr(expert, name).weight.add_(0.5 * delta[n])
    torch.testing.assert_close(model(_x(3)), wanted(_x(3)), rtol=1e-4, atol=1e-5)
    merge_adapters(model)
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, wanted.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_mode_hooks_and_shared_places() -> None:
    net = _net().eval()
    seen: list[str] = []
    handle = net[0].register_forward_hook(lambda *_: seen.append("hook"))
    shared = nn.ModuleDict({"a": net, "b": nn.Sequential(net[0])})
    model, report = add_adapters(shared, ["a.0", "b.0"], experts=3, rank=2)
    assert report.names == ("a.0",)
    assert model["a"][0] is model["b"][0]  # type: ignore[index]
    assert not model["a"][0].training  # type: ignore[index,union-attr]
    net(_x(3))
    assert seen == ["hook"]
    handle.remove()
    net(_x(3))
    assert seen == ["hook"]


def test_a_failure_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(6, 1), nn.Linear(8, 8))
    before = copy.deepcopy(net)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"select": "*", "experts": 4, "budget": 40}, BudgetError, r"at '1'"),
        ({"select": "*", "experts": 4, "rank": (1, 2)}, RankError, r"at '0'.*rank"),
        ({"select": "*", "rank": 2}, SpecError, r"at '0': experts must be given"),
        ({"rank": 2}, SpecError, r"must hold experts, or select"),
        ({"select": "a", "rank": 2}, SpecError, r"'a' matches none"),
        ({"select": "*", "experts": 4, "rank": 2, "dtype": 3}, SpecError, r"dtype must be"),
        ({"select": "*", "experts": 4, "rank": 2, "init": "a"}, SpecError, r"'a'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            add_adapters(net, **options)
        assert repr(net) == repr(before)
        assert all(each.requires_grad for each in net.parameters()), options
        assert net.training
        assert all(each.training for each in net)
    with pytest.raises(SpecError, match=r"must be an nn.Module; got 3|int"):
        add_adapters(3, "a", rank=2)  # type: ignore[arg-type]


def test_what_adapters_are_not_for() -> None:
    model = nn.ModuleDict({"act": nn.ReLU(), "attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(SpecError, match=r"'act' is a ReLU"):
        add_adapters(model, "act", experts=2, rank=2)
    with pytest.raises(SpecError, match=r"MultiheadAttention reads its weights"):
        add_adapters(model, "**.out_proj", experts=2, rank=2)
    with pytest.raises(SpecError, match=r"'attention' is a MultiheadAttention\. It holds 'att"):
        add_adapters(model, "attention", experts=2, rank=2)
    model, _ = add_adapters(_net(), "0", experts=2, rank=2)
    for select in ("0", "0.base"):
        with pytest.raises(SpecError, match=r"has an adapter already"):
            add_adapters(model, select, experts=2, rank=2)
    with pytest.raises(SpecError, match=r"must have adapters; Sequential has none"):
        freeze(_net())


def test_fused_paths_of_pytorch_are_left() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(2, 3, 8)
    wanted = encoder(x)
    add_adapters(encoder, "**.linear?", experts=2, rank=2)
    _moved(encoder)
    with torch.no_grad():
        assert (encoder(x) - wanted).abs().max() > 1e-2


def test_other_surgery_on_a_model_with_adapters() -> None:
    model, _ = add_adapters(_net(), "0", experts=2, rank=2)
    with pytest.raises(SpecError, match=r"'0' \(ResidualExperts\) is no linear layer"):
        replace(model, "0", experts=3)
    with pytest.raises(SpecError, match=r"no MLP"):
        from_mlp(model, experts=3)
    # the base may be: it stays frozen, and what was learned stays as well
    replace(model, "0.base", experts=3)
    assert model(_x(3)).shape == (3, 6)
    assert all(".adapter." in n for n, each in model.named_parameters() if each.requires_grad)
    sparse, _ = add_adapters(_listed(), rank=2)
    for select in (None, "experts"):
        with pytest.raises(SpecError, match=r"merge_adapters gives a model with adapters its own"):
            compress(sparse, "cp", rank=2, select=select)
    ours, _ = add_adapters(_sparse(), rank=2)
    with pytest.raises(CheckpointError, match=r"merge_adapters"):
        ours[0].save("never")  # type: ignore[index,operator]


def test_what_is_not_merged_is_left_whole() -> None:
    model, _ = add_adapters(_net(), nn.Linear, experts=2, rank=2)
    with pytest.raises(SpecError, match=r"at '0': a mixture must have fixed coefficients"):
        merge_adapters(model)
    one: Any = model[0]  # type: ignore[index]
    model[0] = one.merge(torch.full((2,), 0.5))  # type: ignore[index,operator]
    mixed = nn.Sequential(
        _listed(), SparseMoE(6, 8, experts=4, top_k=2, factorization="cp", rank=2)
    )
    add_adapters(mixed, rank=2)
    with pytest.raises(SpecError, match=r"at '1.experts.*must be dense to be merged"):
        merge_adapters(mixed)
    assert isinstance(mixed[0].experts, AdaptedExperts)
    biased, _ = add_adapters(
        nn.Sequential(nn.Linear(3, 3, bias=False)), "0", experts=1, rank=1, bias=True
    )
    with pytest.raises(SpecError, match=r"bias needs a base with one"):
        merge_adapters(biased)
    with pytest.raises(SpecError, match=r"it is one itself"):
        merge_adapters(biased[0])  # type: ignore[index,arg-type]


def test_files_of_other_models(tmp_path: Path) -> None:
    file = tmp_path / "adapters"
    model, _ = add_adapters(_listed(), rank=2)
    save_adapters(model, file)
    for other in (_net(), nn.ModuleDict({"experts": nn.Linear(6, 8)})):
        kept = repr(other)
        with pytest.raises((CheckpointError, SpecError), match=r"'experts'"):
            load_adapters(other, file)
        assert repr(other) == kept
    wider = nn.ModuleDict({"experts": nn.ModuleList(_Expert() for _ in range(3))})
    with pytest.raises(CheckpointError) as caught:
        load_adapters(wider, file)
    assert str(caught.value).count("must be experts × in × out = (3, ") == 3
    assert isinstance(wider["experts"], nn.ModuleList)
    deeper, _ = add_adapters(_listed(), rank=3)
    with pytest.raises(CheckpointError) as caught:
        load_adapters(deeper, file)
    assert str(caught.value).count("layer.spec.rank must be 3; got 2") == 3
    model, _ = add_adapters(_net(), nn.Linear, experts=2, rank=2)
    save_adapters(model, file)
    part, _ = add_adapters(_net(), "0", experts=2, rank=2)
    with pytest.raises(CheckpointError, match=r"'2' is unexpected"):
        load_adapters(part, file)
    with pytest.raises(CheckpointError, match=r"no such|there is none"):
        load_adapters(part, tmp_path / "nothing")


def test_rows_are_sorted_where_they_were() -> None:
    model = nn.Sequential(SparseMoE(64, 64, experts=4, top_k=2))
    experts, x = model[0].experts, torch.zeros(4096, 64)
    assert experts._sorts(x, 2 * len(x))
    add_adapters(model, rank=2)
    assert experts._sorts(x, 2 * len(x))
    adapted = copy.deepcopy(experts)
    merge_adapters(model)
    assert len(adapted._layers) == 2 * len(experts._layers)


def test_compiled_and_narrow() -> None:
    model = _sparse()
    add_adapters(model, rank=2)
    _moved(model)
    fast = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(_x(7)), model(_x(7)))
    narrow = _listed().bfloat16()
    wanted = narrow(_x(3).bfloat16())
    add_adapters(narrow, rank=2, dtype=torch.float32)
    assert {e.dtype for e in narrow.parameters() if e.requires_grad} == {torch.float32}
    found = narrow(_x(3).bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    _moved(narrow, 0.1)
    found = narrow(_x(3).bfloat16())
    merge_adapters(narrow)
    torch.testing.assert_close(narrow(_x(3).bfloat16()), found, rtol=0.1, atol=0.1)


class _Stacked(nn.Module):
    """Stacked experts whose gates and ups take turns, in matrices (in, out) with biases."""

    is_concatenated, is_transposed, has_bias = False, True, True

    def __init__(self, concatenated: bool) -> None:
        super().__init__()
        self.is_concatenated = concatenated
        sizes = {"gate_up_proj": (6, 16), "down_proj": (8, 6)}
        for name, (rows, columns) in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(4, rows, columns)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, columns)))
        self.act_fn = nn.SiLU()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros_like(hidden_states)
        for token, (x, index, weights) in enumerate(
            zip(hidden_states, top_k_index, top_k_weights, strict=True)
        ):
            for n, weight in zip(index, weights, strict=True):
                both = x @ self.gate_up_proj[n] + self.gate_up_proj_bias[n]
                halves = both.chunk(2) if self.is_concatenated else (both[::2], both[1::2])
                hidden = self.act_fn(halves[0]) * halves[1]
                made = hidden @ self.down_proj[n] + self.down_proj_bias[n]
                total[token] += weight * made
        return total


@pytest.mark.parametrize("concatenated", [True, False])
def test_stacks_of_either_layout(concatenated: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": _Stacked(concatenated)})
    plain = copy.deepcopy(model)
    memory = model["experts"].gate_up_proj.data_ptr()  # type: ignore[union-attr,operator]
    _, report = add_adapters(model, rank=2, bias=True)
    roles = [name.rpartition(".")[2] for name in report.names]
    apart = ["gate_proj", "up_proj", "down_proj"]
    assert roles == (["gate_up_proj", "down_proj"] if concatenated else apart)
    base = model.get_submodule(report.names[0]).base.factors["weight"]  # type: ignore[union-attr]
    assert (base.data_ptr() == memory) == concatenated  # type: ignore[union-attr,operator]
    assert base.is_contiguous()  # type: ignore[union-attr,operator]
    given = _x(5), torch.randint(4, (5, 2)), torch.rand(5, 2)
    found = model["experts"](*given)
    torch.testing.assert_close(found, plain["experts"](*given), rtol=1e-4, atol=1e-5)
    _moved(model)
    found = model["experts"](*given)
    merge_adapters(model)
    assert type(model["experts"]) is _Stacked
    torch.testing.assert_close(model["experts"](*given), found, rtol=1e-3, atol=1e-4)
    assert (found - plain["experts"](*given)).abs().max() > 0.1

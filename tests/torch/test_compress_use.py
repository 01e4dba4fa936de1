"""Compressed models in use, and what can't be compressed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tensormoe.decomposition import Search
from tensormoe.errors import BudgetError, RankError, ShapeError, SpecError
from tensormoe_torch import compress
from tensormoe_torch.compression import FactorizedExperts
from tests._torch_moe import STACKED, TOKENS, Expert, OneByOne, Plain, Stored, rebuilt, sparse

QUICK = Search(sweeps=5, polish=0)
NAMES = tuple(f"model.layers.{k}.mlp.experts" for k in range(2))


def lists(count: int = 4, **options: Any) -> OneByOne:
    torch.manual_seed(0)
    return OneByOne([Expert(**options) for _ in range(count)])


def compressed(model: Any) -> tuple[str, ...]:
    return tuple(k for k, each in model.named_modules() if isinstance(each, FactorizedExperts))


@pytest.mark.parametrize("name", STACKED)
def test_generates_what_the_dense_reconstruction_does(name: str) -> None:
    model = sparse(name)
    original = copy.deepcopy(model)
    compress(model, "tucker", budget=0.5, search=QUICK)
    wanted: Any = rebuilt(original, model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS[:, 1:6]
    found = model.generate(prompt, **options)
    assert found.shape[1] > prompt.shape[1]
    assert torch.equal(found, wanted.generate(prompt, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    model = sparse("mixtral", dtype)
    original = copy.deepcopy(model)
    report = compress(model, "cp", rank=12, inputs=TOKENS, search=QUICK)
    assert all(each.dtype == dtype for each in model.parameters())
    # from the inputs on: later layers may route by what rounding left
    experts, wanted = (m.model.layers[0].mlp.experts for m in (model, rebuilt(original, model)))
    torch.manual_seed(0)
    x = torch.randn(9, 16).to(dtype)
    index, weights = torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    found = experts(x, index, weights)
    assert found.dtype == dtype
    limit = 40 * torch.finfo(dtype).eps
    reference = wanted(x, index, weights).detach().float()
    assert (found.detach().float() - reference).norm() < limit * reference.norm()
    assert report.modules[0].output_error is not None


def test_runs_under_autocast_and_compiled() -> None:
    model = sparse("mixtral", torch.float32)
    compress(model, "cp", rank=8, search=QUICK)
    experts: Any = model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    given = torch.randn(9, 16), torch.rand(9, 4).topk(2).indices, torch.rand(9, 2)
    wanted = experts(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(*given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05)
    run = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(*given), wanted)
    run(*given).sum().backward()
    assert all(each.grad is not None for each in experts.parameters())


def test_no_tokens() -> None:
    model = lists()
    compress(model, "tensor_ring", rank=2, search=QUICK)
    experts: Any = model.experts
    none = torch.empty(0, 6)
    assert experts[2](none).shape == (0, 6)
    index = torch.empty(0, 2, dtype=torch.long)
    assert experts(none, index, torch.empty(0, 2)).shape == (0, 6)


def test_names_are_stable_and_states_load() -> None:
    models = [sparse("olmoe", torch.float32) for _ in range(2)]
    for seed, model in enumerate(models):
        compress(model, "cp", rank=4, seed=seed, search=QUICK)
    first, second = models
    state = first.state_dict()
    assert {key for key in state if key.startswith(NAMES[0])} == {
        f"{NAMES[0]}.projections.{role}.factors.{part}"
        for role in ("gate_proj", "up_proj", "down_proj")
        for part in ("expert_0", "input", "output")
    }
    second.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(second(TOKENS).logits, first(TOKENS).logits)
        again = pickle.loads(pickle.dumps(first))
        torch.testing.assert_close(again(TOKENS).logits, first(TOKENS).logits)


def test_mode_flags_hooks_and_the_rest_stay() -> None:
    model = sparse("qwen2_moe", torch.float32).train()
    kept = {k: v.clone() for k, v in model.state_dict().items() if ".experts." not in k}
    calls = []
    experts: Any = model.model.layers[1].mlp.experts
    handle = experts.register_forward_hook(lambda *_: calls.append(1))
    experts.requires_grad_(False)
    compress(model, "cp", rank=3, inputs=TOKENS, search=QUICK)
    assert model.training
    assert calls == [1], "the calibration run is a run of the model; trying experts out is none"
    new: Any = model.model.layers[1].mlp.experts
    assert new.training
    assert not any(each.requires_grad for each in new.parameters())
    assert all(each.requires_grad for each in model.model.layers[0].mlp.experts.parameters())
    model(TOKENS)
    handle.remove()
    model(TOKENS)
    assert len(calls) == 2
    for key, value in kept.items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        (None, NAMES),
        ("**.experts", NAMES),
        ("model.layers.1.*.experts", NAMES[1:]),
        ([NAMES[0], NAMES[1]], NAMES),
        (lambda name, _: "layers.1." in name, NAMES[1:]),
        (lambda _, module: type(module).__name__ == "OlmoeExperts", NAMES),
    ],
)
def test_select(select: Any, wanted: tuple[str, ...]) -> None:
    model = sparse("olmoe", torch.float32)
    report = compress(model, "cp", rank=2, select=select, search=QUICK)
    assert report.names == compressed(model) == wanted


def test_select_a_class() -> None:
    model = sparse("olmoe", torch.float32)
    kind = type(model.model.layers[0].mlp.experts)
    assert compress(model, "cp", rank=2, select=kind, search=QUICK).names == NAMES


def test_lists_without_a_telling_name_are_selected() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Plain() for _ in range(3))

    model = Net()
    with pytest.raises(SpecError, match=r"must hold experts; Net has none.*select="):
        compress(model, "cp", rank=2)
    assert compress(model, "cp", rank=2, select="layers").names == ("layers",)


def test_one_module_in_two_places_stays_one() -> None:
    model = nn.ModuleDict({"a": lists(), "b": lists()})
    second: Any = model["b"]
    second.experts = model["a"].experts
    assert compress(model, "cp", rank=2, search=QUICK).names == ("a.experts",)
    assert model["b"].experts is model["a"].experts
    assert isinstance(model["b"].experts, FactorizedExperts)


def test_rank_by_budget_and_by_tolerance() -> None:
    model = lists()
    report = compress(model, "cp", budget=0.5)
    for each in report.modules[0].projections:
        assert each.report.parameters <= 0.5 * each.report.dense_parameters
    report = compress(lists(), "cp", tolerance=0.3)
    assert all(each.report.error <= 0.3 for each in report.modules[0].projections)


def _unequal() -> nn.Module:
    return OneByOne([Expert(hidden=8), Expert(hidden=9)])


def _biased() -> nn.Module:
    return OneByOne([Expert(), Expert(bias=True)])


def _mixed() -> nn.Module:
    return OneByOne([Expert(), nn.Linear(6, 6)])


def _acts() -> nn.Module:
    model = OneByOne([Plain(), Plain()])
    model.experts[1].act = nn.ReLU()
    return model


class Odd(Expert):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + 0.1 * x


class Failing(Expert):
    def forward(self, x: Any) -> Any:
        raise RuntimeError("not today")


class Normed(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)


class Dropped(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)


def _nan() -> nn.Module:
    model = sparse("mixtral", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 1] = float("nan")
    return model


def _infinite_list() -> nn.Module:
    model = lists()
    with torch.no_grad():
        model.experts[3].w2.weight[0, 0] = float("inf")
    return model


def _tied() -> nn.Module:
    model = lists()
    model.experts[1].w1.weight = model.experts[0].w1.weight
    return nn.ModuleDict({"a": model, "b": model.experts[0].w1})


def _meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(Stored(False, False, False, True))


def _hooked() -> nn.Module:
    model = lists()
    model.experts[1].register_forward_hook(lambda *_: None)
    return model


def _parallel() -> nn.Module:
    model = sparse("mixtral", torch.float32)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    return model


def _shape() -> nn.Module:
    model = nn.Sequential(Stored(False, False, False, True))
    model[0].down_proj = nn.Parameter(torch.randn(3, 6, 8))
    return model


def _repeated() -> nn.Module:
    one = Expert()
    return OneByOne([one, one, Expert()])


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), {}, SpecError, "must hold experts; Linear has none"),
        (lambda: "model", {}, SpecError, "model must be an nn.Module; got str"),
        (_unequal, {}, ShapeError, "same shapes.*expert 0 has .* 6 → 8.*expert 1 .* 6 → 9"),
        (_biased, {}, ShapeError, "expert 0 has .*no bias.*expert 1 .*a bias"),
        (_mixed, {}, SpecError, "'experts.1' is a Linear of other parts"),
        (_acts, {}, SpecError, "one class and activation.*GELU.*ReLU"),
        (_repeated, {}, SpecError, "is tied to"),
        (lambda: OneByOne([Odd()]), {}, SpecError, "'experts'.*Odd.*compute something else"),
        (lambda: OneByOne([Failing()]), {}, SpecError, "calling them failed: not today"),
        (lambda: OneByOne([Normed()]), {}, SpecError, "'experts.0' also holds 'norm.weight'"),
        (lambda: OneByOne([Dropped()]), {}, SpecError, "without dropout"),
        (_nan, {}, ShapeError, "at 'model.layers.1.mlp.experts.down_proj': .*finite.*expert 2"),
        (_infinite_list, {}, SpecError, "experts.3.down_proj must hold finite"),
        (_tied, {}, SpecError, "is tied to"),
        (_meta, {}, SpecError, "0.gate_up_proj must hold values; it is on the meta device"),
        (_hooked, {}, SpecError, "hooks inside .* 'experts.1' has some"),
        (_parallel, {}, SpecError, "in one process"),
        (_shape, {}, ShapeError, r"same experts; got shapes \(4, 16, 6\) and \(3, 6, 8\)"),
        (lists, {"rank": 0}, RankError, "rank must be"),
        (lists, {"rank": 11}, RankError, "at 'experts.gate_proj': .* 192; .*rank=11.* has 198"),
        (lists, {"rank": (2, 2)}, RankError, "rank must"),
        (lists, {"rank": None}, SpecError, "rank"),
        (lists, {"rank": None, "budget": 1}, BudgetError, "at 'experts.gate_proj': "),
        (lists, {"budget": 0.5}, SpecError, "one of rank, budget and tolerance"),
        (lists, {"weighted": True}, SpecError, "needs inputs; got none"),
        (lists, {"inputs": 3}, SpecError, "inputs must be a batch.*got int"),
        (lists, {"inputs": [3]}, SpecError, "got int"),
        (lists, {"inputs": []}, SpecError, "those of 'experts' got none"),
        (lists, {"inputs": torch.empty(0, 6)}, SpecError, "those of 'experts' got none"),
        (lists, {"select": "experts.*"}, SpecError, "must be experts.*'experts.0' is a Expert"),
        (lists, {"select": "layers"}, SpecError, "matches none"),
        (lists, {"select": lambda *_: False}, SpecError, "for which select is true"),
        (lists, {"select": ["experts", "gate"]}, SpecError, "'gate' is a Linear"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    build: Callable[[], Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build()
    before = repr(model)
    with pytest.raises(error, match=message):
        compress(model, "cp", **({"rank": 2} | options))
    assert repr(model) == before


def test_a_class_that_is_called_otherwise() -> None:
    class Other(Stored):
        def forward(self, states: Any, chosen: Any, weights: Any) -> Any:
            return super().forward(states, chosen, weights)

    with pytest.raises(SpecError, match=r"called with hidden_states.*take states, chosen, weights"):
        compress(nn.Sequential(Other(False, False, False, True)), "cp", rank=2)


def test_what_does_not_fit_the_router() -> None:
    model = lists()
    compress(model, "cp", rank=2, search=QUICK)
    with pytest.raises(ShapeError, match=r"shape \(3, 'k'\).*\(4, 2\) and \(3, 2\)"):
        model.experts(torch.randn(3, 6), torch.zeros(4, 2).long(), torch.rand(3, 2))

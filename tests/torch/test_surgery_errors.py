"""What surgery refuses, and that it then leaves the model as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe import CP, Budget
from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe_torch import from_linear, from_mlp, replace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.norm(x))
        return result


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.out(self.head(x))
        return result


def refused(
    model: nn.Module, select: Any, message: str, error: Any = SpecError, **given: Any
) -> None:
    """The error comes, and nothing of the model has changed."""
    modules = dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    given.setdefault("experts", 4)
    with pytest.raises(error, match=message):
        replace(model, select, **given)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("block.*.mlp", r"'block.\*.mlp' matches none. Nearest: .*'blocks.0.mlp'"),
        ("mlp", r"'mlp' matches none. Did you mean '\*\*.mlp'\?"),
        ("*.mlp", r"'\*.mlp' matches none. Did you mean '\*\*.\*.mlp'\?"),
        ("", "'' matches none"),
        (["out", "hed"], "'hed' matches none. Nearest: 'head'"),
        ([], "select must hold at least one pattern; got none"),
        (["out", 3], "patterns of select must be strings; got 3 at place 1"),
        (3, "select must be a pattern .*; got 3"),
        (None, "select must be a pattern .*; got None"),
        (int, "select must be a pattern .*; got <class 'int'>"),
        (nn.Conv2d, "no module of class Conv2d. It holds Block, Embedding"),
        (lambda name, module: False, "no module for which select is true"),
        (Model, "the model itself can't be replaced in place"),
        (
            "blocks.0.norm",
            r"'blocks.0.norm' \(LayerNorm\) is no linear .* has 0. Nearest: 'blocks.0",
        ),
        ("blocks.0", r"'blocks.0' \(Block\) is no MLP: besides .* 'norm.weight', 'norm.bias'"),
        ("blocks", r"has 4. It holds 'blocks.0.mlp.0', 'blocks.0.mlp.2', 'blocks.1.mlp.0'"),
        ("embed", r"'embed' \(Embedding\) is no linear layer and no MLP"),
        (["**.mlp", "blocks.1.mlp.0"], "'blocks.1.mlp.0' is a part of 'blocks.1.mlp'"),
        (lambda name, module: "mlp" in name, "'blocks.0.mlp.0' is a part of 'blocks.0.mlp'"),
        ("head", "head.weight is tied to embed.weight. Leave it out"),
        (nn.Linear, "head.weight is tied to embed.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_selections(select: Any, message: str) -> None:
    refused(Model(), select, message)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": 15}, BudgetError, r"at 'out': parameters must be at least 58 .*; got 15"),
        ({"budget": 0}, BudgetError, "at 'out': parameters of a budget must be a positive integer"),
        ({"budget": "linea"}, BudgetError, "budget must be one of 'linear'; got 'linea'"),
        ({"budget": Budget(flops=10)}, BudgetError, "at 'out': flops must be at least"),
        ({"budget": 50, "rank": 3}, RankError, "rank and budget exclude one another"),
        ({"rank": 0}, RankError, "at 'out': rank must be positive integers; got 0"),
        ({"rank": "4"}, RankError, "rank must be positive integers; got '4'"),
        ({"factorization": "tensor_ring", "rank": (2, 2)}, RankError, "rank must have 3 bonds"),
        ({"factorization": "parafac"}, SpecError, "factorization must be one of 'cp'"),
        ({"factorization": 3}, SpecError, "factorization must be one of 'cp'.*; got 3"),
        ({"factorization": (CP(2), CP(2))}, SpecError, "factorization must be one for a single"),
        ({"experts": 0}, SpecError, "experts must be positive integers; got 0"),
        ({"experts": "8"}, SpecError, "experts must be positive integers"),
        ({"experts": 4.0}, SpecError, "experts must be positive integers; got 4.0"),
        ({"gate": "hard"}, ValueError, "hard"),
        ({"noise": -1}, SpecError, "noise must be a finite number"),
        ({"noise": "0.1"}, SpecError, "noise must be a finite number"),
        ({"start": "svd"}, SpecError, "start must be one of 'weights', 'variance', 'paper'"),
        ({"batch": 0}, SpecError, "batch must be a positive integer; got 0"),
        ({"batch": "32"}, SpecError, "batch must be a positive integer; got '32'"),
        ({"batch": 3, "example": torch.ones(1)}, SpecError, "batch and example exclude"),
        ({"example": 5}, SpecError, "example must be a tensor, a tuple .*; got int"),
        ({"roofline": "abacus"}, BudgetError, "roofline must be one of .*; got 'abacus'"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_arguments(given: dict[str, Any], error: Any, message: str) -> None:
    refused(Model(), "out", message, error, **given)


def test_the_smallest_feasible_budget_is_feasible() -> None:
    model = Model()
    with pytest.raises(BudgetError, match=r"at 'blocks.0.mlp'") as caught:
        replace(model, "**.mlp", experts=4, budget=5)
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found is not None
    smallest = int(found.group(1))
    with pytest.raises(BudgetError):
        replace(model, "blocks.0.mlp", experts=4, budget=smallest - 1)
    assert (caught.value.needed, caught.value.given) == (
        {"parameters": smallest},
        {"parameters": 5},
    )
    replace(model, "blocks.0.mlp", experts=4, budget=smallest)
    assert model.blocks[0].mlp.num_parameters == smallest


def test_arguments_of_blocks() -> None:
    refused(Model(), "**.mlp", r"drop must be in \[0, 1\); got 2", drop=2)
    refused(
        Model(), "**.mlp", "factorization must be one, or one per layer", factorization=(CP(2),)
    )
    model = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Dropout(0.1))}
    )
    refused(model, "mlp", "the dropout of 'mlp' must have one rate .*; got 0 and 0.1. Give drop=")


def test_the_model_must_be_one() -> None:
    for model in (None, "model", nn.Linear):
        with pytest.raises(SpecError, match=r"model must be an nn.Module"):
            replace(model, "head", experts=4)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"got Linear\(.*Write '\*\*.mlp'"):
        replace(Model(), nn.Linear(2, 2), experts=4)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="the model itself"):
        replace(nn.Linear(2, 2), nn.Linear, experts=4)


def test_what_else_holds_on_to_a_layer() -> None:
    twins = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    twins["b"].weight = twins["a"].weight
    for select in ("a", ["a", "b"]):
        refused(twins, select, "a.weight is tied to b.weight")
    shared = nn.ModuleDict({"a": twins["a"], "c": twins["a"]})
    refused(shared, "c", "'c' is also used as 'a', which is not selected")
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    refused(attention, "**.out_proj", "nn.MultiheadAttention reads its weights and never calls it")
    normed = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    refused(normed, "a", "those of 'a' are computed. Remove the parametrization")
    model = Model()
    model.blocks[0].mlp[0].register_forward_hook(lambda *_: None)
    refused(model, "**.mlp", "hooks inside a replaced block would be lost; 'blocks.0.mlp.0' has")


def test_examples_that_do_not_reach() -> None:
    class Half(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids) @ self.embed.weight.t())

    refused(Half(), "**.mlp", "'blocks.0.mlp' got none", example=torch.arange(5))
    model = Model().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    refused(model, "**.mlp", "Expected tensor", (TypeError, RuntimeError), example=torch.ones(3, 4))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_none() -> None:
    for value in (None, 3, "fc", nn.Conv1d(3, 3, 1), nn.Bilinear(2, 2, 2), nn.Linear):
        with pytest.raises(SpecError, match=r"linear must be an nn.Linear"):
            from_linear(value, 4)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="must know its sizes; got a lazy layer"):
        from_linear(nn.LazyLinear(3), 4)
    with pytest.raises(SpecError, match="its weights are on the meta device"):
        from_linear(nn.Linear(3, 3, device="meta"), 4)
    broken = nn.Linear(3, 3)
    with torch.no_grad():
        broken.bias[1] = float("nan")
    with pytest.raises(SpecError, match="must hold finite weights"):
        from_linear(broken, 4)

    class Adapted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + input

    with pytest.raises(SpecError, match="must run as a linear layer; got Adapted"):
        from_linear(Adapted(3, 3), 4)
    with pytest.raises(SpecError, match="factorization must be one for a single layer"):
        from_linear(nn.Linear(3, 3), 4, (CP(2), CP(2)))  # type: ignore[arg-type]


class Odd(nn.Module):
    """Two linear layers and something between, before, behind or around them."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.what = nn.Linear(6, 6), nn.Linear(6, 6), what
        self.scale = nn.Parameter(torch.ones(())) if what == "parameter" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        if self.what == "arguments":
            return self.fc2(F.relu(self.fc1(x))) * mask.shape[0]
        if self.what == "flat":
            x = x.flatten(1)
        elif self.what == "before":
            x = 2.0 * x
        h = F.relu(self.fc1(x))
        if self.what == "norm":
            h = F.layer_norm(h, (6,))
        elif self.what == "dropout":
            h = F.dropout(h, 0.5, self.training)
        elif self.what == "scaled":
            h = 1.01 * h
        elif self.what == "twice":
            h = self.fc1(h)
        y = self.fc2(h)
        if self.what == "residual":
            return x + y
        return (y, h) if self.what == "tuple" else y


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("norm", "the activation of mlp must be one of"),
        ("dropout", "the activation of mlp must be one of"),
        ("scaled", "the activation of mlp must be one of"),
        ("twice", "does more than"),
        ("residual", "does more than"),
        ("tuple", "does more than"),
        ("flat", "does more than"),
        ("before", "does more than"),
        ("arguments", r"takes more than one input \('NoneType'"),
        ("parameter", "besides two linear layers it holds 'scale'"),
    ],
)
def test_modules_that_do_more_than_an_mlp(what: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_mlp(Odd(what), 4)
    assert Odd("nothing")(torch.ones(2, 6)).shape == (2, 6)
    from_mlp(Odd("nothing"), 4)


def test_blocks_that_are_none() -> None:
    first, second = nn.Linear(4, 8), nn.Linear(8, 4)
    for parts, message in (
        (nn.Sequential(first, second), "the activation of mlp must be one of"),
        (nn.Sequential(nn.Dropout(0.1), first, nn.ReLU(), second), "does more than"),
        (first, r"mlp \(Linear\) is no linear layer and no MLP: .* has 1"),
        ((first, second), r"mlp must have three parts, \(fc1, act, fc2\), or four, .*; got 2"),
        ((second, "gelu", first, 3, 4), "got 5"),
        ((first, "silu", 3, second), "up of mlp must be an nn.Linear"),
        ((first, "silu", nn.Linear(4, 7), second), r"gate is \(4, 8\) and up is \(4, 7\)"),
        ((first, "gelu", nn.Linear(7, 4)), "fc1 gives 8 features, fc2 takes 7"),
        ((first, "gelu", nn.Linear(8, 4).double()), "must have one dtype and device"),
        ((first, "geglu", second), "act must be one of .*; got 'geglu'"),
        ((first, 3, second), "act must be one of .*, or a module, .*; got 3"),
        ((first, int, second), "act must be one of .*; got <class 'int'>"),
        ((first, lambda: 0, second), "act must be called with one tensor; .*takes 0 positional"),
        ((first, lambda x: 0, second), "act must give a tensor"),
        ((first, second, "gelu"), "fc2 of mlp must be an nn.Linear"),
        ("mlp", "mlp must be a module with two linear layers"),
        (7, "mlp must be a module with two linear layers"),
        ([first, "gelu", second], "mlp must be a module with two linear layers"),
    ):
        with pytest.raises(SpecError, match=message):
            from_mlp(parts, 4)  # type: ignore[arg-type]

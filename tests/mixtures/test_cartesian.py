"""Cartesian products: the paper's algorithm as loops, pairs, disabled experts, budgets, costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense
from tensormoe.errors import BudgetError, GateError, ShapeError, SpecError
from tensormoe.mixtures import CartesianConfig, cartesian_config, sparse_config
from tensormoe.routing import Router, choose, without_best
from tensormoe.selection import Budget
from tensormoe_torch.mixtures import without_best_experts
from tests._task import task
from tests.mixtures._forms import drawn, tokens, torch_layer
from tests.mixtures._loops import by_loops

SMALL: dict[str, Any] = {"experts": 4, "top_k": 2}


def config_of(**options: Any) -> CartesianConfig:
    return cartesian_config(6, 7, **SMALL | options)


def by_paper(config: CartesianConfig, arrays: Any, x: np.ndarray) -> np.ndarray:
    """Sum that a block adds to the residual stream, one half after the other."""

    def norm(name: str, rows: np.ndarray) -> np.ndarray:
        root = np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + config.eps)
        normed: np.ndarray = rows / root * arrays[f"{name}.weight"]
        return normed

    def half(name: str, rows: np.ndarray) -> np.ndarray:
        inner = {key.removeprefix(f"{name}."): each for key, each in arrays.items()}
        return by_loops(config.half, inner, rows)

    made = half("first", norm("first_norm", x) if config.pre_norm else x)
    stream = x + made
    return stream + half("second", norm("second_norm", stream)) - x


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("shared", [None, 3])
@pytest.mark.parametrize("kind", [Dense(), CP(4)], ids=str)
def test_the_papers_algorithm(kind: Any, shared: int | None, pre_norm: bool) -> None:
    config = config_of(factorization=kind, shared_features=shared, pre_norm=pre_norm, eps=0.1)
    assert config.half.mix_shared == (shared is not None)
    arrays, x = drawn(config), tokens(config, (9,))
    wanted = by_paper(config, arrays, x)
    for found in (
        tensormoe_numpy.CartesianMoE.restore(config, arrays)(x),
        torch_layer(config, arrays)(torch.tensor(x)).detach().numpy(),
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())


def test_pairs_are_compositions_of_sub_experts() -> None:
    config = config_of()
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (2, 3)))
    routes = layer.route(x)
    pairs = routes.pairs
    assert pairs.indices.shape == (2, 3, 4)
    assert config.num_experts == 16
    torch.testing.assert_close(pairs.values.sum(-1), torch.ones(2, 3, dtype=x.dtype))
    for token in np.ndindex(2, 3):
        both = [each.top_k_index[token].tolist() for each in (routes.first, routes.second)]
        weights = [each.top_k_weights[token].tolist() for each in (routes.first, routes.second)]
        assert pairs.indices[token].tolist() == [4 * i + j for i in both[0] for j in both[1]]
        np.testing.assert_allclose(
            pairs.values[token].detach(), np.outer(*weights).ravel(), rtol=1e-12
        )


def test_the_second_half_is_routed_by_the_outputs_of_the_first() -> None:
    """A record with other experts of the first half changes what the second half is given."""
    config = config_of()
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (5,)))
    seen: list[torch.Tensor] = []
    layer.second.experts.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    routes = layer.route(x)
    changed = type(routes)(without_best(config.half.router, routes.first), routes.second)
    assert not torch.allclose(layer(x, routes), layer(x, changed))
    assert not torch.allclose(*seen)


def test_every_half_runs_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    x, calls = tokens(config, (5,)), []
    kind = type(config.half)
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda *given: calls.append(1) or run(*given))
    ours = tensormoe_numpy.CartesianMoE.restore(config, drawn(config))
    ours(x)
    assert len(calls) == 2
    ours.route(x)
    assert len(calls) == 3
    held = {name: jnp.asarray(each) for name, each in drawn(config, "float32").items()}
    module = tensormoe_jax.nnx.CartesianMoE.restore(config, held)
    jax.eval_shape(module, jnp.asarray(x, "float32"))
    assert len(calls) == 5


# disabled experts


@pytest.mark.parametrize("router", [Router(), Router("sigmoid", renormalize=False, scale=2.0)])
def test_without_its_best_expert_a_token_takes_the_next(router: Router) -> None:
    logits = np.random.default_rng(0).standard_normal((7, 5))
    bias = np.array([0.0, 3.0, 0.0, -3.0, 0.0]) if router.scores == "sigmoid" else None
    routes = choose(router, logits, 2, choice_bias=bias)
    found = without_best(router, routes, choice_bias=bias)
    left = np.where(logits == logits.max(-1, keepdims=True), -np.inf, logits)
    wanted = choose(router, left, 2, choice_bias=bias)
    for name in ("top_k_index", "top_k_weights", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert not np.any(found.top_k_index == np.argmax(logits, -1)[:, None])


def test_a_balanced_choice_never_takes_the_disabled_expert() -> None:
    router = Router("sigmoid", balance=0.1)
    logits = np.array([[2.0, 1.0, 0.0]])
    bias = np.array([9.0, 0.0, 0.0])
    found = without_best(router, choose(router, logits, 2, choice_bias=bias), choice_bias=bias)
    assert sorted(found.top_k_index[0].tolist()) == [1, 2]


def test_a_model_without_its_best_experts() -> None:
    layers = [
        tensormoe_torch.SparseMoE(6, 7, **SMALL, router=Router("sigmoid", balance=0.01)),
        tensormoe_torch.CartesianMoE(6, 7, **SMALL, shared_features=3),
    ]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 9, 6)
    with torch.no_grad():
        before = model(x)
        best = layers[0].route(x).logits.argmax(-1, keepdim=True)
        with without_best_experts(model) as same:
            assert same is model
            disabled = model(x)
            record = layers[1].route(x)
            assert not (layers[0].route(x).top_k_index == best).any()
            assert record.first.mixing is not None
        assert not torch.allclose(before, disabled)
        assert torch.equal(model(x), before)
        with pytest.raises(ZeroDivisionError), without_best_experts(model):
            raise ZeroDivisionError
        assert torch.equal(model(x), before)


def test_there_must_be_another_expert() -> None:
    routes = choose(Router(), np.zeros((2, 3)), 3)
    with pytest.raises(GateError, match=r"k must be below the 3 experts.* got 3. Choose fewer"):
        without_best(Router(), routes)
    with pytest.raises(SpecError, match=r"must have a sparse router; got Linear without. Pass a"):
        without_best_experts(nn.Linear(2, 2)).__enter__()


# budgets, costs, bad input


@pytest.mark.parametrize("options", [{}, {"pre_norm": True, "shared_features": 5, "bias": True}])
@pytest.mark.parametrize("counts", [True, False])
def test_a_budget_is_shared_by_both_halves(options: Any, counts: bool) -> None:
    budget = Budget(parameters=1201, gate=counts)
    found = config_of(factorization="cp", budget=budget, **options)
    router = 0 if counts else 2 * sum(np.prod(array.shape) for array in found.half.own.values())
    assert found.num_parameters <= 1201 + router
    up, down = found.half.experts.up.factorization, found.half.experts.down.factorization
    for more in ((1, 0), (0, 1)):
        pair = CP(up.rank + more[0]), CP(down.rank + more[1])
        assert config_of(factorization=pair, **options).num_parameters > 1201 + router


def test_an_impossible_budget_says_what_is_needed() -> None:
    with pytest.raises(
        BudgetError, match=r"at least \d+ for both halves.*; got 10. Raise"
    ) as caught:
        config_of(factorization="cp", budget=10)
    needed = caught.value.needed["parameters"]
    assert config_of(factorization="cp", budget=needed).num_parameters <= needed
    with pytest.raises(BudgetError):
        config_of(factorization="cp", budget=needed - 2)


@pytest.mark.parametrize("batch", [1, 10, 64])
@pytest.mark.parametrize("options", [{}, {"shared_features": 5, "factorization": CP(8)}], ids=str)
def test_products_are_what_pytorch_counts(options: Any, batch: int) -> None:
    config = config_of(**options)
    layer = torch_layer(config, drawn(config))
    x = torch.tensor(tokens(config, (batch,)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.cost(batch).matmul_flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 5}, SpecError, "top_k must be at most the 4 experts; got 5"),
        ({"experts": 0}, SpecError, "experts must be a positive integer; got 0"),
        ({"out_features": 5}, SpecError, "out_features must equal in_features=6.* got 5. Leave"),
        ({"eps": 0.0}, SpecError, "eps must be a positive number; got 0.0. Use 1e-6"),
        ({"pre_norm": 1}, SpecError, "pre_norm must be"),
        ({"budget": 3000, "factorization": "cp", "rank": 3}, Exception, "exclude one another"),
        ({"budget": True, "factorization": "cp"}, BudgetError, "budget of a mixture must be"),
    ],
)
def test_bad_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tensormoe_torch.CartesianMoE(6, 7, **SMALL | options)


def test_records_of_a_sparse_mixture_are_refused() -> None:
    config = config_of()
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (3,)))
    other = sparse_config(6, 7, 6, **SMALL)
    with pytest.raises(ShapeError, match="routes must be the record of these tokens"):
        layer(x, torch_layer(other, drawn(other)).route(x))


def test_it_learns() -> None:
    """A few steps in which both halves, both norms and the mixing weights move."""
    x, target, linear = task()
    y = torch.tensor(target)
    torch.manual_seed(0)
    layer = tensormoe_torch.CartesianMoE(8, 12, experts=4, top_k=2, shared_features=6)
    start = {name: each.clone() for name, each in layer.named_parameters()}
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(150):
        loss = nn.functional.mse_loss(layer(torch.tensor(x))[:, :3], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * linear
    for name, each in layer.named_parameters():
        assert not torch.equal(each, start[name]), f"{name} did not move"

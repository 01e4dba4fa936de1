"""Experts of different sizes: a loop over tokens and experts, sizes, what runs, budgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.utils.flop_counter import FlopCounterMode

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense, TensorRing
from tensormoe.errors import BudgetError, GateError, PlanError, RankError, ShapeError, SpecError
from tensormoe.gates import load_balance_loss
from tensormoe.mixtures import (
    DiverseConfig,
    diverse_config,
    experts_config,
    paired_sizes,
    sparse_config,
)
from tensormoe.routing import Router
from tensormoe.selection import Budget
from tests._task import task
from tests.mixtures._contract import MixtureContract
from tests.mixtures._forms import drawn, tokens, torch_layer
from tests.mixtures.test_sparse import expert


def _diverse(hidden: Any = (9, 9, 5, 3), **options: Any) -> DiverseConfig:
    return diverse_config(6, hidden, 5, **{"top_k": 2} | options)


class TestDiverseMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "swiglu": _diverse(bias=True, router=Router(bias=True)),
        # large enough for grouped products
        "wide": _diverse((220, 220, 210), kind="mlp"),
        "mlp, ring, cp, balance": _diverse(
            kind="mlp",
            factorization=(TensorRing((2, 3, 2)), CP(4)),
            top_k=3,
            router=Router("sigmoid", balance=0.01),
        ),
        "noise, all experts": _diverse(7, experts=2, router=Router(noise=1.0)),
        "capacity": _diverse((9, 4), top_k=1, router=Router(capacity=1.0, renormalize=False)),
    }
    other = diverse_config(6, (9, 3, 3), 5, top_k=1)
    compiled = ("swiglu", "wide", "mlp, ring, cp, balance")


def by_loops(config: DiverseConfig, arrays: Any, x: np.ndarray) -> np.ndarray:
    places = [
        (place, number)
        for place, group in enumerate(config.groups)
        for number in range(group.num_experts)
    ]
    outputs = []
    for token in x:
        logits = token @ arrays["router.projection"] + arrays.get("router.bias", 0.0)
        chosen = np.argsort(-logits)[: config.top_k]
        y = np.zeros(config.out_features)
        for number, weight in zip(chosen, softmax(logits[chosen]), strict=True):
            place, inner = places[number]
            group = config.groups[place]
            y += weight * expert(group, arrays, f"experts.{place}", inner, token)
        outputs.append(y)
    return np.array(outputs)


def everywhere(config: DiverseConfig, arrays: Any, x: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Outputs by every way in which rows reach the sizes."""
    yield "NumPy", tensormoe_numpy.DiverseMoE.restore(config, arrays)(x)
    layer, given = torch_layer(config, arrays), torch.tensor(x)
    yield "PyTorch", layer(given).detach()
    yield "a transform", torch.func.vmap(layer)(given[None])[0].detach()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    yield "a compiler", compiled(given).detach()
    with jax.enable_x64(True):
        held = {name: jnp.asarray(each) for name, each in arrays.items()}
        run = jax.jit(lambda x: tensormoe_jax.nnx.DiverseMoE.restore(config, held)(x))
        yield "JAX", np.asarray(run(jnp.asarray(x)))


@pytest.mark.parametrize("kind", [Dense(), CP(4)], ids=str)
@pytest.mark.parametrize("sizes", [(9, 9, 5, 3), (220, 215, 215)], ids=str)
def test_a_loop_over_tokens_and_experts(sizes: Any, kind: Any) -> None:
    config = _diverse(sizes, factorization=kind, bias=True, router=Router(bias=True))
    arrays, x = drawn(config), tokens(config, (31,))
    # an expert that nobody chooses, and with it a size
    arrays["router.bias"][-1] = -50.0
    wanted = by_loops(config, arrays, x)
    for name, found in everywhere(config, arrays, x):
        size = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10 * size, err_msg=name)


def test_experts_of_one_size_are_a_sparse_mixture() -> None:
    ours = _diverse((9, 9, 9), bias=True)
    theirs = sparse_config(6, 9, 5, experts=3, top_k=2, bias=True)
    assert ours.num_parameters == theirs.num_parameters
    arrays, x = drawn(ours), tokens(ours)
    renamed = {name.replace("experts.0", "experts"): each for name, each in arrays.items()}
    found = tensormoe_numpy.DiverseMoE.restore(ours, arrays)(x)
    wanted = tensormoe_numpy.SparseMoE.restore(theirs, renamed)(x)
    np.testing.assert_allclose(found, wanted)


def test_sizes_in_pairs() -> None:
    for hidden, experts, spread, multiple in ((64, 4, 0.5, 1), (7, 6, 0.9, 1), (512, 16, 0.3, 16)):
        sizes = paired_sizes(hidden, experts, spread, multiple=multiple)
        assert len(sizes) == experts
        assert [*sizes] == sorted(sizes, reverse=True)
        for larger, smaller in zip(sizes, reversed(sizes), strict=True):
            assert larger + smaller == 2 * hidden
            assert (larger - hidden) % multiple == 0
        assert abs(sizes[0] - hidden * (1 + spread)) <= max(multiple / 2, 0.5)
    ours = diverse_config(16, 64, None, experts=8, top_k=2, bias=False)
    theirs = sparse_config(16, 64, None, experts=8, top_k=2)
    assert ours.num_parameters == theirs.num_parameters


@pytest.mark.parametrize("factorization", [Dense(), CP(8)], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
def test_products_are_those_of_the_sizes_that_were_chosen(kind: str, factorization: Any) -> None:
    config = diverse_config(
        16,
        (64, 64, 8),
        12,
        top_k=2,
        kind=kind,
        factorization=factorization,
        router=Router(bias=True),
    )
    arrays, x = drawn(config), tokens(config, (40,))
    for shift in (0.0, 50.0, -50.0):
        arrays["router.bias"][-1] = shift
        layer, given = torch_layer(config, arrays), torch.tensor(x)
        chosen = layer.route(given).top_k_index
        small = int((chosen == 2).sum())
        assert shift == 0.0 or small == (40 if shift > 0 else 0)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(given)
        wanted = config.cost(40, loads=(80 - small, small)).matmul_flops
        assert counter.get_total_flops() == wanted


def test_compiled_calls_group_the_rows_of_a_size_alone(monkeypatch: Any) -> None:
    """Every size is handed all rows, but its products have its own rows."""
    config = _diverse((220, 220, 210), kind="mlp")
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (30,)))
    index = layer.route(x).top_k_index
    small = int((index == 2).sum())
    seen = []

    def watched(rows: Any, matrices: Any, counts: Any) -> Any:
        seen.append((len(rows), len(matrices), counts.tolist()))
        return tensormoe_numpy.BACKEND.grouped_matmul(rows, matrices, counts)

    monkeypatch.setattr(
        "tensormoe_torch._grouped._products",
        lambda *given: torch.tensor(watched(*(each.numpy() for each in given))),
    )
    with torch.no_grad():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert len(seen) == 4
    for rows, experts, counts in seen:
        assert rows == 60
        assert len(counts) == experts + 1
        assert counts[-1] == (small if experts == 2 else 60 - small)


def test_costs_of_even_loads() -> None:
    config = diverse_config(16, (64, 64, 8), 12, top_k=2)
    assert config.even_loads(40) == (53, 27)
    assert sum(config.even_loads(7)) == 14
    assert config.cost(40).matmul_flops == config.cost(40, loads=(53, 27)).matmul_flops
    # pairs cost what equal experts do
    ours = diverse_config(16, 64, None, experts=4, top_k=2).cost(200)
    theirs = sparse_config(16, 64, None, experts=4, top_k=2).cost(200)
    assert ours.matmul_flops == theirs.matmul_flops
    assert config.cost(40, training=True).saved_memory > 0 == config.cost(40).saved_memory


def test_costs_of_what_cannot_be() -> None:
    config = _diverse((9, 5, 5))
    for loads in ((8,), (8, 1), (9, -1), ()):
        with pytest.raises(
            PlanError, match="loads must be choices of each of the 2 sizes, 8 in all"
        ):
            config.cost(4, loads=loads)
    for batch in (-1, 1.5):
        with pytest.raises(PlanError, match="batch must be a non-negative integer; got"):
            config.cost(batch)


def test_the_call_of_the_experts() -> None:
    config = _diverse((9, 5, 5))
    arrays, x = drawn(config), tokens(config, (4,))
    layer, given = torch_layer(config, arrays), torch.tensor(x)
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    experts = layer.experts
    assert len(experts) == 3
    assert [len(group) for group in experts.groups] == [1, 2]
    wanted = sum(
        weights[:, k, None]
        * torch.stack([experts[int(n)](t) for n, t in zip(index[:, k], given, strict=True)])
        for k in (0, 1)
    )
    torch.testing.assert_close(experts(given, index, weights), wanted)
    torch.testing.assert_close(experts[-1](given), experts[2](given))
    for place in (3, -4):
        with pytest.raises(IndexError, match=r"expert must be in \[0, 3\); got"):
            experts[place]
    with pytest.raises(ShapeError, match="top_k_index and top_k_weights must both have shape"):
        experts(given, index[:3], weights)


def test_sizes_that_nobody_chose_have_gradients_of_zero() -> None:
    """Processes that share gradients wait for those of every parameter."""
    config = _diverse((9, 5), top_k=1, router=Router(bias=True))
    arrays = drawn(config)
    arrays["router.bias"] = np.array([50.0, -50.0])
    layer = torch_layer(config, arrays)
    layer(torch.tensor(tokens(config))).sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.startswith("0."), name


def test_budgets_cover_everything_and_are_split_by_size() -> None:
    options: dict[str, Any] = {"top_k": 2, "factorization": "cp", "bias": True}
    router = Router(bias=True)
    config = diverse_config(32, (96, 96, 32), None, budget=9000, router=router, **options)
    assert 8500 < config.num_parameters <= 9000
    ranks = [group.down.factorization.rank for group in config.groups]
    assert ranks[0] > ranks[1]
    free = Budget(parameters=9000, gate=False)
    wider = diverse_config(32, (96, 96, 32), None, budget=free, router=router, **options)
    assert wider == diverse_config(
        32, (96, 96, 32), None, budget=9000 + 33 * 3, router=router, **options
    )
    dense = diverse_config(32, (96, 96, 32), None, top_k=2)
    same = diverse_config(32, (96, 96, 32), None, top_k=2, budget=dense.num_parameters)
    assert same == dense
    for kind in ("cp", "dense"):
        with pytest.raises(
            BudgetError, match=r"at least \d+ for this mixture, of which 96 are"
        ) as found:
            diverse_config(32, (96, 96, 32), None, top_k=2, factorization=kind, budget=3)
        needed = int(found.value.needed["parameters"])
        enough = diverse_config(32, (96, 96, 32), None, top_k=2, factorization=kind, budget=needed)
        assert enough.num_parameters <= needed
        with pytest.raises(BudgetError):
            diverse_config(32, (96, 96, 32), None, top_k=2, factorization=kind, budget=needed - 1)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a mean and no number": (
        9,
        {},
        SpecError,
        "experts must be given where hidden_features is the mean size; got hidden",
    ),
    "an odd number": (
        9,
        {"experts": 3},
        SpecError,
        "experts must be an even number to be paired; got 3. Add one",
    ),
    "another number": (
        (9, 5),
        {"experts": 3},
        SpecError,
        "hidden_features must hold one size per expert, 3; got 2",
    ),
    "a size of zero": (
        (9, 0),
        {},
        SpecError,
        "hidden_features of expert 1 must be a positive integer; got 0",
    ),
    "no size": ((), {}, SpecError, "hidden_features must hold one size per expert; got none"),
    "apart": (
        (9, 5, 9),
        {},
        SpecError,
        "equal sizes side by side; got 9 for expert 2 and for expert 0",
    ),
    "spread of given sizes": ((9, 5), {"spread": 0.3}, SpecError, "spread must be None where each"),
    "a spread of 1": (
        9,
        {"experts": 2, "spread": 1.0},
        SpecError,
        "spread must be a number between 0 and 1; got 1",
    ),
    "no difference": (
        2,
        {"experts": 2, "spread": 0.1},
        SpecError,
        "sizes must differ; got 2 for all",
    ),
    "nothing left": (
        2,
        {"experts": 2, "spread": 0.9},
        SpecError,
        "sizes must be positive; got 0 for hidden_feat",
    ),
    "k above N": ((9, 5), {"top_k": 3}, SpecError, "top_k must be at most the 2 experts; got 3. L"),
    "linear": ((9, 5), {"kind": "linear"}, SpecError, "got 'linear'. Use SparseMoE for linear"),
    "pairs of others": (
        (9, 5, 3),
        {"factorization": (("cp", "cp"), ("cp", "cp"))},
        SpecError,
        "a pair for each of the 3 sizes; got 2 pairs",
    ),
    "rank and budget": (
        (9, 5),
        {"factorization": CP(2), "budget": 900},
        RankError,
        "exclude one another",
    ),
    "router": ((9, 5), {"router": "top_k"}, GateError, "scores must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name: str) -> None:
    hidden, options, error, message = REFUSED[name]
    for make in (
        lambda **named: tensormoe_numpy.DiverseMoE(6, hidden, **named, seed=0),
        lambda **named: tensormoe_torch.DiverseMoE(6, hidden, **named),
        lambda **named: tensormoe_jax.nnx.DiverseMoE(6, hidden, **named, rngs=0),
        lambda **named: tensormoe_jax.equinox.DiverseMoE(6, hidden, **named, key=jax.random.key(0)),
    ):
        with pytest.raises(error, match=message):
            make(**{"top_k": 1} | options)


def test_groups_that_are_no_mixture() -> None:
    first = experts_config(6, 9, 5, 2)
    for other in (
        experts_config(6, 9, 5, 1),
        experts_config(6, 7, 4, 1),
        experts_config(6, 7, 5, 1, kind="mlp"),
        experts_config(6, None, 5, 1, kind="linear"),
    ):
        with pytest.raises(SpecError, match="groups"):
            DiverseConfig((first, other), 1, Router())
    with pytest.raises(SpecError, match="at least one size"):
        DiverseConfig((), 1, Router())


def test_training_lowers_the_loss() -> None:
    x, target, linear = task()
    torch.manual_seed(0)
    layer = tensormoe_torch.DiverseMoE(8, 16, 3, experts=4, top_k=2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    given, wanted = torch.tensor(x), torch.tensor(target)
    losses = []
    for _ in range(100):
        routes = layer.route(given)
        loss = ((layer(given, routes) - wanted) ** 2).mean()
        balance = load_balance_loss(routes.scores, routes.choices, experts=4)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < linear / 2


def test_balance_counts_the_load_of_all_processes_if_asked() -> None:
    layer = tensormoe_torch.DiverseMoE(6, (9, 5), top_k=1, router=Router("sigmoid", balance=0.1))
    assert not layer.router.synchronized
    tensormoe_torch.synchronize_gates(torch.nn.Sequential(layer))
    assert layer.router.synchronized

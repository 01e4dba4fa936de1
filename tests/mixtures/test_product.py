"""Product routing with many small experts: against all experts, one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

import tensormoe_numpy
from tensormoe import CP, Dense, TensorRing
from tensormoe.errors import GateError, RankError, ShapeError, SpecError
from tensormoe.gates import load_balance_loss
from tensormoe.mixtures import ProductConfig, product_config
from tensormoe.routing import Router
from tensormoe_torch import ProductMoE
from tests.mixtures._contract import MixtureContract
from tests.mixtures._forms import drawn, tokens, torch_layer


def _product(*sizes: int | None, **options: Any) -> ProductConfig:
    hidden, outer = sizes or (None, 5)
    given = {"experts": (3, 4), "top_k": 3, "heads": 2, "key_features": 5} | options
    return product_config(6, hidden, outer, **given)


class TestProductMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "tables": _product(),
        "cp, projected, noise": _product(
            factorization=CP(3),
            key_features=None,
            act_layer="silu",
            router=Router(renormalize=False, noise=1.0),
        ),
        "ring, keys of heads, three levels": _product(
            3,
            5,
            experts=(2, 3, 2),
            factorization=(TensorRing((2, 2, 2, 2, 2)), CP(4)),
            share_keys=False,
        ),
    }
    other = _product(experts=(4, 4), top_k=2)


FORMULAS: dict[str, ProductConfig] = {
    **TestProductMoE.configs,
    "two units": _product(2, 5),
    "keys of heads, sigmoid": _product(
        share_keys=False, query_norm=False, router=Router("sigmoid", renormalize=False)
    ),
}


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def _logits(config: ProductConfig, arrays: Any, x: np.ndarray) -> list[np.ndarray]:
    keys = config.keys
    if keys.key_features is None:
        return [
            np.reshape(x @ arrays[f"router.projection_{level}"], (len(x), keys.heads, size))
            for level, size in enumerate(keys.experts)
        ]
    shape = len(x), keys.heads, keys.levels, keys.key_features
    queries = (x @ arrays["router.query"]).reshape(shape)
    if keys.query_norm:
        queries = queries - queries.mean(-1, keepdims=True)
        queries = queries / np.sqrt(queries.var(-1, keepdims=True) + 1e-5)
    made = []
    for level in range(keys.levels):
        table = arrays[f"router.keys_{level}"]
        table = np.broadcast_to(table, (keys.heads, *table.shape[-2:]))
        made.append(np.einsum("thd,hnd->thn", queries[:, :, level], table))
    return made


def _all_experts(config: ProductConfig, arrays: Any, x: np.ndarray) -> np.ndarray:
    """Outputs (tokens, N, out) of all experts."""
    inner, hidden, outer = config.sizes
    if config.factorized is None:
        up = arrays["experts.up_proj.weight"].reshape(-1, hidden, inner)
        down = arrays["experts.down_proj.weight"].reshape(-1, hidden, outer)
        return np.einsum("tnh,nho->tno", _gelu(np.einsum("ti,nhi->tnh", x, up)), down)
    made = []
    for role, layer in config.factorized.layers.items():
        start = f"experts.projections.{role}."
        held = {name.removeprefix(start): a for name, a in arrays.items() if start in name}
        whole = tensormoe_numpy.MuMoE.restore(layer, held).materialize()[0]
        made.append(whole.reshape(-1, *whole.shape[-2:]))
    units = np.einsum("ti,nih->tnh", x, made[0])
    units = units / (1 + np.exp(-units)) if config.act_layer == "silu" else _gelu(units)
    return np.einsum("tnh,nho->tno", units, made[1])


@pytest.mark.parametrize("name", FORMULAS)
def test_a_weighted_sum_of_the_best_of_all_experts(name: str) -> None:
    config = FORMULAS[name]
    arrays, x = drawn(config), tokens(config, (7,))
    one, *others = _logits(config, arrays, x)
    for level in others:
        one = (one[..., None] + level[..., None, :]).reshape(*one.shape[:2], -1)
    order = np.argsort(-one, axis=-1)[..., : config.top_k]
    kept, router = np.take_along_axis(one, order, -1), config.keys.router
    if router.scores == "sigmoid":
        weights = 1 / (1 + np.exp(-kept))
    elif router.renormalize:
        weights = softmax(kept, -1)
    else:
        weights = np.take_along_axis(softmax(one, -1), order, -1)
    spread = np.zeros_like(one)
    np.put_along_axis(spread, order, weights, -1)
    wanted = np.einsum("thn,tno->to", spread, _all_experts(config, arrays, x))
    layer = tensormoe_numpy.ProductMoE.restore(config, arrays)
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-9, atol=1e-12)
    assert np.array_equal(layer.route(x).top_k_index, order)


@pytest.mark.parametrize("hidden", [1, 2])
def test_sparse_gradients_are_those_of_the_rows_that_were_read(hidden: int) -> None:
    options: dict[str, Any] = {"experts": (8, 9), "top_k": 2, "key_features": 4}
    layer = ProductMoE(6, hidden, **options, sparse=True)
    plain = ProductMoE.restore(layer.config, layer.state_dict())
    x = torch.randn(5, 6)
    routes = layer.route(x)
    for each in (layer, plain):
        each(x).square().sum().backward()
    for role in ("up_proj", "down_proj"):
        found = layer.experts.get_submodule(role).weight.grad
        assert found.is_sparse
        assert {*found.coalesce().indices()[0].tolist()} == {*routes.top_k_index.flatten().tolist()}
        wanted = plain.experts.get_submodule(role).weight.grad
        assert not wanted.is_sparse
        torch.testing.assert_close(found.to_dense(), wanted)
    torch.testing.assert_close(layer.router.query.grad, plain.router.query.grad)


# the compiler looks at gradients of what is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiler_leaves_sparse_gradients_alone() -> None:
    layer = ProductMoE(6, experts=(8, 9), top_k=2, key_features=4, sparse=True)
    x = torch.randn(5, 6)
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="must have dense gradients to be compiled"):
        whole(x)
    parts = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(parts(x), layer(x))
    parts(x).sum().backward()
    assert layer.experts.up_proj.weight.grad.is_sparse


def test_tables_learn_with_a_sparse_optimizer() -> None:
    torch.manual_seed(0)
    layer = ProductMoE(8, 1, 3, experts=(16, 16), top_k=4, heads=2, key_features=8, sparse=True)
    tables = [*layer.experts.parameters()]
    optimizers = [
        torch.optim.SparseAdam(tables, lr=0.02),
        torch.optim.Adam(layer.router.parameters(), lr=0.02),
    ]
    x = torch.randn(64, 8)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x.sum(1).sin()], 1)
    losses = []
    for _ in range(60):
        loss = (layer(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


def test_hooks_on_a_table_see_its_rows() -> None:
    layer = ProductMoE(6, experts=(4, 4), top_k=2, key_features=4)
    wanted, seen = layer(torch.ones(3, 6)), []
    layer.experts.down_proj.register_forward_hook(lambda *call: seen.append(call[2].shape))
    torch.testing.assert_close(layer(torch.ones(3, 6)), wanted)
    assert seen == [(3, 2, 6)]


def test_balance_of_levels_by_a_loss() -> None:
    layer = ProductMoE(6, experts=(3, 4), top_k=2, heads=2, key_features=4)
    routes = layer.route(torch.randn(7, 6))
    loss = load_balance_loss(routes.scores, routes.choices, experts=[3, 4])
    shares = []
    for index, size in zip(routes.level_index, (3, 4), strict=True):
        # a place that both experts of a head share counts once
        used = torch.nn.functional.one_hot(index, size).amax(-2).sum((0, 1)).float()
        shares.append(used / used.sum())
    wanted = sum(
        size * (share * logits.softmax(-1).mean((0, 1))).sum()
        for size, share, logits in zip((3, 4), shares, routes.logits, strict=True)
    )
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert layer.router.query.grad.abs().sum() > 0


def test_tokens_do_not_see_each_other() -> None:
    config = _product()
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (4,)))
    torch.testing.assert_close(layer(x)[1:], layer(x[1:]))


def test_more_per_head_than_a_level_has() -> None:
    config = _product(top_k=12)
    routes = tensormoe_numpy.ProductMoE.restore(config, drawn(config)).route(tokens(config, (2,)))
    assert np.array_equal(np.sort(routes.top_k_index), np.tile(np.arange(12), (2, 2, 1)))


def test_one_level_is_a_choice_of_neurons() -> None:
    config = _product(experts=7)
    assert config.keys.experts == (7,)
    layer = tensormoe_numpy.ProductMoE.restore(config, drawn(config))
    assert layer(tokens(config)).shape[-1] == 5


def test_the_router_is_what_grows_with_the_number_of_experts() -> None:
    few, many = (
        _product(experts=(size, size), factorization=CP(3)).cost(8, training=True).flops
        for size in (10, 1000)
    )
    one, two = (_product(experts=(size, size)).cost(8, training=True).flops for size in (10, 1000))
    keys = 6 * 8 * 2 * 5 * 2 * 990
    assert keys < two - one < 1.5 * keys
    assert many - few < 4 * keys


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 13}, SpecError, "at most the 12 experts; got 13"),
        ({"experts": (3, 0)}, SpecError, "experts must be positive integers; got 0 for level 1"),
        ({"experts": ()}, SpecError, "at least one positive integer"),
        ({"experts": (2**16, 2**15)}, SpecError, "product of at most 2147483647"),
        ({"heads": 0}, SpecError, "heads"),
        ({"key_features": 0}, SpecError, "key_features"),
        ({"share_keys": 1}, SpecError, "share_keys"),
        ({"rank": 3}, RankError, "rank must be None for dense experts"),
        ({"factorization": ("dense", "cp")}, SpecError, "dense for both layers or for none"),
        ({"factorization": ("cp",)}, SpecError, "one per layer"),
        ({"act_layer": "sine"}, SpecError, "act_layer"),
        ({"router": Router(balance=0.1)}, GateError, "must have balance=0.0"),
        ({"router": Router(capacity=2.0)}, GateError, "must have capacity=None"),
        ({"router": Router(bias=True)}, GateError, "must have bias=False"),
    ],
)
def test_bad_input(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _product(**options)


def test_factorized_experts_have_no_sparse_gradients() -> None:
    with pytest.raises(SpecError, match="those of tables"):
        ProductMoE(6, experts=(3, 4), top_k=2, factorization="cp", rank=2, sparse=True)
    with pytest.raises(SpecError, match="sparse must be"):
        ProductMoE(6, experts=(3, 4), top_k=2, sparse=1)  # type: ignore[arg-type]


def test_a_record_of_other_levels() -> None:
    config, other = _product(), _product(experts=(4, 3))
    routes = tensormoe_numpy.ProductMoE.restore(other, drawn(other)).route(tokens(other))
    with pytest.raises(ShapeError, match="with logits of shape"):
        tensormoe_numpy.ProductMoE.restore(config, drawn(config))(tokens(config), routes)


def test_dense_as_a_value() -> None:
    assert _product(factorization=Dense()) == _product(factorization="dense") == _product()

"""Composed experts: against all N₁ · N₂ experts, one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

import tensormoe_numpy
from tensormoe.errors import GateError, ShapeError, SpecError
from tensormoe.mixtures import MonetConfig, monet_config
from tensormoe.routing import Router
from tests.mixtures._contract import MixtureContract
from tests.mixtures._forms import drawn, tokens, torch_layer


def _monet(**options: Any) -> MonetConfig:
    return monet_config(6, 5, 7, **{"experts": (3, 4), "top_k": 2, "heads": 2} | options)


class TestMonetMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "horizontal": _monet(bias=False, key_features=3, router=Router("sigmoid", noise=1.0)),
        "vertical": _monet(kind="vertical"),
    }
    other = _monet(experts=(4, 4), top_k=1)


FORMULAS: dict[str, MonetConfig] = {
    **TestMonetMoE.configs,
    "horizontal, weights of any sum": _monet(router=Router(renormalize=False)),
    "vertical, weights of any sum": _monet(
        kind="vertical", router=Router("sigmoid", renormalize=False)
    ),
    "vertical, all of the smaller kind": _monet(
        kind="vertical", bias=False, top_k=4, router=Router(renormalize=False)
    ),
}


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def _expert(config: MonetConfig, arrays: Any, i: int, j: int, x: np.ndarray) -> np.ndarray:
    """Outputs of one expert, an MLP of its own, of all tokens."""
    first, second = config.keys.experts

    def rows(name: str, count: int, place: int, axis: int) -> np.ndarray:
        """A half's part of a matrix, or of a bias (axis 0 of one row)."""
        return np.split(arrays[f"{name}"][0], count, axis)[place]

    def bias(name: str, count: int, place: int) -> Any:
        full = f"{name}.factors.bias"
        return np.split(arrays[full][0], count)[place] if full in arrays else 0.0

    def out_bias(name: str, place: int) -> Any:
        return arrays[name][place] if name in arrays else 0.0

    weight = "factors.weight"
    if config.kind == "horizontal":
        up = rows(f"bottom.up_proj.{weight}", first, i, 1)
        hidden = _gelu(x @ up + bias("bottom.up_proj", first, i))
        return hidden @ rows(f"top.down_proj.{weight}", second, j, 0) + out_bias("top.bias", j)
    # one hidden layer and one matrix of the whole expert
    up = np.hstack(
        [
            rows(f"left.up_proj.{weight}", first, i, 1),
            rows(f"right.up_proj.{weight}", second, j, 1),
        ]
    )
    down = np.block(
        [
            [
                rows(f"left.down_proj.{weight}", first, i, 0),
                rows(f"right.cross_proj.{weight}", second, j, 0),
            ],
            [
                rows(f"left.cross_proj.{weight}", first, i, 0),
                rows(f"right.down_proj.{weight}", second, j, 0),
            ],
        ]
    )
    hidden = x @ up
    if config.bias:
        halves = bias("left.up_proj", first, i), bias("right.up_proj", second, j)
        hidden = hidden + np.hstack(halves)
    made = _gelu(hidden) @ down
    if config.bias:
        made = made + np.hstack([out_bias("left.bias", i), out_bias("right.bias", j)])
    return made


def _weights(config: MonetConfig, arrays: Any, x: np.ndarray, level: int) -> np.ndarray:
    """Weights (tokens, heads, N_e) of a level."""
    size, heads = config.keys.experts[level], config.keys.heads
    if config.keys.key_features is None:
        logits = (x @ arrays[f"router.projection_{level}"]).reshape(len(x), heads, size)
    else:
        queries = (x @ arrays["router.query"]).reshape(len(x), heads, 2, -1)[:, :, level]
        queries = queries - queries.mean(-1, keepdims=True)
        queries = queries / np.sqrt(queries.var(-1, keepdims=True) + 1e-5)
        logits = queries @ arrays[f"router.keys_{level}"].T
    router = config.keys.router
    scores = 1 / (1 + np.exp(-logits)) if router.scores == "sigmoid" else softmax(logits, -1)
    kept = np.argsort(-logits, axis=-1)[..., : config.top_k]
    weights = np.zeros_like(scores)
    np.put_along_axis(weights, kept, np.take_along_axis(scores, kept, -1), -1)
    return weights / weights.sum(-1, keepdims=True) if router.renormalize else weights


@pytest.mark.parametrize("name", FORMULAS)
def test_a_weighted_sum_over_all_pairs(name: str) -> None:
    config = FORMULAS[name]
    arrays, x = drawn(config), tokens(config, (4,))
    first, second = (_weights(config, arrays, x, level) for level in (0, 1))
    wanted = 0.0
    for i in range(3):
        for j in range(4):
            share = (first[:, :, i] * second[:, :, j]).sum(1)
            wanted = wanted + share[:, None] * _expert(config, arrays, i, j, x)
    found = tensormoe_numpy.MonetMoE.restore(config, arrays)(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
def test_parameters_grow_with_the_root_of_the_experts(kind: str) -> None:
    few, many = (_monet(experts=size, kind=kind) for size in (8, 64))
    assert (few.num_experts, many.num_experts) == (64, 4096)
    assert many.num_parameters == 8 * few.num_parameters


def test_tokens_do_not_see_each_other() -> None:
    config = _monet(kind="vertical")
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (4,)))
    torch.testing.assert_close(layer(x)[1:], layer(x[1:]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": (3, 4, 5)}, SpecError, "experts must be two numbers"),
        ({"experts": 0}, SpecError, "experts must be positive"),
        ({"top_k": 5}, SpecError, "at most the halves of a kind"),
        ({"kind": "diagonal"}, SpecError, "kind must be"),
        ({"bias": 1}, SpecError, "bias must be"),
        ({"router": Router(balance=0.1)}, GateError, "must have balance=0.0"),
    ],
)
def test_bad_input(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _monet(**options)


def test_what_cannot_be_cut_in_two() -> None:
    with pytest.raises(SpecError, match="at least 2 to be cut into left and right"):
        monet_config(6, 1, 7, experts=3, top_k=1, kind="vertical")


def test_a_record_of_another_kind_of_mixture() -> None:
    config = _monet()
    layer = tensormoe_numpy.MonetMoE.restore(config, drawn(config))
    with pytest.raises(ShapeError, match="with two levels; got Routes"):
        layer(tokens(config), layer.route(tokens(config)).levels[0])

"""Experts of compressed models and of mixtures, cut along their hidden features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tensormoe.mixtures import gated
from tensormoe_torch import (
    DiverseMoE,
    MultiGateMoE,
    MuMoE,
    SoftMoE,
    SparseMoE,
)
from tensormoe_torch._activations import halves
from tensormoe_torch.compression import FactorizedExperts
from tests.torch._cut import assert_alike, assert_near, call, mesh, pair, scaled, sent, whole
from tests.torch._helpers import normal
from tests.torch._ranks import Ranks


def experts_like(roles: str, act: Any, biases: bool) -> FactorizedExperts:
    """Experts of a compressed model."""
    sizes = {"gate_proj": (6, 8), "up_proj": (6, 8), "gate_up_proj": (6, 16), "down_proj": (8, 6)}
    layers = {
        role: MuMoE(*sizes[role], 4, "cp", rank=3, bias=not biases, gate=None, dtype=torch.float64)
        for role in roles.split()
    }
    more = {role: torch.ones(4, sizes[role][1]).double() for role in layers} if biases else None
    made: FactorizedExperts = scaled(FactorizedExperts(layers, act, more))
    return made


def side_by_side(both: Tensor) -> Tensor:
    """Gates and what they gate by turns, as GPT-OSS has them."""
    return F.silu(both[..., ::2]) * (both[..., 1::2] + 1)


def one_behind_the_other(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


EXPERTS = {
    "gate and up": ("gate_proj up_proj down_proj", F.silu),
    "both": ("gate_up_proj down_proj", one_behind_the_other),
    "joined": ("gate_up_proj down_proj", gated(F.silu, halves)),
    "by turns": ("gate_up_proj down_proj", side_by_side),
    "up": ("up_proj down_proj", nn.GELU()),
    "one": ("down_proj", nn.Identity()),
}


def compare_experts(rank: int, name: str, biases: bool) -> None:
    roles, act = EXPERTS[name]
    size = 8 if roles == "down_proj" else 6
    made = experts_like(roles, act, biases)
    if roles == "down_proj":
        # a bond that divides nothing: along the outputs
        made, cut = pair(
            scaled(
                FactorizedExperts(
                    {"down_proj": MuMoE(8, 8, 4, "cp", rank=3, gate=None, dtype=torch.float64)}, act
                )
            )
        )
    else:
        made, cut = pair(made)
    index = torch.tensor([[0, 3], [2, 1], [3, 1], [0, 1]])

    def routed(each: Any, held: Any) -> Tensor:
        found: Tensor = each(held["x"], index, held["weights"])
        return found

    held = {"x": normal(4, size), "weights": normal(4, 2, seed=1)}
    assert_alike(made, cut, routed, held)
    with sent() as calls:
        routed(cut, held)
    assert len(calls) == 1
    cut._sorts = lambda *_: True
    assert_alike(made, cut, routed, held)
    assert_alike(made, cut, lambda each, held: each[2](held["x"]), {"x": normal(3, size)})
    assert_alike(made, cut, lambda each, held: each.every(held["x"]), {"x": normal(3, size)})
    found = {key: whole(each, made.state_dict()[key]) for key, each in cut.state_dict().items()}
    assert all(torch.equal(found[key], each) for key, each in made.state_dict().items())
    cut.load_state_dict(made.state_dict())
    assert_alike(made, cut, routed, held)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_compressed_models(ranks: Ranks, name: str, biases: bool) -> None:
    ranks(compare_experts, name, biases)


def mixtures() -> dict[str, Any]:
    """One of each kind whose experts are cut."""
    options: dict[str, Any] = {"dtype": torch.float64}
    return {
        "sparse": SparseMoE(6, 8, experts=4, top_k=2, **options),
        "sparse, CP": SparseMoE(6, 8, experts=4, top_k=2, factorization="cp", rank=3, **options),
        "sparse, shared": SparseMoE(
            6, 8, experts=4, top_k=2, shared_features=16, mix_shared=True, bias=True, **options
        ),
        "sparse, MLPs": SparseMoE(6, 8, experts=4, top_k=2, kind="mlp", bias=True, **options),
        "sparse, linear": SparseMoE(
            6, out_features=8, experts=4, top_k=2, kind="linear", **options
        ),
        "soft": SoftMoE(6, 8, experts=4, slots=2, **options),
        "soft, gated": SoftMoE(6, 8, experts=4, kind="swiglu", noise=1.0, **options),
        "diverse": DiverseMoE(6, (16, 8, 8), top_k=2, **options),
        "gates": MultiGateMoE(6, 8, experts=4, tasks=2, **options),
    }


def compare_mixture(rank: int, name: str, folder: Any) -> None:
    made, cut = pair(scaled(mixtures()[name]).eval())
    assert_alike(made, cut, call, {"x": normal(2, 5, 6)})
    assert all(isinstance(each, DTensor) for each in cut.parameters())
    cut.save(folder / "mixture")
    again = type(made).load(folder / "mixture").state_dict()
    assert all(torch.equal(again[key], each) for key, each in made.state_dict().items())
    cut.load_state_dict(again)
    torch.manual_seed(rank)
    output = cut.train()(normal(2, 5, 6))
    everywhere = DTensor.from_local(output, mesh(), [Shard(0)]).full_tensor()
    assert torch.equal(everywhere[:2], everywhere[-2:])
    if name == "soft":
        assert_near(cut.select(normal(2, 5, 6), 2), made.select(normal(2, 5, 6), 2))
    if name.startswith("sparse"):
        routes = made.route(normal(5, 6))
        assert_near(cut(normal(5, 6), routes), made(normal(5, 6), routes))


@pytest.mark.parametrize("name", mixtures())
def test_mixtures(ranks: Ranks, name: str, tmp_path: Any) -> None:
    ranks(compare_mixture, name, tmp_path)

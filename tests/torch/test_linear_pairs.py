"""Experts in factors as plain linear layers, which run without the library."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.errors import SpecError
from tensormoe_torch import MuMoE
from tensormoe_torch.compression import FactorizedExperts, to_linear_pairs
from tests.torch._helpers import randomize

SIZES = {"gate_proj": (20, 28), "up_proj": (20, 28), "down_proj": (28, 20)}


def experts_of(factorization: Any, *, bias: bool = False, **options: Any) -> FactorizedExperts:
    layers = {
        role: randomize(MuMoE(*size, 4, factorization, bias=bias, gate=None, dtype=torch.float64))
        for role, size in SIZES.items()
    }
    return FactorizedExperts(layers, nn.SiLU(), **options)


def run(pairs: Any, x: Tensor) -> Tensor:
    gate, up, down = (pairs[role] for role in ("gate_proj", "up_proj", "down_proj"))
    made: Tensor = down(nn.functional.silu(gate(x)) * up(x))
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("factorization", "inner"),
    [
        (LowRank(5), 5),
        (SharedBasis((2, 6)), 6),
        (Tucker((3, 7, 6)), 6),
        (Tucker((3, 6, 9)), 6),
        (CP(11), 11),
        (TensorTrain((3, 5)), 5),
        (TensorRing((2, 3, 4)), 8),
        (TensorRing((3, 2, 4)), 8),
    ],
    ids=str,
)
def test_every_expert_is_two_linear_layers(factorization: Any, inner: int, bias: bool) -> None:
    experts = experts_of(factorization, bias=bias)
    pairs = to_linear_pairs(experts)
    x = torch.randn(9, 20, dtype=torch.float64)
    assert len(pairs) == 4
    for number in range(4):
        found: Any = pairs[number]
        for role, (rows, columns) in SIZES.items():
            first: Any = found[role][0]
            second: Any = found[role][1]
            assert {type(first), type(second)} == {nn.Linear}
            assert (first.in_features, first.out_features) == (rows, inner)
            assert first.bias is None
            assert (second.in_features, second.out_features) == (inner, columns)
            assert (second.bias is None) != bias
        torch.testing.assert_close(run(found, x), experts[number](x))


def test_biases_beside_layers_and_merged_experts() -> None:
    torch.manual_seed(0)
    biases = {role: torch.randn(4, out, dtype=torch.float64) for role, (_, out) in SIZES.items()}
    experts = experts_of(LowRank(5), biases=biases, groups=torch.tensor([3, 0, 0, 1, 2]))
    pairs = to_linear_pairs(experts)
    x = torch.randn(9, 20, dtype=torch.float64)
    assert len(pairs) == 5
    assert pairs[1] is pairs[2]
    for number in range(5):
        torch.testing.assert_close(run(pairs[number], x), experts[number](x))


@pytest.mark.parametrize(
    "factorization", [BaseDelta(3), SharedDelta(3), Hadamard(), Dense(), LowRank(20)], ids=str
)
def test_experts_of_full_rank_are_refused(factorization: Any) -> None:
    with pytest.raises(SpecError, match=r"at 'gate_proj': experts must be products of two"):
        to_linear_pairs(experts_of(factorization))


def test_what_is_not_factorized_is_refused() -> None:
    with pytest.raises(TypeError, match="must be FactorizedExperts; got Linear"):
        to_linear_pairs(nn.Linear(3, 4))  # type: ignore[arg-type]
    experts = experts_of(LowRank(5))
    experts.projections["up_proj"] = nn.Identity()
    with pytest.raises(SpecError, match="at 'up_proj': layers must be the experts' own"):
        to_linear_pairs(experts)


def test_they_run_where_the_library_is_not(tmp_path: Path) -> None:
    experts = experts_of(LowRank(5))
    x = torch.randn(9, 20, dtype=torch.float64)
    wanted = experts[2](x).detach()
    torch.save(to_linear_pairs(experts), tmp_path / "pairs.pt")
    torch.save((x, wanted), tmp_path / "data.pt")
    code = (
        "import sys, torch, torch.nn.functional as F\n"
        "pairs = torch.load('pairs.pt', weights_only=False)\n"
        "x, wanted = torch.load('data.pt')\n"
        "assert not any(name.startswith('tensormoe') for name in sys.modules)\n"
        "one = pairs[2]\n"
        "found = one['down_proj'](F.silu(one['gate_proj'](x)) * one['up_proj'](x))\n"
        "torch.testing.assert_close(found, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={})


class _One(nn.Module):
    def __init__(self, pairs: Any) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        return run(self.pairs, x)


def test_one_expert_is_exported() -> None:
    experts = experts_of(Tucker((3, 7, 6)))
    one = _One(to_linear_pairs(experts)[1])
    x = torch.randn(9, 20, dtype=torch.float64)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(one, (x,), dynamic_shapes=({0: rows},))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    again = torch.export.load(stored).module()
    torch.testing.assert_close(again(x[:4]), experts[1](x[:4]))


def test_gradients_are_left_to_the_pairs() -> None:
    experts = experts_of(LowRank(5))
    pairs = to_linear_pairs(experts)
    assert all(each.requires_grad for each in pairs.parameters())
    held = {each.untyped_storage().data_ptr() for each in experts.parameters()}
    assert not any(each.untyped_storage().data_ptr() in held for each in pairs.parameters())

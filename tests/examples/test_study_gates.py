"""The study of gates, in its quick form."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import study_gates
from _gates_candidates import CANDIDATES, Candidate, Mixture, _Entmax, _LearnedEntmax

from tensormoe import CP, Gate
from tensormoe_torch import MuMoE


def test_every_candidate_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    study_gates.quick()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    names = [row.removeprefix("| ").partition(" | ")[0] for row in rows]
    assert names == ["linear", "mlp", *CANDIDATES]


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("paper: layer norm, eps 1e-5, spread 1", Gate.paper()),
        ("default: eps 1, spread √(8/N)", Gate()),
        ("no norm", Gate(normalization=None)),
        ("softmax", Gate("softmax")),
        ("sparsemax", Gate("sparsemax")),
        ("α 1.25", Gate(alpha=1.25)),
    ],
)
def test_candidates_are_the_library_s_gates(name: str, gate: Gate) -> None:
    torch.manual_seed(0)
    layer = MuMoE(12, 5, 40, CP(3), gate=gate)
    torch.nn.init.normal_(layer.gate.projection_0)
    mixture = Mixture(CANDIDATES[name], [(12, 5, CP(3))], (40,))
    with torch.no_grad():
        mixture.projections[0].copy_(layer.gate.projection_0)
    x = torch.randn(7, 12)
    torch.testing.assert_close(mixture.coefficients(x)[0], layer.coefficients(x)[0])


def test_the_derivative_by_alpha() -> None:
    z = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([1.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_LearnedEntmax.apply, (z, alpha))
    assert torch.autograd.gradcheck(lambda z: _Entmax.apply(z, 1.5), (z,))


def test_the_default_is_the_library_s() -> None:
    assert CANDIDATES[study_gates.DEFAULT] == Candidate()
    assert all(Candidate().spread_of(n) == Gate().spread_of(n) for n in (16, 64, 1024))
    assert Candidate().eps == Gate().eps

"""Blocks that imitate an MLP: what they learn, how they start, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.mxd import Distillation, MixtureOfDecoders, distill, imitate
from tests.torch.test_mxd import mlp, rows


def test_distillation_learns_an_mlp() -> None:
    taught, x, held = mlp().train(), rows(4000), rows(1000, seed=2)
    before = copy.deepcopy(taught.state_dict())
    state = torch.random.get_rng_state()
    block, report = distill(taught, 64, 8, x, held=held, steps=300, batch=256, rate=0.01)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert taught.training
    assert not block.training
    torch.testing.assert_close(taught.state_dict(), before)
    assert block.encoder.out_features == 32
    assert "silu" in repr(block)
    with torch.no_grad():
        out, target = block(held), taught(held)
        (a,) = block.coefficients(held)
    missing = (out - target).square().sum() / (target - target.mean(0)).square().sum()
    assert report.explained_variance == pytest.approx(1 - missing.item(), abs=1e-6)
    assert report.explained_variance > 0.8
    assert report.tokens == 1000
    assert report.active == (a > 0).sum().item() / 1000
    assert report.dead == tuple((~(a > 0).any(0)).nonzero()[:, 0].tolist())
    assert report.experts == 64
    assert report.parameters == block.num_parameters
    assert len(report.losses) == 300
    first = (taught(x) - 0.0).norm(dim=1).mean().item()  # ‖0 - t‖² / ‖t‖, as outputs start at zero
    assert report.losses[0] == pytest.approx(first, rel=0.1)
    assert report.losses[-1] < 0.2 * first
    text = str(report)
    assert "300 steps" in text
    assert "64 experts" in text
    again, same = distill(taught, 64, 8, x, held=held, steps=300, batch=256, rate=0.01)
    assert same == report
    torch.testing.assert_close(again.state_dict(), block.state_dict(), rtol=0, atol=0)
    assert distill(taught, 64, 8, x, steps=2, seed=1)[1].losses != report.losses[:2]


def test_sizes_are_those_of_a_transcoder_or_given() -> None:
    block, report = distill(mlp(), None, 2, rows(64), transcoder=64, steps=2, batch=8)
    assert report.experts == 64 - 32
    assert report.parameters == 9 * 64 + 65 * 8
    assert report.tokens == 64
    block, _ = distill(
        mlp(), 4, 2, rows(64), hidden_features=16, act_layer="relu", steps=2, batch=8
    )
    assert block.encoder.out_features == 16

    def function(x: Tensor) -> Tensor:
        return x[:, :3].tanh()

    block, _ = distill(function, 4, 2, rows(64), hidden_features=16, act_layer="tanh", steps=2)
    assert block(rows(5)).shape == (5, 3)
    given = nn.Sequential(nn.Linear(8, 12), nn.Mish(), nn.Linear(12, 8))
    block, _ = distill(given, 4, 2, rows(64), steps=2)
    assert isinstance(block.act, nn.Mish)
    assert block.act is not given[1]


@pytest.mark.parametrize("bias", [True, False])
def test_an_encoder_starts_as_the_first_layer(bias: bool) -> None:
    taught = mlp()
    if not bias:
        taught[0] = nn.Linear(8, 32, bias=False)
    block = MixtureOfDecoders(8, 32, act_layer="silu", experts=20, k=2)
    block.encode_like(taught)
    x = rows(9)
    torch.testing.assert_close(block.hidden(x), taught[:2](x))
    block.encoder.weight.data.zero_()
    assert taught[0].weight.any()


def test_such_a_start_takes_fewer_steps() -> None:
    options: Any = {"steps": 150, "batch": 256, "rate": 0.01}
    taught, x = mlp(), rows(2000)
    reports = [distill(taught, 64, 8, x, start=start, **options)[1] for start in ("fresh", "mlp")]
    assert 1 - reports[1].explained_variance < 0.5 * (1 - reports[0].explained_variance)
    # D starts at zero all the same
    assert reports[1].losses[0] == pytest.approx(reports[0].losses[0])


def test_an_encoder_needs_an_mlp_like_it() -> None:
    for block in (
        MixtureOfDecoders(8, 16, act_layer="silu", experts=4, k=2),
        MixtureOfDecoders(8, 32, act_layer="gelu", experts=4, k=2),
    ):
        with pytest.raises(SpecError, match=r"got \(8, 32\), 'silu' and none"):
            block.encode_like(mlp())
    block = MixtureOfDecoders(8, 32, act_layer="silu", experts=4, k=2)
    gated = (nn.Linear(8, 32), "silu", nn.Linear(8, 32), nn.Linear(32, 8))
    with pytest.raises(SpecError, match="and one"):
        block.encode_like(gated)  # type: ignore[arg-type]


def test_dropout_of_the_mlp_is_off() -> None:
    taught = nn.Sequential(*mlp(), nn.Dropout(0.9))
    _, report = distill(taught, 4, 2, rows(64), steps=3, batch=8)
    _, plain = distill(taught[:3], 4, 2, rows(64), steps=3, batch=8)
    assert report.losses == plain.losses
    assert taught.training


def test_an_iterable_has_a_batch_for_every_step() -> None:
    parts = rows(48).reshape(3, 2, 8, 8)
    seen: list[int] = []

    def taught(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x * 2.0

    options: Any = {"hidden_features": 8, "act_layer": "gelu"}
    _, report = distill(taught, 4, 2, iter(parts), steps=3, **options)
    assert len(report.losses) == 3
    assert set(seen) == {16}
    assert report.tokens == 16
    with pytest.raises(SpecError, match=r"got 3 for 4 steps. Give more, or steps=3"):
        distill(taught, 4, 2, list(parts), steps=4, **options)
    with pytest.raises(SpecError, match="a batch for every step; got none"):
        distill(taught, 4, 2, [], steps=4, **options)


class Transcoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.up(x).relu(),)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(*self.coefficients(x))
        return found


def test_any_module_can_imitate() -> None:
    torch.manual_seed(0)
    student = Transcoder(24).train()
    report = imitate(student, mlp(), rows(2000), steps=200, batch=128, rate=0.01)
    assert isinstance(report, Distillation)
    assert student.training
    assert report.experts == 24
    assert report.losses[-1] < 0.5 * report.losses[0]
    with pytest.raises(SpecError, match="a method coefficients; got"):
        imitate(nn.Linear(8, 8), mlp(), rows(10))
    with pytest.raises(SpecError, match=r"outputs like the MLP's, \(1024, 3\); got \(1024, 8\)"):
        imitate(student, nn.Linear(8, 3), rows(10))


def bad(**options: Any) -> None:
    given: dict[str, Any] = {"mlp": mlp(), "experts": 4, "k": 2, "inputs": rows(32), "steps": 2}
    distill(**(given | options))


def with_nan() -> Tensor:
    x = rows(32)
    x[5, 2] = float("nan")
    return x


def test_a_gate_has_a_rate_of_its_own() -> None:
    def moved(**options: Any) -> tuple[float, float]:
        torch.manual_seed(0)
        block = MixtureOfDecoders(8, experts=64, k=4)
        before = copy.deepcopy(block)
        imitate(block, mlp(), rows(64), steps=20, rate=0.01, batch=16, **options)
        gate = block.gate.projection_0 - before.gate.projection_0
        encoder = block.encoder.weight - before.encoder.weight
        return float(gate.detach().abs().max()), float(encoder.detach().abs().max())

    (own, rest), (slow, same) = moved(), moved(gate_rate=1e-5)
    assert 0 < slow < 20 * 1e-5 < own
    assert 0.3 * rest < same
    torch.testing.assert_close(moved(gate_rate=0.01), (own, rest))


def test_a_rate_for_a_gate_needs_one() -> None:
    student = nn.Sequential(nn.Linear(8, 8))
    student.coefficients = lambda x: (x,)  # type: ignore[assignment]
    with pytest.raises(SpecError, match=r"gate_rate must be left out.*0.001 for Sequential"):
        imitate(student, mlp(), rows(32), steps=2, gate_rate=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be"),
        ({"batch": 1.5}, "batch must be"),
        ({"seed": -1}, "seed must be"),
        ({"rate": 0}, "rate must be a positive number; got 0"),
        ({"gate_rate": -0.1}, "gate_rate must be a positive number; got -0.1"),
        ({"decay": -1}, "weight_decay must be"),
        ({"k": 5}, "at most the experts"),
        ({"start": "paper"}, "start must be"),
        ({"start": "mlp", "hidden_features": 16}, "first layer of sizes"),
        (
            {"start": "mlp", "mlp": torch.tanh, "hidden_features": 16, "act_layer": "tanh"},
            "mlp must be a module with two linear layers",
        ),
        ({"experts": None}, "one of the two; got None and None"),
        ({"transcoder": 64}, "one of the two; got 4 and 64"),
        ({"experts": None, "transcoder": 32}, "wider than the block's 32 hidden units.*256"),
        ({"experts": 0}, "experts must be"),
        ({"mlp": 3}, "must be given for what is not recognized as an MLP"),
        ({"mlp": lambda x: x}, "hidden_features and act_layer must be given"),
        ({"mlp": lambda x: x, "hidden_features": 4}, "hidden_features and act_layer must be given"),
        ({"mlp": 3, "hidden_features": 4, "act_layer": "relu"}, "mlp must be a module or a functi"),
        ({"inputs": 3}, "inputs must be a tensor or an iterable"),
        ({"inputs": rows(32).long()}, "floating-point tensors"),
        ({"inputs": rows(0)}, r"none of them empty; got torch.float32 \(0, 8\)"),
        ({"inputs": [rows(4), 3]}, "inputs of step 1 must be floating-point"),
        ({"inputs": [rows(4), rows(4, 7)]}, "one width; got 7 after 8"),
        ({"inputs": with_nan()}, "inputs must be finite; got NaN or infinity in row 5"),
        ({"inputs": rows(32, 7)}, r"mlp must take inputs \(1024, 7\)"),
        ({"inputs": rows(32).double()}, "mlp must take inputs"),
        ({"held": rows(0)}, "held must be"),
        ({"held": rows(4, 7)}, "one width; got 7 after 8"),
        ({"rate": 1e30, "steps": 20}, "must not diverge.*Lower rate, which is 1e.30"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        bad(**options)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda x: x[0], "must make a tensor"),
        (lambda x: (x,), "must make a tensor"),
        (lambda x: x * float("inf"), "must make finite outputs"),
    ],
)
def test_bad_teachers(made: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        bad(mlp=made, hidden_features=4, act_layer="relu")

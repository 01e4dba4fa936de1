"""Responses of a loss that were measured, against models whose weights were really changed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tensormoe.compression import predicted_loss
from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch import compress
from tensormoe_torch.compression import calibrate, next_token_loss
from tensormoe_torch.compression._respond import KEPT, measured_places
from tests._torch_moe import Expert, OneByOne, sparse

NAMES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
TOKENS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(7))
ROLES = ("gate_proj", "up_proj", "down_proj")
OPTIONS: Any = {"loss": next_token_loss, "ridge": 0.1, "dtype": "float64"}


def views(experts: Any) -> dict[str, Tensor]:
    """Weights (experts, in, out) by role."""
    gate, up = experts.gate_up_proj.detach().transpose(1, 2).chunk(2, 2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.detach().mT}


@torch.no_grad()
def total(model: Any) -> float:
    return float(next_token_loss(model(TOKENS), TOKENS)) / TOKENS.numel()


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("per_expert", [True, False])
def test_increases_are_those_of_projected_weights(name: str, per_expert: bool) -> None:
    model = sparse(name)
    # errors of random weights would be noise
    for each in NAMES:
        for weights in model.get_submodule(each).parameters():
            weights.data *= 8.0
    before = {key: each.clone() for key, each in model.state_dict().items()}
    plain = calibrate(model, TOKENS, per_expert=per_expert, **OPTIONS)
    done: list[int] = []
    found = calibrate(
        model, TOKENS, measure=True, per_expert=per_expert, callback=done.append, **OPTIONS
    )
    # a run of the calibration, one without errors, and six for each layer
    assert done == [*range(1, 2 + 1 + 6 * len(NAMES))]
    assert found.measured
    assert not plain.measured
    for key, array in plain.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], array)
    for layer in NAMES:
        assert {key for key in found.arrays if key.endswith("response") and layer in key} == {
            f"{layer}.{role}.response" for role in ROLES
        }
        for place, share in enumerate(KEPT):
            measured, predicted = {}, {}
            for sides in (("inputs",), ("hidden",), ("inputs", "hidden")):
                mine = copy.deepcopy(model)
                for role, weights in views(mine.get_submodule(layer)).items():
                    side = "hidden" if role == "down_proj" else "inputs"
                    if side not in sides:
                        continue
                    moments = found.arrays[f"{layer}.{side}"]
                    kept = np.linalg.eigh(moments)[1][:, -round(share * len(moments)) :]
                    left = torch.tensor(kept @ kept.T) @ weights
                    both = zip(weights, left, strict=True)
                    pairs = [(a.numpy(), (a - b).numpy()) for a, b in both]
                    predicted[role] = predicted_loss(plain, layer, role, pairs) or 0.0
                    weights.copy_(left)
                measured[sides] = total(mine) - total(model)
            alone = measured["inputs",] + measured["hidden",]
            together = measured["inputs", "hidden"] / alone if alone > 0 else 1.0
            together = min(max(together, 0.5), 2.0)
            halves = predicted["gate_proj"] + predicted["up_proj"]
            for role in ROLES:
                own = measured["hidden",] if role == "down_proj" else measured["inputs",]
                part = 1.0 if role == "down_proj" else predicted[role] / halves
                wanted = (predicted[role], part * together * own)
                got = found.arrays[f"{layer}.{role}.response"][place]
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-8)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, each in model.state_dict().items():
        torch.testing.assert_close(each, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_model_is_as_it_was_whatever_happens(error: type[BaseException]) -> None:
    model = sparse("mixtral")
    before = {key: each.clone() for key, each in model.state_dict().items()}
    model.train()
    calls = 0

    def breaking(output: Any, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            # in the middle of a run with errors
            raise error
        return next_token_loss(output, batch)

    with pytest.raises(error):
        calibrate(model, TOKENS, measure=True, **{**OPTIONS, "loss": breaking})
    assert calls == 5
    assert model.training
    assert all(each.requires_grad for each in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, each in model.state_dict().items():
        torch.testing.assert_close(each, before[key], rtol=0, atol=0)


def test_what_cannot_be_measured_is_refused() -> None:
    model = sparse("mixtral")
    with pytest.raises(SpecError, match="measure needs a loss"):
        calibrate(model, TOKENS, measure=True, ridge=0.1)
    with pytest.raises(SpecError, match="measure must be"):
        calibrate(model, TOKENS, measure=1, **OPTIONS)  # type: ignore[arg-type]
    lists = OneByOne([Expert() for _ in range(3)]).double()
    x = torch.randn(60, 6, dtype=torch.float64)
    with pytest.raises(SpecError, match="'experts' are called one by one"):
        calibrate(lists, x, measure=True, loss=lambda output, _: output.sum(), ridge=0.1)
    calls = 0

    def diverging(output: Any, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return next_token_loss(output, batch) * (float("nan") if calls == 3 else 1.0)

    with pytest.raises(ShapeError, match="losses must be finite; got nan"):
        calibrate(model, TOKENS, measure=True, **{**OPTIONS, "loss": diverging})


def test_batches_are_drawn_evenly() -> None:
    assert [*measured_places(3, 100)] == [0, 1, 2]
    assert [*measured_places(1, 10**9)] == [0]
    found = measured_places(128, 128 * 2048)
    assert len(found) * 2048 == 2**14
    assert found[0] == 127 - found[-1] + 1
    model, batches = sparse("mixtral"), [each[None] for each in TOKENS]
    seen: list[Tensor] = []

    def watching(output: Any, batch: Tensor) -> Tensor:
        seen.append(batch)
        return next_token_loss(output, batch)

    # iterators run out
    calibrate(model, iter(batches), measure=True, **{**OPTIONS, "loss": watching})
    assert len(seen) == 4 * (1 + 1 + 6 * 2)


def test_experts_that_lose_more_get_more() -> None:
    model = sparse("mixtral", torch.float32)
    found = calibrate(model, TOKENS, measure=True, per_expert=True, loss=next_token_loss, ridge=0.1)
    reports = []
    for layer in NAMES:
        steep = {
            f"{layer}.{role}.response": found.arrays[f"{layer}.{role}.response"] * [1.0, 1e3]
            for role in ROLES
        }
        known = replace(found, arrays={**found.arrays, **steep})
        mine = copy.deepcopy(model)
        reports.append(
            compress(mine, "low_rank", budget=0.6, share="sensitivity", calibration=known)
        )
    sizes = [
        [sum(p.report.parameters for p in module.projections) for module in report.modules]
        for report in reports
    ]
    assert sizes[0][0] > sizes[0][1]
    assert sizes[1][0] < sizes[1][1]

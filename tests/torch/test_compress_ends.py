"""Compression in place that is watched, limited or interrupted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tensormoe.decomposition import Progress, Search
from tensormoe_torch import compress
from tests._torch_moe import Expert

QUICK = Search(sweeps=8, polish=1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": nn.ModuleList(Expert(hidden=10) for _ in range(5))})


def test_every_sweep_is_told_with_its_projection(model: nn.Module) -> None:
    seen: list[Progress] = []
    report = compress(model, "cp", rank=4, search=QUICK, callback=seen.append)
    names = [f"experts.{role}" for role in ("gate_proj", "up_proj", "down_proj")]
    assert list(dict.fromkeys(each.name for each in seen)) == names
    for name, projection in zip(names, report.modules[0].projections, strict=True):
        last = [each for each in seen if each.name == name][-1]
        assert last.factorization == projection.factorization
        assert last.error == pytest.approx(projection.report.error, rel=5e-3)
        assert projection.report.ended in ("converged", "sweeps")


def test_true_ends_one_projection(model: nn.Module) -> None:
    seen: list[Progress] = []

    def third(now: Progress) -> bool:
        seen.append(now)
        return now.name.endswith("up_proj") and now.sweep == 3

    report = compress(model, "cp", rank=4, search=QUICK, callback=third)
    ended = [each.report.ended for each in report.modules[0].projections]
    assert ended[1] == "stopped"
    assert "stopped" not in (ended[0], ended[2])
    assert sum(each.name.endswith("up_proj") for each in seen) == 3


@pytest.mark.parametrize("how", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_model_is_as_it_was(model: nn.Module, how: Any) -> None:
    before = copy.deepcopy(model.state_dict())

    def raising(now: Progress) -> None:
        if now.name.endswith("down_proj") and now.sweep == 2:
            raise how

    with pytest.raises(how):
        compress(model, "cp", rank=4, search=QUICK, callback=raising)
    assert isinstance(model["experts"], nn.ModuleList)  # type: ignore[index]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert compress(model, "cp", rank=4, search=QUICK).names == ("experts",)

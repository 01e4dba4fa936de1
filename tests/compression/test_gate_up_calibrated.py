"""Gate and up projection of models on disk, by what a calibration says that each way loses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from transformers import AutoModelForCausalLM

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.compression import (
    Calibration,
    Compression,
    compress_checkpoint,
    plan_compression,
    predicted_loss,
)
from tensormoe.compression._settle import losses
from tensormoe.compression._values import read_stack
from tensormoe.errors import CheckpointError
from tensormoe_numpy import MuMoE
from tensormoe_torch.compression._calibrate_checkpoint import calibrate_checkpoint
from tensormoe_torch.compression._text import TextWindows
from tests._calibrated import calibrated_folder, save_model, save_text
from tests._compress_models import content, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated_folder(tmp_path_factory.mktemp("calibrated"))


def wanted(folder: Path, gate_up: str, kind: str = "fisher", **changes: Any) -> Compression:
    return Compression(
        **{
            "factorization": "low_rank",
            "budget": 0.4,
            "compare": False,
            "calibration": str(folder / f"{kind}.safetensors"),
            "gate_up": gate_up,
            **changes,
        }
    )


@pytest.mark.parametrize("weighting", ["inputs", "both", "fisher"])
def test_the_loss_by_both_is_that_of_each(folder: Path, weighting: str, tmp_path: Path) -> None:
    settings = wanted(folder, "joined", weighting=weighting, experts=(), preset="mixtral")
    result = compress_checkpoint(folder / "model", tmp_path / "out", settings)
    calibration = Calibration.load(folder / "fisher.safetensors")
    plan = plan_compression(folder / "model", settings)
    checked = 0
    for report, each in zip(result.groups, plan.groups, strict=True):
        if each.group.pair is None:
            continue
        layer = calibration.layers[int(report.name.split(".")[2])]
        stack = read_stack(plan.model, each.group).astype("float64")
        made = MuMoE.load(tmp_path / "out" / str(report.file))
        lacking = stack - np.stack([made.expert(n)[0] for n in range(len(stack))])
        half = stack.shape[2] // 2
        parts = 0.0
        for role, place in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None))):
            pairs = [(a[:, place], b[:, place]) for a, b in zip(stack, lacking, strict=True)]
            parts += predicted_loss(calibration, layer, role, pairs) or 0.0
        assert report.predicted_loss == pytest.approx(parts, rel=1e-5)
        whole = calibration.output_error(layer, "gate_up_proj", zip(stack, lacking, strict=True))
        assert report.output_error == pytest.approx(whole, rel=1e-5)
        checked += 1
    assert checked == 2


@pytest.mark.parametrize("kind", ["plain", "fisher"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": "sensitivity"},
        {"bits": "auto"},
        {"bits": "auto", "share": "sensitivity"},
        {"factorization": ("low_rank", "shared_basis")},
    ],
)
def test_each_layer_gets_the_way_that_loses_less(
    folder: Path, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    found = {
        way: compress_checkpoint(
            folder / "model", tmp_path / way, wanted(folder, way, kind, **changes)
        )
        for way in ("joined", "apart", "auto")
    }
    result = found["auto"]
    assert result.nbytes <= 0.4 * result.dense_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "auto").eval()
    assert logits(model).isfinite().all()
    for layer, module in enumerate(model.model.layers):
        names = [each.name for each in result.groups if f".layers.{layer}." in each.name]
        assert len(module.mlp.experts.projections) == len(names)
        if kind == "plain" or "bits" in changes or "share" in changes:
            continue
        lost = {
            way: losses(
                each
                for each in found[way].groups
                if f".layers.{layer}." in each.name and ".w2" not in each.name
            )
            for way in found
        }
        assert lost["auto"] == min(lost["joined"], lost["apart"])
    # resumed from what is there, and again
    again = compress_checkpoint(
        folder / "model", tmp_path / "auto", wanted(folder, "auto", kind, **changes)
    )
    assert [each.name for each in again.groups] == [each.name for each in result.groups]


def test_both_ways_have_as_many_bytes(folder: Path) -> None:
    for changes in ({}, {"bits": 8}, {"budget": 5000}):
        plan = plan_compression(folder / "model", wanted(folder, "auto", **changes))
        sizes = {each.group.name: each for each in plan.groups}
        for each in plan.others:
            parts = [sizes[name] for name in each.instead]
            assert each.budget is not None
            apart = sum(part.budget or 0 for part in parts)
            assert abs(each.budget - apart) <= 64


def test_a_cluster_tries_both(folder: Path, tmp_path: Path) -> None:
    settings = wanted(folder, "auto")
    compress_checkpoint(folder / "model", tmp_path / "alone", settings)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as one:
        compress_checkpoint(folder / "model", tmp_path / "cluster", settings, client=one)
    assert content(tmp_path / "cluster") == content(tmp_path / "alone")


def test_a_calibration_of_both_as_one_has_no_halves(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "gpt_oss")
    save_text(tmp_path / "text.txt")
    found = calibrate_checkpoint(
        tmp_path / "model", tmp_path / "text.txt", windows=TextWindows(12, 16), dtype="float64"
    )
    found.save(tmp_path / "c.safetensors")
    settings = Compression(
        "low_rank", budget=0.4, calibration=str(tmp_path / "c.safetensors"), gate_up="joined"
    )
    assert len(plan_compression(tmp_path / "model", settings).groups) == 4
    with pytest.raises(CheckpointError, match="must have the projection 'gate_proj'"):
        plan_compression(tmp_path / "model", replace(settings, gate_up="apart", dense=True))

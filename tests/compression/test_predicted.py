"""Predicted increases of a loss, against sums over rows and against losses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tensormoe.cli import main
from tensormoe.compression import Calibration, Compression, compress_checkpoint, predicted_loss
from tensormoe.decomposition import Search
from tensormoe.errors import CheckpointError
from tensormoe_torch import compress
from tensormoe_torch.compression import calibrate
from tensormoe_torch.compression import next_token_loss as next_token
from tensormoe_torch.compression._calibrate_checkpoint import calibrate_checkpoint
from tensormoe_torch.compression._text import TextWindows
from tests._calibrated import save_model, save_text
from tests._torch_moe import Expert, OneByOne, sparse

NAME = "model.layers.1.mlp.experts"
TOKENS = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(7))
QUICK = Search(starts=1, sweeps=5, polish=1)


class Routed(nn.Module):
    """Experts of which the last gets every token, and three others each a third of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = sparse("mixtral").get_submodule(NAME)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.stack([torch.arange(len(x)) % 3, torch.full((len(x),), 3)], dim=1)
        found: Tensor = self.experts(x, index, torch.full(index.shape, 0.5, dtype=x.dtype))
        return found


def pairs_of(before: Tensor, missing: Tensor) -> list[tuple[Any, Any]]:
    """Of stacks (experts, out, in), as the core takes them."""
    return [(a.T.numpy(), b.T.numpy()) for a, b in zip(before, missing, strict=True)]


def test_half_of_the_expected_square_of_what_a_loss_changes_by() -> None:
    """Gradients that are the same for all rows leave nothing to take for independent."""
    torch.manual_seed(0)
    model = Routed()
    x = torch.randn(60, 16, dtype=torch.float64) * torch.logspace(0, -1, 16)
    direction = torch.randn(16, dtype=torch.float64)

    def linear(output: Tensor, _: Any) -> Tensor:
        return (output @ direction).sum()

    found = calibrate(model, x, loss=linear, per_expert=True, dtype="float64")
    stacks: Any = model.experts
    down = stacks.down_proj.detach()
    missing = 0.1 * torch.randn_like(down)
    wanted = 0.0
    with torch.no_grad():
        for token, row in enumerate(x):
            for n in (token % 3, 3):
                gate, up = (stacks.gate_up_proj[n] @ row).chunk(2)
                changed = 0.5 * direction @ (missing[n] @ (F.silu(gate) * up))
                wanted += 0.5 * float(changed) ** 2 / len(x)
    got = predicted_loss(found, "experts", "down_proj", pairs_of(down, missing))
    assert got == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("per_expert", [True, False])
def test_it_is_a_sum_over_experts_of_their_rows_moments(per_expert: bool) -> None:
    model = sparse("mixtral")
    found = calibrate(
        model, TOKENS, loss=next_token, per_expert=per_expert, dtype="float64", ridge=0.1
    )
    torch.manual_seed(1)
    stack: Any = model.get_submodule(NAME)
    gate_up = stack.gate_up_proj.detach()
    missing = torch.randn_like(gate_up)
    halves = zip(("gate_proj", "up_proj"), gate_up.chunk(2, 1), missing.chunk(2, 1), strict=True)
    total = 0.0
    for role, before, gone in halves:
        wanted = 0.0
        metric = found.arrays[f"{NAME}.{role}.gradients"]
        for n, count in enumerate(found.arrays[f"{NAME}.counts"]):
            key = f"{NAME}.inputs"
            moments = found.arrays[f"{key}.experts"][n] if per_expert else found.arrays[key]
            delta = gone[n].numpy()
            share = count / TOKENS.numel()
            wanted += 0.5 * share * np.einsum("oi,ij,pj,po->", delta, moments, delta, metric)
        got = predicted_loss(found, NAME, role, pairs_of(before, gone))
        assert got == pytest.approx(wanted, rel=1e-9)
        total += wanted
    # both halves as one are taken to be independent
    both = predicted_loss(found, NAME, "gate_up_proj", pairs_of(gate_up, missing))
    assert both == pytest.approx(total, rel=1e-9)


def test_nothing_is_predicted_without_gradients_or_a_number_of_tokens() -> None:
    model = sparse("mixtral")
    found = calibrate(model, TOKENS, dtype="float64", ridge=0.1)
    stack: Any = model.get_submodule(NAME)
    down = stack.down_proj.detach()
    assert predicted_loss(found, NAME, "down_proj", pairs_of(down, down)) is None
    with pytest.raises(CheckpointError, match="must have the projection"):
        predicted_loss(found, NAME, "other_proj", pairs_of(down, down))
    mine = copy.deepcopy(model)
    report = compress(mine, "cp", rank=3, search=QUICK, calibration=found)
    assert report.predicted_loss is None
    assert "loss" not in str(report)
    torch.manual_seed(0)
    lists = OneByOne([Expert() for _ in range(3)]).double()
    x = torch.randn(60, 6, dtype=torch.float64)
    given = calibrate(lists, x, loss=lambda output, _: output.sum(), ridge=0.1)
    assert "experts.down_proj.gradients" in given.arrays
    assert compress(lists, "cp", rank=3, search=QUICK, calibration=given).predicted_loss is None


@pytest.mark.parametrize("measure", [False, True])
def test_files_and_models_in_memory_report_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measure: bool
) -> None:
    folder, text, path = save_model(tmp_path / "m"), tmp_path / "t.txt", tmp_path / "c.safetensors"
    save_text(text)
    cut = TextWindows(6, 16)
    options: Any = {"windows": cut, "per_expert": True, "dtype": "float64", "fisher": True}
    calibrate_checkpoint(folder, text, measure=measure, **options).save(path)
    wanted = Compression("cp", rank=6, preset="mixtral", compare=False, calibration=str(path))
    result = compress_checkpoint(folder, tmp_path / "out", wanted)
    model = AutoModelForCausalLM.from_pretrained(folder)
    report = compress(model, "cp", rank=6, calibration=Calibration.load(path))
    listed = [p for module in report.modules for p in module.projections]
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for each in result.groups:
        parts = each.name.split(".")
        layer, role = int(parts[2]), names[parts[-2]]
        (same,) = (p for p in report.modules[layer].projections if p.role == role)
        assert each.predicted_loss == pytest.approx(same.predicted_loss, rel=1e-3)
    assert result.predicted_loss == sum(each.predicted_loss or 0.0 for each in result.groups)
    assert report.predicted_loss == sum(each.predicted_loss or 0.0 for each in listed)
    assert report.to_dict()["predicted_loss"] == report.predicted_loss
    assert report.to_dict()["modules"][0]["projections"][0]["predicted_loss"] is not None
    shown = str(report).splitlines()
    assert shown[0].endswith("loss")
    assert any(line.endswith(f"{report.predicted_loss:+.4f}") for line in shown)
    words = ["compress", str(folder), "--preset", "mixtral", "--rank", "6", "--factorization", "cp"]
    words += ["--calibration", str(path), "--no-svd", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"loss: {result.predicted_loss:+.4f} nats per token" in said
    assert ("predicts it by measured responses;" in said) is measure
    assert ("predicts it for small errors;" in said) is not measure
    assert main([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["predicted_loss"] == result.predicted_loss
    assert [e["predicted_loss"] for e in plain["groups"]] == [
        e.predicted_loss for e in result.groups
    ]

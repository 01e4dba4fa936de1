"""Verdicts: plain rounding and truncated SVDs next to factors, told whenever they lose less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tensormoe.cli import main
from tensormoe.compression import Compression, GroupReport, compress_checkpoint
from tensormoe.compression._verdict import Rounding, roundings, verdicts

PATTERN = ("layers.*.experts.*.w1",)


def save(path: Path, stack: Any) -> Path:
    tensors = {f"layers.0.experts.{n}.w1": np.ascontiguousarray(w) for n, w in enumerate(stack)}
    save_file(tensors, path)
    return path


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return save(tmp_path / "m.safetensors", rng.standard_normal((4, 64, 64)).astype("float16"))


@pytest.mark.parametrize("bits", [8, 4])
def test_roundings_are_those_that_dense_bits_would_store(
    noise: Path, tmp_path: Path, bits: int
) -> None:
    wanted = Compression("low_rank", budget=0.3, experts=PATTERN)
    (report,) = compress_checkpoint(noise, tmp_path / "out", wanted).groups
    stored = Compression("dense", bits=bits, experts=PATTERN)
    (plain,) = compress_checkpoint(noise, tmp_path / "plain", stored).groups
    (found,) = (each for each in report.rounding if each.bits == bits)
    assert found.nbytes == plain.nbytes
    assert found.error == pytest.approx(plain.error, rel=1e-3)
    assert GroupReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_rounding_that_loses_less_is_told(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(noise), "--experts", PATTERN[0], "--factorization", "low-rank"]
    assert main([*words, "--budget", "30%", "--output", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rounding the experts themselves to 4 bits takes 26.6% of their bytes" in shown
    assert "loses less in 1 of 1 groups: --factorization dense --bits 4" in shown
    assert main([*words, "--budget", "30%", "--output", str(tmp_path / "out"), "--json"]) == 0
    assert any("4 bits" in each for each in json.loads(capsys.readouterr().out)["verdicts"])
    assert main([*words, "--budget", "10%", "--output", str(tmp_path / "few")]) == 0
    # at a tenth of the bytes there is no such rounding
    assert "rounding the experts themselves" not in capsys.readouterr().out
    none = [*words, "--budget", "30%", "--no-svd", "--output", str(tmp_path / "none")]
    assert main(none) == 0
    shown = capsys.readouterr().out
    assert "rounding the experts" not in shown
    assert "neither" not in shown


def test_factors_that_nothing_beats_are_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((4, 64, 2)), rng.standard_normal((4, 2, 64))
    model = save(tmp_path / "m.safetensors", (left @ right).astype("float32"))
    wanted = Compression("low_rank", budget=0.3, experts=PATTERN)
    (report,) = compress_checkpoint(model, tmp_path / "out", wanted).groups
    assert report.error < min(each.error for each in report.rounding)
    # in singular values of float64 an SVD is exact, and factors of float32 are not
    (line,) = verdicts([replace(report, controls=())])
    assert line.startswith("neither truncated SVDs")


def test_losses_decide_where_they_are_predicted(noise: Path, tmp_path: Path) -> None:
    wanted = Compression("low_rank", budget=0.3, experts=PATTERN)
    (report,) = compress_checkpoint(noise, tmp_path / "out", wanted).groups
    four = next(each for each in report.rounding if each.bits == 4)
    worse = tuple(replace(each, predicted_loss=0.5) for each in report.rounding)
    mine = replace(report, predicted_loss=0.25, rounding=worse, controls=())
    assert [*verdicts([mine])] == [
        "neither truncated SVDs of as many parameters nor rounding to as many bytes is closer"
    ]
    assert four.error < report.error
    better = tuple(replace(each, predicted_loss=0.125) for each in report.rounding)
    (line,) = verdicts([replace(mine, rounding=better)])
    assert "+0.1250 nats per token predicted instead of +0.2500" in line


def test_one_expert_at_a_time_is_rounded() -> None:
    stack = np.random.default_rng(2).standard_normal((3, 16, 8)).astype("float32")
    eight, four = roundings(stack, "bfloat16", 2, None)
    assert isinstance(eight, Rounding)
    assert (eight.bits, four.bits) == (8, 4)
    assert eight.error < 0.01 < four.error < 0.12
    assert four.nbytes < eight.nbytes < stack.size * 2

"""``tensormoe calibrate-model`` as people and programs use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tensormoe.cli import main
from tensormoe.cli._calibrate_model import _responses
from tensormoe.compression import Calibration
from tensormoe_torch.compression import TextWindows, calibrate, calibrate_checkpoint
from tests._calibrated import save_model, save_text, save_tokenizer
from tests._compress_models import save

SMALL = ("--samples", "5", "--context", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    save_model(folder / "model")
    save_text(folder / "text.txt")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    status = main(["calibrate-model", *map(str, words)])
    captured = capsys.readouterr()
    if status:
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err
    assert captured.err == ""
    return captured.out


def test_a_text_becomes_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "c.safetensors"
    words = (folder / "model", "--data", folder / "text.txt", "--output", output, *SMALL)
    found = json.loads(run(capsys, *words, "--fisher", "--per-expert", "--json"))
    calibration = Calibration.load(output)
    assert found["bytes"] == calibration.nbytes
    assert [each["tokens"] for each in found["layers"]] == [80, 80]
    assert sum(found["layers"][0]["frequencies"]) == pytest.approx(1)
    # five windows of the text, drawn, in their order: w12 is token 12
    text = torch.tensor([int(each[1:]) for each in (folder / "text.txt").read_text().split()])
    windows = text[: len(text) // 16 * 16].reshape(-1, 16)
    drawn = torch.randperm(25, generator=torch.Generator().manual_seed(0))[:5].sort().values
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    wanted = calibrate(model, [each[None] for each in windows[drawn]], per_expert=True)
    for key, array in wanted.arrays.items():
        np.testing.assert_allclose(calibration.arrays[key], array, rtol=1e-5, atol=1e-6)
    assert set(calibration.model) == {"checkpoint", "config", "tokenizer", "module"}
    assert f"{calibration.layers[0]}.gate_proj.gradients" in calibration.arrays
    # in two runs, one for each layer: half of the memory, and the same file
    needed = 8 * (5 * (16**2 + 16 + 24**2 + 24 + 2 * 24**2 + 16**2) + 2 * 24**2 + 16**2 + 3 * 4)
    before = output.read_bytes()
    capsys.readouterr()
    run(capsys, *words, "--fisher", "--per-expert", "--json", "--max-memory", f"{needed}")
    assert output.read_bytes() == before
    capsys.readouterr()
    shown = run(capsys, *words, "--no-outputs")
    # 16² + 24² and their means, and three counts of four experts, in each of two layers
    assert f"sums of moments take {8 * 2 * (16 * 17 + 24 * 25 + 12) / 1024:.3g} KiB" in shown
    assert "layers.1.mlp.experts" in shown
    assert "--calibration" in shown
    again = Calibration.load(output)
    assert not any(key.endswith("outputs") for key in again.arrays)


def test_the_response_of_the_loss_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "c.safetensors"
    words = (folder / "model", "--data", folder / "text.txt", "--output", output, *SMALL)
    assert "measure needs fisher" in run(capsys, *words, "--measure")
    assert not output.exists()
    found = json.loads(run(capsys, *words, "--fisher", "--measure", "--json"))
    assert found["measured"] is True
    calibration = Calibration.load(output)
    assert calibration.measured
    for layer in calibration.layers:
        points = calibration.arrays[f"{layer}.down_proj.response"]
        assert points.shape == (2, 2)
        assert 0.0 < points[0, 0] < points[1, 0]
    shown = run(capsys, *words, "--fisher", "--measure")
    # a model of random values gains as often as it loses
    pairs = np.concatenate([a for k, a in calibration.arrays.items() if k.endswith("response")])
    less = int((pairs[:, 1] < pairs[:, 0]).sum())
    assert less
    assert f"responses of the loss: {less} of {len(pairs)} measured increases are below" in shown
    clear = {k: a * 1.0 for k, a in calibration.arrays.items()}
    for key in [key for key in clear if key.endswith("response")]:
        clear[key][:, 1] = 2.0 * clear[key][:, 0]
    assert "hold for large errors too" in _responses(replace(calibration, arrays=clear))
    assert "responses of the loss" not in run(capsys, *words, "--fisher")
    assert json.loads(run(capsys, *words, "--fisher", "--json"))["measured"] is False
    told: list[Any] = []
    calibrate_checkpoint(
        folder / "model",
        folder / "text.txt",
        windows=TextWindows(5, 16),
        fisher=True,
        measure=True,
        callback=told.append,
    )
    # five windows, five without errors, and six times as many for each of two layers
    assert [each.done for each in told] == [*range(5 + 5 + 6 * 2 * 5 + 1)]
    assert {each.total for each in told} == {70}


def test_what_cannot_be_is_refused_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "c.safetensors"
    model, text = folder / "model", folder / "text.txt"
    words = (model, "--data", text, "--output", output)
    few = run(capsys, *words, "--samples", "1", "--context", "8")
    assert "at least 16 tokens" in few
    assert "got 8" in few
    assert run(capsys, *words, "--samples", "1", "--context", "8", "--ridge", "0.1")
    output.unlink()
    wrong = tmp_path / "wrong"
    save_tokenizer(wrong, 99)
    assert "vocabulary of 64 tokens" in run(capsys, *words, *SMALL, "--tokenizer", wrong)
    assert "at most the 32 positions" in run(capsys, *words, "--context", "64")
    assert "must fit in max_memory" in run(capsys, *words, *SMALL, "--max-memory", "1KiB")
    assert "must be a positive integer" in run(capsys, *words, "--samples", "0")
    assert "--ridge must be a number" in run(capsys, *words, "--ridge", "x")
    assert "device must be one of PyTorch's" in run(capsys, *words, "--device", "x")
    if not torch.cuda.is_available():
        assert "does not run on 'cuda'" in run(capsys, *words, *SMALL, "--device", "cuda")
    assert "dtype must be one of" in run(capsys, *words, *SMALL, "--dtype", "x")
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    assert "has 2" in run(capsys, model, "--data", short, "--output", output)
    absent = tmp_path / "absent.txt"
    assert "text file in UTF-8" in run(capsys, model, "--data", absent, "--output", output)
    nowhere = tmp_path / "nowhere" / "c.safetensors"
    assert "must exist" in run(capsys, model, "--data", text, "--output", nowhere)
    alone = save(tmp_path / "alone.safetensors", {"a": torch.ones(2)})
    assert "must be a folder" in run(capsys, alone, "--data", text, "--output", output)
    assert not output.exists()
    assert {each.name for each in tmp_path.iterdir()} == {"wrong", "short.txt", alone.name}

"""``tensormoe demo``, in one epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensormoe.cli import main
from tests._command import ask, check_not_blank


def test_demo_in_one_epoch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import numpy as np

    from tensormoe_numpy import MuMoE

    words = ["demo", "--epochs", "1", "--experts", "4x2", "--seed", "3", "--out"]
    found = ask(capsys, *words, str(tmp_path / "a"))
    assert [model["name"] for model in found["models"]] == [
        "CP",
        "tensor ring",
        "linear",
        "linear, wider",
    ]
    assert found["train_images"] + found["test_images"] == 1797
    budget = found["models"][2]["parameters"]
    assert budget == 65 * 64
    for model in found["models"][:2]:
        assert model["parameters"] <= budget
        assert model["gate_parameters"] == 64 * (4 + 2)
        assert 0.2 < min(model["accuracies"]) <= max(model["accuracies"]) <= 1.0
        assert found["max_relative_error"][model["name"]] < 1e-12
    # the wider layer has what the gates have, and no more
    factorized, wider = found["models"][0], found["models"][3]
    fair = budget + factorized["gate_parameters"] + 65 * 10
    assert fair - 75 < wider["all_parameters"] <= fair
    check_not_blank(tmp_path / "a" / "demo.png", least=900)
    names = {Path(name).name for name in found["files"]}
    assert names == {"cp.safetensors", "tensor_ring.safetensors", "demo.png", "experts.html"}
    assert {each.name for each in (tmp_path / "a").iterdir()} == names
    page = (tmp_path / "a" / "experts.html").read_text("utf-8")
    assert "data:image/png;base64," in page
    layer = MuMoE.load(tmp_path / "a" / "cp.safetensors")
    assert layer.spec.experts == (4, 2)
    assert np.isfinite(layer(np.ones((2, 64), "float32"))).all()
    again = ask(capsys, *words, str(tmp_path / "b"))
    assert [m["losses"] for m in again["models"]] == [m["losses"] for m in found["models"]]


def test_demo_tells_a_person_what_it_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", "--epochs", "1", "--experts", "4", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for said in (
        "4,160 parameters of the linear layer",
        "largest relative error",
        "outputs equal to the last bit",
        "Means of 3 runs",
        str(tmp_path / "demo.png"),
        str(tmp_path / "experts.html"),
    ):
        assert said in text

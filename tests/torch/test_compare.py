"""Several compressions of one model, compared on one text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.cli import main
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.errors import SpecError
from tensormoe_torch.compression import Comparison, Evaluation, TextWindows, compare_checkpoints
from tests._calibrated import save_model, save_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    save_model(folder / "model")
    save_text(folder / "text.txt")
    forms: dict[str, dict[str, Any]] = {
        "four": {"factorization": "dense", "bits": 4},
        "eight": {"factorization": "dense", "bits": 8},
        "small": {"factorization": "low_rank", "budget": 0.15},
        "large": {"factorization": "cp", "rank": 1},
    }
    for name, form in forms.items():
        wanted = Compression(preset="mixtral", compare=False, **form)
        compress_checkpoint(folder / "model", folder / name, wanted)
    return folder


def test_the_least_loss_wins(folder: Path) -> None:
    names = ("small", "eight", "four")
    paths = [folder / each for each in names]
    cut = TextWindows(6, 16)
    found = compare_checkpoints(folder / "model", paths, folder / "text.txt", windows=cut)
    losses = {n: e.losses[1] for n, e in zip(found.names, found.evaluations, strict=True)}
    assert found.names == names
    assert losses[found.best] == min(losses.values())
    shown = str(found)
    assert f"least lost: {found.best}" in shown
    assert shown.count("original") == 1
    for name in names:
        assert name in shown
    assert len({each.losses[0] for each in found.evaluations}) == 1


def evaluation(loss: float, size: int) -> Evaluation:
    return Evaluation(10, (1.0, loss), 0.5, 0.1, 0.2, (5.0, 5.0), (1000, size), None, ())


def test_what_is_larger_and_loses_more_is_beaten() -> None:
    found = Comparison(
        ("a", "b", "c", "d"),
        (evaluation(1.1, 300), evaluation(1.2, 300), evaluation(1.3, 100), evaluation(1.1, 200)),
    )
    assert found.best == "d"
    assert found.beaten == {"b": "d"}
    assert "b loses more than d, which has no more bytes" in str(found)
    assert found.to_dict()["beaten"] == {"b": "d"}
    assert "<table" in found._repr_html_()


def test_the_command_compares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", *(str(folder / each) for each in ("model", "four", "small"))]
    words += ["--data", str(folder / "text.txt"), "--context", "16", "--samples", "6"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"] in ("four", "small")
    assert main(words) == 0
    assert f"least lost: {found['best']}" in capsys.readouterr().out
    assert [each["name"] for each in found["compressions"]] == ["four", "small"]
    assert main([*words, "--layers"]) == 2
    assert "--layers is of one compressed model" in capsys.readouterr().err


def test_the_same_twice_is_refused(folder: Path) -> None:
    twice = [folder / "four", folder / "four"]
    for paths in (twice, []):
        with pytest.raises(SpecError, match="different folders"):
            compare_checkpoints(folder / "model", paths, folder / "text.txt")

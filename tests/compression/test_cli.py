"""``tensormoe compress`` as people and programs use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensormoe.cli import main
from tests._compress_models import content, experts, save, save_shards

EXPERTS = ("--experts", "layers.*.experts.*.w1")


@pytest.fixture(autouse=True)
def config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile of the machine's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    first = {**experts(rng), "head": torch.ones(40, 6)}
    return save_shards(tmp_path / "model", first, experts(rng, rows=12, layer=1))


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main(["compress", *map(str, words), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["compress", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_table_and_the_same_as_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (model, *EXPERTS, "--budget", "50%", "--output", tmp_path / "out")
    assert main(["compress", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    for column in (
        "experts",
        "shape",
        "rank",
        "before",
        "after",
        "error",
        "SVD error",
        "joint SVD",
    ):
        assert column in shown
    for text in ("layers.1.block_sparse_moe.experts.*.w1", "4 × 12 × 8", "384", "decomposing"):
        assert text in shown
    found = ask(capsys, *words)
    assert found["output"] == str(tmp_path / "out")
    assert found["dense_parameters"] == 576
    assert found["parameters"] == sum(each["parameters"] for each in found["groups"]) <= 288
    for group in found["groups"]:
        assert 0 < group["error"] < 1
        assert f"{group['error']:.1%}" in shown
        assert f"{group['svd_error']:.1%}" in shown
        joint = [each for each in group["controls"] if each["unfolding"] != "each expert"]
        assert f"{min(each['error'] for each in joint):.1%}" in shown
        assert all(each["parameters"] <= group["parameters"] for each in group["controls"])
        assert len(group["expert_errors"]) == 4
        assert (tmp_path / "out" / group["file"]).is_file()
    again = ask(capsys, *words[:-1], tmp_path / "other", "--no-svd")
    assert [each["svd_error"] for each in again["groups"]] == [None, None]
    assert [each["controls"] for each in again["groups"]] == [[], []]


def test_a_dry_run_reads_headers_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in model.glob("*.safetensors"):
        # numbers that a run would refuse
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    before = content(tmp_path)
    words = (model, *EXPERTS, "--budget", "50%", "--dry-run", "--output", tmp_path / "out")
    found = ask(capsys, *words, "--max-memory", "2GiB")
    assert main(["compress", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert content(tmp_path) == before
    assert found["dry_run"] is True
    assert found["fits"] is True
    assert found["bytes"] == 4 * (576 + 240)
    assert found["dense_parameters"] == 576
    for group, budget in zip(found["groups"], (96, 192), strict=True):
        assert 0 < group["parameters"] <= budget
        assert len(group["ranks"]) >= 1
        assert 0 < group["memory"] <= found["memory"]
        assert f"{group['parameters']:,}" in shown
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["groups"]))
    assert "only headers were read" in shown
    assert ask(capsys, *words, "--max-memory", "1MiB")["fits"] is False
    assert main(["compress", *map(str, words), "--max-memory", "1MiB"]) == 0
    assert "does not fit in 1 MiB" in capsys.readouterr().out
    faster = ask(capsys, *words, "--device", "h100")
    assert faster["device"]["name"] == "h100"
    assert faster["seconds"] != found["seconds"]


def test_what_a_run_does_is_what_the_dry_run_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wish in (("--budget", "50%"), ("--rank", "2,2,4"), ("--budget", "300")):
        words = (model, *EXPERTS, *wish)
        said = ask(capsys, *words, "--dry-run")
        output = tmp_path / wish[1].strip("%").replace(",", "")
        done = ask(capsys, *words, "--output", output)
        for before, after in zip(said["groups"], done["groups"], strict=True):
            assert after["name"] == before["name"]
            assert after["rank"] in before["ranks"]
            assert after["parameters"] <= before["parameters"]
        size = sum(len(data) for name, data in content(output).items() if "safetensors" in name)
        # headers come on top
        assert said["output_bytes"] < size + 4 * 576
        if wish[0] == "--rank":
            assert said["parameters"] == done["parameters"]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--budget", "0%"), "between 0% and 100%; got '0%'"),
        (("--budget", "100%"), "between 0% and 100%"),
        (("--budget", "x%"), "between 0% and 100%"),
        (("--budget", "25"), "at least"),
        (("--budget", "linear"), "--budget must be a quantity"),
        (("--budget", "50%", "--rank", "2"), "one of rank, budget and tolerance"),
        ((), "one of rank, budget and tolerance"),
        (("--tolerance", "0"), "in (0, 1)"),
        (("--tolerance", "much"), "--tolerance must be a number"),
        (("--rank", "0"), "rank must be positive integers"),
        (("--rank", "2", "--seed", "-1"), "--seed must be"),
        (("--rank", "2", "--seed", "one"), "--seed must be"),
        (("--rank", "2", "--factorization", "svd"), "factorization must be one of"),
        (("--rank", "2", "--layout", "square"), "layout must be one of"),
        (("--rank", "2", "--preset", "mixtral"), "and not both"),
        (("--rank", "2", "--max-memory", "lots"), "--max-memory must be a quantity"),
        (("--rank", "2", "--max-memory", "10MiB"), "max_memory must be at least"),
    ],
)
def test_words_that_cannot_be(
    words: tuple[str, ...],
    rule: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(tmp_path)
    assert rule in refused(capsys, model, *EXPERTS, *words, "--output", tmp_path / "out")
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_an_output_is_needed_unless_nothing_is_written(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--output must be given" in refused(capsys, model, *EXPERTS, "--rank", "2")


def test_dashes_and_tolerances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    model = save(tmp_path / "m.safetensors", experts(rng))
    words = (model, *EXPERTS, "--factorization", "tensor-train", "--tolerance", "60%")
    assert "≤" in str(main(["compress", *map(str, words), "--dry-run"])) + capsys.readouterr().out
    found = ask(capsys, *words, "--output", tmp_path / "out", "--dense")
    assert found["groups"][0]["error"] <= 0.6
    assert found["groups"][0]["file"] is None
    assert sorted(content(tmp_path / "out")) == ["m.safetensors", "tensormoe.json"]

"""Defaults from files: which one wins, what is refused, and what ``config`` says is in force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensormoe.cli import main
from tests._command import LAYER, ask


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def user_file(profile_path: Path) -> Path:
    path = profile_path.parent / "tensormoe.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def request(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return ask(capsys, "rank", *LAYER, "--factorization", "cp", *words)["request"]


def project(folder: Path, text: str) -> Path:
    path = folder / "pyproject.toml"
    path.write_text(f'[project]\nname = "x"\n[tool.other]\nbatch = 7\n{text}', "utf-8")
    return path


def test_the_nearest_of_file_and_flag_wins(
    capsys: pytest.CaptureFixture[str], folder: Path, user_file: Path
) -> None:
    assert request(capsys)["batch"] == 1024
    user_file.write_text('batch = 16\ntop_k = 1\n[rank]\nobjective = "expert_rank"\n', "utf-8")
    found = request(capsys)
    assert (found["batch"], found["top_k"], found["objective"]) == (16, 1, "expert_rank")
    project(folder, "[tool.tensormoe]\nbatch = 32\n[tool.tensormoe.plan]\nbatch = 64\n")
    found = request(capsys)
    assert (found["batch"], found["top_k"]) == (32, 1)
    assert ask(capsys, "plan", *LAYER, "--rank", "4")["request"]["batch"] == 64
    assert request(capsys, "--batch", "128")["batch"] == 128
    # a file that is named is the only one
    only = folder / "only.toml"
    only.write_text("training = true\nbias = false\n", "utf-8")
    found = request(capsys, "--config", str(only))
    assert (found["batch"], found["top_k"], found["training"]) == (1024, 2, True)
    assert found["bias"] is False
    found = request(capsys, "--config", str(only), "--no-training", "--bias")
    assert (found["training"], found["bias"]) == (False, True)


def test_a_list_is_replaced_and_not_joined(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    project(folder, '[tool.tensormoe]\nbonds = ["tensor_ring=4,4,free", "tucker=2,free,free"]\n')
    words = ("rank", *LAYER, "--factorization", "tensor_ring,tucker")
    found = ask(capsys, *words)["request"]["bonds"]
    assert found == {"tensor_ring": [4, 4, None], "tucker": [2, None, None]}
    found = ask(capsys, *words, "--bonds", "tensor_ring=2,2,free")["request"]["bonds"]
    assert found == {"tensor_ring": [2, 2, None]}


def test_a_rank_wins_over_the_budget_of_a_file(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    project(folder, '[tool.tensormoe]\nbudget = "9k"\n')
    found = ask(capsys, "plan", *LAYER, "--rank", "4")
    assert found["layers"][0]["spec"]["rank"] == 4
    project(folder, '[tool.tensormoe.plan]\nbudget = "9k"\nrank = 4\n')
    assert main(["plan", *LAYER]) == 2
    assert "exclude one another" in capsys.readouterr().err


def test_a_format_of_a_file_can_be_taken_back(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    project(folder, '[tool.tensormoe]\nformat = "csv"\n')
    assert main(["rank", *LAYER]) == 0
    assert capsys.readouterr().out.startswith("layer,what,best,")
    assert main(["rank", *LAYER, "--format", "table"]) == 0
    assert "No factorization exceeds" in capsys.readouterr().out
    assert request(capsys)["batch"] == 1024


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.tensormoe]\nbach = 3", "must be options of a command; got 'bach'"),
        ("[tool.tensormoe.ranks]\nbatch = 3", "must be commands; got 'ranks'"),
        ("[tool.tensormoe.rank]\nlogits = true", "must be options of rank; got 'logits'"),
        ("[tool.tensormoe]\njson = true", "got 'json'"),
        ("[tool.tensormoe]\nin_features = 3", "got 'in_features'"),
        ("[tool.tensormoe]\ntraining = 1", "training in 'pyproject.toml' must be true or false"),
        ("[tool.tensormoe]\nbatch = true", "batch in 'pyproject.toml' must be a text or a number"),
        ("[tool.tensormoe]\nbatch = [1, 2]", "must be a text or a number; got [1, 2]"),
        ("[tool.tensormoe]\nbatch = 2020-01-01", "must be a text or a number"),
        ('[tool.tensormoe]\nbatch = "many"', "--batch in pyproject.toml must be a positive"),
        ('[tool.tensormoe]\ngate = "relu"', "--gate in pyproject.toml: activation must be one"),
        ('[tool.tensormoe]\nformat = "xml"', "--format in pyproject.toml must be one of"),
        ("[tool]\ntensormoe = 3", "tool.tensormoe in 'pyproject.toml' must be a table"),
        ("[tool.tensormoe", "'pyproject.toml' can't be read as TOML"),
    ],
)
def test_what_a_file_cannot_say_is_refused_with_its_name(
    capsys: pytest.CaptureFixture[str], folder: Path, text: str, said: str
) -> None:
    (folder / "pyproject.toml").write_text(text, "utf-8")
    assert main(["rank", *LAYER]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert "pyproject.toml" in captured.err


def test_errors_of_every_command_name_the_file(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    project(folder, '[tool.tensormoe]\nepochs = 0\nbackend = "abacus"\ntop_k = "x"\n')
    for words, said in (
        (("demo",), "--epochs in pyproject.toml must be a positive integer; got '0'."),
        (("calibrate",), "--backend in pyproject.toml must be one of 'numpy', 'torch'"),
        (("plan", *LAYER), "--top-k in pyproject.toml must be a positive integer; got 'x'."),
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_config_says_what_is_in_force_and_where_from(
    capsys: pytest.CaptureFixture[str], folder: Path, user_file: Path
) -> None:
    user_file.write_text('device = "h100"\nbatch = 16\n', "utf-8")
    project(folder, "[tool.tensormoe]\nbatch = 32\n[tool.tensormoe.rank]\ntraining = true\n")
    found = ask(capsys, "config")
    assert [each["path"] for each in found["files"]] == [str(user_file), "pyproject.toml"]
    assert all(each["found"] for each in found["files"])
    rows = {(row["command"], row["option"]): row for row in found["settings"]}
    assert (
        rows["rank", "batch"] | {"value": "32", "source": "pyproject.toml"}
        == (rows["rank", "batch"])
    )
    assert rows["plan", "batch"]["value"] == "32"
    assert rows["rank", "device"]["source"] == str(user_file)
    assert rows["compress", "device"]["value"] == "h100"
    assert rows["rank", "training"]["value"] is True
    assert rows["plan", "training"]["source"] == "default"
    # and what it says is what the commands do
    assert request(capsys)["batch"] == 32
    assert request(capsys)["training"] is True
    assert main(["config", "rank"]) == 0
    text = capsys.readouterr().out
    assert "plan" not in text
    line = next(line for line in text.splitlines() if "batch" in line)
    assert line.split() == ["rank", "batch", "32", "pyproject.toml"]
    for form, start in (("csv", "command,option"), ("markdown", "| command | option")):
        assert main(["config", "rank", "--format", form]) == 0
        assert capsys.readouterr().out.startswith(start)


def test_the_files_are_optional(
    capsys: pytest.CaptureFixture[str], folder: Path, user_file: Path
) -> None:
    found = ask(capsys, "config", "plan")
    assert [each["found"] for each in found["files"]] == [False, False]
    assert {row["source"] for row in found["settings"]} == {"default"}
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\n', "utf-8")
    assert ask(capsys, "config")["files"][1]["found"] is False

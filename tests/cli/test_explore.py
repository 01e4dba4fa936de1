"""``tensormoe explore``: from data files and from checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensormoe.analysis import Exploration, Images, explore
from tensormoe.cli import main
from tensormoe_numpy import MuMoE, MuMoEMLP, SparseMoE
from tests._command import ask
from tests.explorer import _pages as pages

RNG = np.random.default_rng(0)
ROWS = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A layer and its inputs in files."""
    MuMoE(8, 3, experts=(4, 2), rank=3, seed=0).save(tmp_path / "head.safetensors")
    np.save(tmp_path / "x.npy", RNG.standard_normal((ROWS, 8)))
    np.save(tmp_path / "y.npy", RNG.integers(0, 3, ROWS))
    np.save(tmp_path / "pictures.npy", RNG.integers(0, 256, (ROWS, 5, 5)).astype("uint8"))
    (tmp_path / "names.txt").write_text("één\nzwei\ntrois\n", "utf-8")
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    head, x, y = (str(folder / name) for name in ("head.safetensors", "x.npy", "y.npy"))
    return ["explore", head, "--inputs", x, "--labels", y, *more]


def test_checkpoint(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    output = folder / "page.html"
    more = ("--images", str(folder / "pictures.npy"), "--class-names", str(folder / "names.txt"))
    said = ask(capsys, *words(folder, *more, "--logits", "--output", str(output)))
    layer = MuMoE.load(folder / "head.safetensors")
    expected = explore(
        layer,
        np.load(folder / "x.npy").astype("float32"),
        np.load(folder / "y.npy"),
        head="identity",
        examples=Images(np.load(folder / "pictures.npy")),
        class_names=["één", "zwei", "trois"],
        title="head",
    )
    assert output.read_bytes() == expected.html()
    assert said["output"] == str(output)
    assert said["bytes"] == len(expected.html())
    assert (said["experts"], said["inputs"], said["classes"]) == ([4, 2], ROWS, 3)
    assert said["mean_specialization"][0] == expected.levels[0].specialization.mean


def test_data_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = pages.linear()
    found.save(tmp_path / "explore.json")
    assert main(["explore", str(tmp_path / "explore.json")]) == 0
    said = capsys.readouterr().out
    assert "16 experts, 200 inputs, 5 classes" in said
    assert str(tmp_path / "explore.html") in said
    assert (tmp_path / "explore.html").read_bytes() == found.html()


def test_data_from_a_checkpoint_and_blocks(folder: Path) -> None:
    block = MuMoEMLP(8, 6, 3, experts=4, rank=2, gate=None, seed=0)
    block.save(folder / "head.safetensors")
    np.save(folder / "a.npy", pages.sparse(RNG, ROWS, 4))
    more = ("--coefficients", str(folder / "a.npy"), "--output", str(folder / "found.json"))
    assert main(words(folder, *more, "--logits", "--top", "2", "--title", "Mine")) == 0
    found = Exploration.load(folder / "found.json")
    assert (found.title, found.experts, found.inputs) == ("Mine", (4,), ROWS)
    assert found.levels[0].top.numbers.shape == (4, 2)
    assert found.levels[0].interventions is not None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "page.txt"], "path must end in .html or .json"),
        (["--labels", "{x}"], "labels must be integers"),
        (["--images", "nowhere.npy"], "--images must be an array in a .npy file"),
        (["--images", "{names}"], "--images must be an array in a .npy file"),
        (["--images", "{pictures}", "--texts", "{names}"], "must not be given together"),
        (["--texts", "{names}"], "examples must be one per input; got 3 for 40"),
        (["--class-names", "nowhere.txt"], "can't be read as lines of text"),
        (["--class-names", "{x}"], "can't be read as lines of text"),
        (["--top", "none"], "--top must be a positive integer"),
        (["--coefficients", "{x}"], "coefficients must be one entry per level, 2; got 1"),
    ],
)
def test_errors(
    more: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"x": "x.npy", "names": "names.txt", "pictures": "pictures.npy"}
    paths = {key: str(folder / name) for key, name in names.items()}
    before = sorted(folder.iterdir())
    assert main(words(folder, *(each.format(**paths) for each in more))) == 2
    assert said in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_sources_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", str(folder / "head.safetensors")]) == 2
    assert "--inputs must be given" in capsys.readouterr().err
    assert main(["explore", str(folder / "none.json")]) == 2
    assert "can't be read" in capsys.readouterr().err
    pages.bare().save(folder / "bare.json")
    assert main(["explore", str(folder / "bare.json"), "--top", "3"]) == 2
    assert "--top is for checkpoints" in capsys.readouterr().err
    SparseMoE(8, 6, 3, experts=4, top_k=2, seed=0).save(folder / "head.safetensors")
    assert main(words(folder)) == 2
    assert "got a SparseMoE" in capsys.readouterr().err

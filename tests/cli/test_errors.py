"""Words that can't be followed are one clear line, and a missing package names its extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tensormoe.cli import main
from tests._command import LAYER, run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["ranks"], "invalid choice: 'ranks'"),
        (["rank", "64"], "OUT, EXPERTS"),
        (["rank", "0", "64", "16"], "in_features must be a positive integer; got '0'"),
        (["rank", "64", "6.5", "16"], "out_features must be a positive integer; got '6.5'"),
        (["rank", "-3", "64", "16"], "got '-3'"),
        (["rank", "64", "64", "16x"], "got '' for level 1"),
        (["rank", "64", "64", "9" * 5000], "experts must be positive integers"),
        (["rank", *LAYER, "--budget", "cheap"], "budget must be linear, mlp"),
        (["rank", *LAYER, "--budget", "-5"], "budget must be"),
        (["rank", *LAYER, "--budget", "0"], "parameters of a budget must be"),
        (["rank", *LAYER, "--budget", "1e999"], "parameters of a budget must be"),
        (["rank", *LAYER, "--budget", "memory=5lb"], "64MiB; got '5lb'"),
        (["rank", *LAYER, "--budget", "time=5"], "2ms or 300us; got '5'"),
        (["rank", *LAYER, "--budget", "speed=5"], "budget must be"),
        (["rank", *LAYER, "--budget", "mlp,9k"], "limit parameters once"),
        (["rank", *LAYER, "--factorization", "svd"], "factorization must be one of 'cp'"),
        (["rank", *LAYER, "--objective", "speed"], "--objective must be one of 'capacity'"),
        (["rank", *LAYER, "--device", "tpu"], "--device must be one of this"),
        (["rank", *LAYER, "--gate", "relu"], "--gate: activation must be one of entmax"),
        (["rank", *LAYER, "--kind", "conv"], "--kind must be one of 'layer'"),
        (["rank", *LAYER, "--hidden", "0"], "--hidden must be a positive integer; got '0'"),
        (["rank", *LAYER, "--dtype", "int8"], "--dtype must be one of 'float32'"),
        (["rank", *LAYER, "--devices", "0"], "--devices must be a positive integer"),
        (["rank", *LAYER, "--devices", "2", "--link", "fast"], "--link must be a quantity"),
        (["rank", *LAYER, "--format", "xml"], "--format must be one of 'table', 'json'"),
        (["rank", *LAYER, "--top-k", "none"], "--top-k must be a positive integer"),
        (["rank", *LAYER, "--kind", "mlp", "--bonds", "4,4"], "--bonds must be left out"),
        (["rank", *LAYER, "--kind", "mlp", "--front"], "--front is for single layers"),
        (["plan", *LAYER, "--kind", "gated", "--rank", "4,4"], "--rank must be one positive"),
        (["plan", *LAYER, "--top-k", "x"], "--top-k must be a positive integer"),
        (["completion", "tcsh"], "SHELL must be one of 'bash', 'zsh', 'fish'; got 'tcsh'"),
        (["completion"], "SHELL"),
        (["config", "ranks"], "COMMAND must be one of 'rank'"),
        (["rank", *LAYER, "--config", "/no/such.toml"], "--config must be a file"),
        (["rank", *LAYER, "--batch", "many"], "--batch must be a positive integer"),
        (["rank", *LAYER, "--bonds", "4,4"], "bonds must have 3 entries"),
        (["rank", *LAYER, "--bonds", "4,-4,free"], "got '-4' for bond 1"),
        (["rank", *LAYER, "--bonds", "a,b,c"], "at most two symbols"),
        (["rank", *LAYER, "--bonds", "svd=4"], "--bonds must be for one of"),
        (["rank", *LAYER, "--bonds", "4,4,free", "--bonds", "4,4,free"], "given once"),
        (["plan", *LAYER, "--rank", "4,4"], "rank must be one positive integer"),
        (["plan", *LAYER, "--rank", "4,x"], "got 'x' for bond 1"),
        (["plan", *LAYER, "--rank", "0"], "rank must be positive integers; got '0' for bond 0"),
        (["plan", *LAYER, "--rank", "4", "--budget", "linear"], "exclude one another"),
        (["plan", *LAYER, "--factorization", "dense", "--rank", "4"], "rank must be None"),
        (["plan", *LAYER, "--factorization", "svd", "--rank", "4"], "factorization must be one"),
        (["plan", *LAYER, "--budget", "10"], "--budget: parameters must be at least"),
        (["plan", *LAYER, "--size", "4"], "arguments: --size 4. Run: tensormoe plan --help"),
        (["plan", *LAYER, "--rank", "4", "--top-k", "99"], "--top-k must be at most"),
        (["plan", *LAYER, "--rank", "4", "--memory-limit", "9"], "--memory-limit must be at least"),
        (["plan", *LAYER, "--rank", "4", "--memory-limit", "x"], "--memory-limit must be"),
        (["plan", *LAYER, "--memory-limit", "1M", "--training"], "--memory-limit is for forward"),
        (["plan", *LAYER, "--rank", "4", "--devices", "x"], "--devices must be a positive"),
        (["plan", *LAYER, "--rank", "4", "--devices", "7"], "multiple of the 7 devices"),
        (["plan", *LAYER, "--rank", "4", "--devices", "2", "--leg", "z"], "--leg must be one of"),
        (["plan", *LAYER, "--rank", "5", "--devices", "2", "--leg", "r"], "got 5 for leg 'r'"),
        (["plan", *LAYER, "--rank", "4", "--leg", "r"], "--leg is for a layer cut over"),
        (["plan", *LAYER, "--rank", "4", "--link", "1G"], "--link is for a layer cut over"),
        (["plan", *LAYER, "--plot", "x.bmp"], "--plot must end in one of .png, .svg, .pdf"),
        (["plan", *LAYER, "--plot", "png"], "--plot must end in one of"),
        (["plan", *LAYER, "--plot", "/no/such/folder/x.png"], "the folder of --plot must exist"),
        (["plan", *LAYER, "--plot", "/dev/null/x.png"], "the folder of --plot must exist"),
        (["demo", "--epochs", "0"], "--epochs must be a positive integer"),
        (["demo", "--seed", "-1"], "--seed must be an integer of at least 0; got '-1'"),
        (["demo", "--seed", "x"], "--seed must be an integer of at least 0"),
        (["demo", "--experts", "none"], "experts must be positive integers"),
        (["demo", "--out", "/dev/null/x"], "can't be made a folder"),
    ],
)
def test_bad_words_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], words: Sequence[str], said: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_every_word_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("0", "64", "16x", "--batch", "many", "--dtype", "int8", "--objective", "speed")
    assert main(["rank", *words, "--device", "tpu"]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.splitlines()
    for line, said in zip(
        sorted(lines),
        (
            "--batch must be a positive integer; got 'many'. Write digits: 768.",
            "--device must be one of this",
            "--dtype must be one of 'float32'",
            "--objective must be one of 'capacity'",
            "experts must be positive integers; got '' for level 1 of '16x'.",
            "in_features must be a positive integer; got '0'. Write digits: 768.",
        ),
        strict=True,
    ):
        assert line.startswith(f"error: {said}")


def test_a_plot_that_cannot_be_written_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # the folder can be written, but no file has so long a name
    assert main(["rank", *LAYER, "--plot", str(tmp_path / ("a" * 300 + ".png"))]) == 2
    assert "could not be written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.p*"))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "x.png").mkdir()
    assert main(["rank", *LAYER, "--plot", str(tmp_path / "x.png")]) == 2
    assert "can be written" in capsys.readouterr().err


def test_errors_of_a_process_have_no_traceback() -> None:
    done = run("plan", "64", "64", "16", "--rank", "4,4")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("error: --rank must be one positive integer; got (4, 4).")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("rich", ["rank", *LAYER], "cli"),
        ("matplotlib", ["rank", *LAYER, "--json", "--plot", "x.png"], "plot"),
        ("matplotlib", ["plan", *LAYER, "--json", "--plot", "x.png"], "plot"),
        ("platformdirs", ["rank", *LAYER, "--device", "this"], "cli"),
        ("numpy", ["calibrate"], "numpy"),
        ("shtab", ["completion", "bash"], "cli"),
        ("sklearn", ["demo"], "demo"),
        ("matplotlib", ["demo"], "demo"),
    ],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, missing: str, words: list[str], extra: str
) -> None:
    hide = f"""
import os, sys
os.chdir({str(tmp_path)!r})
sys.modules[{missing!r}] = None
from tensormoe.cli import main
sys.exit(main({words!r}))
"""
    done = run(code=hide)
    assert done.returncode == 2, done.stderr
    assert missing in done.stderr
    assert f"pip install 'tensormoe[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_json_needs_no_extra() -> None:
    hide = f"""
import sys
for name in ("rich", "platformdirs", "matplotlib", "numpy"):
    sys.modules[name] = None
from tensormoe.cli import main
sys.exit(main(["rank", *{LAYER!r}, "--json"]) or main(["plan", *{LAYER!r}, "--json"]))
"""
    done = run(code=hide)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"command"') == 2

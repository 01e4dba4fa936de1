"""Completion: the words that bash, zsh and fish offer, by running them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tensormoe.cli import main
from tensormoe.cli._completion import SHELLS
from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.selection import OBJECTIVES

CASES = [
    ("tensormoe ra", {"rank"}),
    ("tensormoe rank 768 768 512 --obj", {"--objective"}),
    ("tensormoe rank 768 768 512 --objective ", {*OBJECTIVES}),
    ("tensormoe plan 768 768 512 --kind g", {"gated"}),
    ("tensormoe plan 768 768 512 --factorization tu", {"tucker"}),
    ("tensormoe rank 768 768 512 --no-tr", {"--no-training"}),
    ("tensormoe completion z", {"zsh"}),
    ("tensormoe config pl", {"plan"}),
]

BASH = """
source "$1"
COMP_LINE="$2"
read -r -a COMP_WORDS <<< "$2"
[[ "$2" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
_shtab_tensormoe
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(capsys: pytest.CaptureFixture[str], folder: Path, shell: str) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"tensormoe.{shell}"
    path.write_text(capsys.readouterr().out, "utf-8")
    return path


def call(*words: str) -> list[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_is_one_of_its_shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shell: str
) -> None:
    path = script(capsys, tmp_path, shell)
    text = path.read_text("utf-8")
    for name in ("rank", "compress", "memory-limit", *FACTORIZATIONS):
        assert name in text
    if shutil.which(shell):
        call(shell, "-n", str(path))


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_offers_commands_options_names_and_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = script(capsys, tmp_path, "bash")
    for line, wanted in CASES:
        assert {*call("bash", "-c", BASH, "bash", str(path), line)} == wanted
    (tmp_path / "front.svg").touch()
    line = f"tensormoe rank 1 1 1 --plot {tmp_path}/fr"
    assert call("bash", "-c", BASH, "bash", str(path), line) == [f"{tmp_path}/front.svg"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_offers_commands_options_and_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = script(capsys, tmp_path, "fish")
    for line, wanted in CASES:
        code = f"source {path}; complete -C '{line}'"
        found = {each.split("\t")[0] for each in call("fish", "--no-config", "-c", code)}
        assert {each for each in found if each} == wanted


def test_the_list_of_commands_stays_out_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert text.count("  rank ") == 1
    assert "positional" not in text


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_finds_the_script_for_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script(capsys, tmp_path, "zsh").rename(tmp_path / "_tensormoe")
    code = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; "
    assert call("zsh", "-fc", code + "print $_comps[tensormoe]") == ["_tensormoe"]
    # and it can be loaded
    code += "autoload +X -Uz _tensormoe; whence -w _tensormoe"
    assert call("zsh", "-fc", code) == ["_tensormoe: function"]

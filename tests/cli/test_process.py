"""The command as a process: help, encodings, pipes that close, interrupts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tensormoe.cli._commands import COMMANDS, make_parser
from tests._command import LAYER, run
from tests._python import ENVIRONMENT


def test_help_and_version() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("rank", "plan", "calibrate", "demo", "explore", "config", "completion"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
        assert "usage: tensormoe " + command in run(command, "--help").stdout
    assert run("--version").stdout.startswith("tensormoe ")


def test_help_loads_nothing_heavy() -> None:
    watch = """
import sys
from tensormoe.cli import main
from tensormoe.cli._commands import COMMANDS
for words in ([], *([name] for name in COMMANDS)):
    try:
        main([*words, "--help"])
    except SystemExit:
        pass
heavy = {"numpy", "opt_einsum", "rich", "matplotlib", "platformdirs", "scipy", "sklearn", "shtab"}
heavy |= {"tensormoe.choosing", "tensormoe.planning", "tensormoe.compression", "tomllib"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    assert run(code=watch).stderr == "[]\n"


def test_output_that_cannot_be_encoded_is_no_failure() -> None:
    done = run("plan", *LAYER, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "CP(rank=" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals as POSIX has them")
def test_a_reader_that_goes_away_is_no_error() -> None:
    for words in ("rank 64 64 16", "rank 64 64 16 --json"):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tensormoe.cli", *words.split()],
            env=ENVIRONMENT,
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writing)
        assert done.returncode == 1
        assert done.stderr == b""


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals as POSIX has them")
def test_an_interrupt_is_status_130(tmp_path: Path) -> None:
    words = ["demo", "--epochs", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensormoe.cli", *words],
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore interrupts, and so do their children unless told
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Training" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors == "error: interrupted.\n"


def test_the_page_lists_every_command_and_option() -> None:
    text = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text("utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name, parser in make_parser(COMMANDS)[1].items():
        assert f"[`{name}`](#{name})" in text
        for option in parser.format_help().split():
            if re.fullmatch(r"--[a-z][a-z-]+", option) and not option.startswith("--no-"):
                assert f"`{option}" in sections[name] or option == "--help", (name, option)

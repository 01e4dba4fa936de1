"""``tensormoe compress`` that is watched, limited or interrupted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tensormoe import CP
from tensormoe.checkpoint._files import PARTIAL_SUFFIX
from tensormoe.cli import main
from tensormoe.cli._compress_show import bars
from tensormoe.compression import Compression, CompressionProgress, compress_checkpoint
from tensormoe.decomposition import Progress, _watch
from tests._compress_models import PATTERN, content, experts, save_shards

WANTED = Compression("tensor_ring", budget=0.5, experts=PATTERN)


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    return save_shards(tmp_path / "model", experts(rng), experts(rng, rows=12, layer=1))


def at_sweep(call: int, how: Any) -> Callable[[CompressionProgress], bool]:
    """A callback that ends at a sweep, of all groups together."""
    left = count(1)

    def ending(now: CompressionProgress) -> bool:
        if now.search is None or next(left) != call:
            return False
        if how is True:
            return True
        raise how

    return ending


def test_every_sweep_is_told(model: Path, tmp_path: Path) -> None:
    seen: list[CompressionProgress] = []
    result = compress_checkpoint(model, tmp_path / "out", WANTED, callback=seen.append)
    searches = [each for each in seen if each.search is not None]
    for report in result.groups:
        own = [each.search for each in searches if each.name in report.name]
        assert own
        assert all(each is not None and each.name in report.name for each in own)
        last: Any = own[-1]
        assert last.factorization.rank == report.rank
        assert last.error == pytest.approx(report.error, rel=1e-2)
        assert report.ended in ("converged", "sweeps")


@pytest.mark.parametrize("how", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupted_in_a_group_and_continued(how: Any, model: Path, tmp_path: Path) -> None:
    """No half-searched factors stay: the bytes are those of a run that nothing ended."""
    seen: list[CompressionProgress] = []
    compress_checkpoint(model, tmp_path / "whole", WANTED, callback=seen.append)
    sweeps = [each.name for each in seen if each.search is not None]
    call = sweeps.index(sweeps[-1]) + 3
    with pytest.raises(how) as caught:
        compress_checkpoint(model, tmp_path / "out", WANTED, callback=at_sweep(call, how))
    if how is KeyboardInterrupt:
        assert "1 of 2 groups are done" in str(caught.value)
    assert (tmp_path / f"out{PARTIAL_SUFFIX}").exists()
    compress_checkpoint(model, tmp_path / "out", WANTED)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_interrupted_before_anything_was_done(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="nothing is done yet"):
        compress_checkpoint(
            model, tmp_path / "out", WANTED, callback=at_sweep(1, KeyboardInterrupt)
        )
    # another command may have the name
    assert not (tmp_path / f"out{PARTIAL_SUFFIX}").exists()
    compress_checkpoint(model, tmp_path / "out", Compression("cp", rank=2, experts=PATTERN))


def test_the_command_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensormoe.compression import _stack

    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%"]
    words += ["--output", str(tmp_path / "out")]
    decompose, calls = _stack.decompose, count()

    def second(*given: Any, **named: Any) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return decompose(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(_stack, "decompose", second)
        assert main(words) == 130
    said = capsys.readouterr().err
    assert "interrupted: 1 of 2 groups are done" in said
    assert "the same command goes on from there" in said
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["groups"]) == 2


def test_a_time_limit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%", "--json"]
    ticks = count()
    monkeypatch.setattr(_watch, "perf_counter", lambda: float(next(ticks)))
    assert main([*words, "--seconds", "2.5", "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["seconds"] == 2.5
    assert [each["ended"] for each in found["groups"]] == ["time", "time"]
    for text in ("0", "-1", "soon"):
        output = str(tmp_path / "other")
        assert main([*words, f"--seconds={text}", "--output", output]) == 2
        assert "--seconds must be a positive number" in capsys.readouterr().err


def test_a_terminal_shows_sweeps() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with bars(console) as told:
        assert told is not None
        told(CompressionProgress("experts", "layers.0.w1", 0, 10))
        told(
            CompressionProgress(
                "experts", "layers.0.w1", 0, 10, Progress("layers.0.w1", CP(7), 12, 0.3125, 1.0)
            )
        )
    assert "layers.0.w1: rank 7, sweep 12, off by 31.2%" in out.getvalue()

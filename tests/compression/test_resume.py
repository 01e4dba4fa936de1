"""Compressions that are killed, run out of disk or meet one another, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe.checkpoint._files import PARTIAL_SUFFIX
from tensormoe.compression import Compression, CompressionProgress, compress_checkpoint
from tensormoe.errors import CheckpointError
from tests._compress_models import PATTERN, content, experts, save_shards
from tests._python import ENVIRONMENT, run_python

WANTED = Compression("tensor_ring", budget=0.5, experts=PATTERN)
GROUPS = 3

# kills itself at the given call of a function, or limits what it may write
_RUN = """
import os, resource, signal, sys
from tensormoe.checkpoint._files import write_whole
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.compression import _write

model, output, dense, where, count = sys.argv[1:]

def dying(function, left=[int(count)]):
    def called(*given, **named):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return called

if where == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(count), int(count)))
elif where == "fsync":
    os.fsync = dying(os.fsync)
elif where == "replace":
    os.replace = dying(os.replace)
elif where == "rename":
    os.rename = dying(os.rename)
elif where == "unlink":
    os.unlink = dying(os.unlink)
elif where == "chunk":
    _write.read_range = dying(_write.read_range)
wanted = Compression("tensor_ring", budget=0.5, experts=("layers.*.experts.*.w1",),
                     dense=dense == "dense")
compress_checkpoint(model, output, wanted)
"""


def made(path: Path) -> Path:
    """Three groups in two shards, one of which is in both."""
    rng = np.random.default_rng(0)
    first, second, third = (experts(rng, layer=layer) for layer in range(GROUPS))
    keys = list(second)
    halves = ({key: second[key] for key in part} for part in (keys[:2], keys[2:]))
    one, two = halves
    one |= {"model.norm.weight": third[next(iter(third))][0].clone()}
    return save_shards(path, first | one, two | third)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("made") / "model")


@cache
def unstopped(model: Path, dense: bool) -> dict[str, bytes]:
    """Files of a run that nobody stopped."""
    output = model.with_name(f"dense {dense}")
    compress_checkpoint(model, output, replace(WANTED, dense=dense))
    return content(output)


def run(model: Path, output: Path, dense: str, where: str, count: int) -> Any:
    return run_python("-c", _RUN, model, output, dense, where, count)


def continued(model: Path, output: Path, dense: bool) -> None:
    """Run to the end, which leaves every byte of a run that nobody stopped, and nothing else."""
    compress_checkpoint(model, output, replace(WANTED, dense=dense))
    found, wanted = content(output), unstopped(model, dense)
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name] == wanted[name], name
    assert not output.with_name(f"{output.name}{PARTIAL_SUFFIX}").exists()


@pytest.mark.parametrize(
    ("dense", "where", "count"),
    [
        ("factors", "fsync", 0),  # before the journal's first line has its name
        ("factors", "fsync", 3),  # the first factors have their name, and are not noted
        ("factors", "fsync", 6),
        ("factors", "replace", 2),
        ("factors", "replace", 5),  # shards are being written
        ("factors", "chunk", 0),  # in the middle of one
        ("factors", "unlink", 0),  # the manifest is there, the journal is still
        ("factors", "rename", 0),  # everything but the final name
        # with a folder of factors that is dropped at the end
        ("dense", "fsync", 3),
        ("dense", "replace", 5),
        ("dense", "chunk", 0),
        ("dense", "unlink", 0),
    ],
)
def test_killed_and_continued(
    where: str, count: int, dense: str, model: Path, tmp_path: Path
) -> None:
    killed = run(model, tmp_path / "out", dense, where, count)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / f"out{PARTIAL_SUFFIX}").exists()
    continued(model, tmp_path / "out", dense == "dense")


def test_what_is_done_is_not_done_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensormoe.compression import _stack

    decompose = _stack.decompose
    calls: list[tuple[int, ...]] = []

    def failing(weights: Any, *given: Any, **named: Any) -> Any:
        calls.append(weights.shape)
        if len(calls) == GROUPS:
            raise KeyboardInterrupt
        return decompose(weights, *given, **named)

    monkeypatch.setattr(_stack, "decompose", failing)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(model, tmp_path / "out", WANTED)
    seen: list[CompressionProgress] = []
    result = compress_checkpoint(model, tmp_path / "out", WANTED, callback=seen.append)
    assert len(calls) == GROUPS + 1
    assert all(report.seconds is not None for report in result.groups)
    stages = {each.stage for each in seen}
    assert stages == {"experts", "files"}
    for stage in stages:
        done = [each.done for each in seen if each.stage == stage]
        total = {each.total for each in seen if each.stage == stage}
        assert done == sorted(done)
        assert total == {done[-1]}
    # and a whole output is only looked at
    again = compress_checkpoint(model, tmp_path / "out", WANTED)
    assert len(calls) == GROUPS + 1
    assert again.groups == tuple(replace(report, seconds=None) for report in result.groups)


@pytest.mark.parametrize("whole", [False, True])
def test_another_command_on_the_same_output(whole: bool, tmp_path: Path) -> None:
    model = made(tmp_path / "model")
    if whole:
        compress_checkpoint(model, tmp_path / "out", WANTED)
    else:
        run(model, tmp_path / "out", "factors", "fsync", 6)
    before = content(tmp_path)
    for other, rule in (
        (replace(WANTED, budget=0.4), r"budget was 0\.5 and is 0\.4"),
        (replace(WANTED, seed=1), "seed was 0 and is 1"),
        (replace(WANTED, dense=True), "dense was False and is True"),
        (replace(WANTED, factorization="cp"), "factorization was 'tensor_ring' and is 'cp'"),
    ):
        with pytest.raises(CheckpointError, match=rule):
            compress_checkpoint(model, tmp_path / "out", other)
    assert content(tmp_path) == before
    shard = next(model.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match="shards was"):
        compress_checkpoint(model, tmp_path / "out", WANTED)


@pytest.mark.parametrize(
    ("limit", "dense"),
    [(0, "factors"), (600, "factors"), (1500, "factors"), (600, "dense"), (1500, "dense")],
)
def test_a_full_disk(limit: int, dense: str, model: Path, tmp_path: Path) -> None:
    failed = run(model, tmp_path / "out", dense, "limit", limit)
    assert failed.returncode == 1
    assert "CheckpointError" in failed.stderr
    assert "could not be written: File too large" in failed.stderr
    assert not (tmp_path / "out").exists()
    # no file but the journal was left in the middle
    for path in (tmp_path / f"out{PARTIAL_SUFFIX}").rglob("*"):
        assert not path.name.endswith(PARTIAL_SUFFIX)
    continued(model, tmp_path / "out", dense == "dense")


def test_a_disk_that_is_too_small_is_said_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensormoe.compression import _limits, _stack

    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(_limits.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(_stack, "read_stack", None)
    with pytest.raises(CheckpointError, match=r"must have space for .* bytes; it has 100"):
        compress_checkpoint(model, tmp_path / "out", WANTED)
    assert not [*tmp_path.iterdir()]


def test_two_at_once(model: Path, tmp_path: Path) -> None:
    other: list[str] = []

    def meanwhile(*_: Any) -> None:
        if not other:
            with pytest.raises(CheckpointError, match="another process is at work") as caught:
                compress_checkpoint(model, tmp_path / "out", WANTED)
            other.append(str(caught.value))

    compress_checkpoint(model, tmp_path / "out", WANTED, callback=meanwhile)
    assert other
    assert (tmp_path / "out").exists()


def _torn(journal: bytes) -> bytes:
    return journal[:-20]


def _garbled(journal: bytes) -> bytes:
    return b"{" + journal


@pytest.mark.parametrize(("damage", "rule"), [(_torn, None), (_garbled, "damaged"), (None, "no j")])
def test_damaged_journals(
    damage: Callable[[bytes], bytes] | None, rule: str | None, model: Path, tmp_path: Path
) -> None:
    run(model, tmp_path / "out", "factors", "replace", 4)
    journal = tmp_path / f"out{PARTIAL_SUFFIX}" / ".tensormoe-journal"
    assert len(journal.read_bytes().splitlines()) == 1 + GROUPS
    if damage is None:
        journal.unlink()
    else:
        journal.write_bytes(damage(journal.read_bytes()))
    if rule is not None:
        with pytest.raises(CheckpointError, match=rule):
            compress_checkpoint(model, tmp_path / "out", WANTED)
        return
    # what was cut is gone before the next line comes
    killed = run(model, tmp_path / "out", "factors", "chunk", 0)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(map(json.loads, journal.read_bytes().splitlines()))) == 1 + GROUPS
    continued(model, tmp_path / "out", dense=False)


def test_a_killed_command_line(model: Path, tmp_path: Path) -> None:
    """A process that is killed at any moment, as long as it runs."""
    words = ["compress", str(model), "--experts", PATTERN[0], "--budget", "50%", "--json"]
    command = [sys.executable, "-m", "tensormoe.cli", *words, "--output", str(tmp_path / "out")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        journal = tmp_path / f"out{PARTIAL_SUFFIX}" / ".tensormoe-journal"
        end = time.monotonic() + 60
        while time.monotonic() < end and not journal.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
    assert len(json.loads(done.stdout)["groups"]) == GROUPS
    continued(model, tmp_path / "out", dense=False)

"""A process that is killed while it saves leaves a whole file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tensormoe.checkpoint import PARTIAL_SUFFIX, read_checkpoint
from tensormoe.errors import CheckpointError
from tensormoe_numpy import BACKEND
from tests._checkpoint_files import posix
from tests._python import ENVIRONMENT
from tests.checkpoint._versions import (
    ONE_SAVE_AFTER_ANOTHER,
    assert_one_whole_version,
    save_version,
)


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(PARTIAL_SUFFIX)]


@posix
def test_killed_saves_leave_a_whole_file(tmp_path: Path, rng: np.random.Generator) -> None:
    path, size = tmp_path / "a.safetensors", 2**20
    save_version(path, 0, size)
    seen = {0}
    cut_short = 0
    for trial in range(1, 41):
        saver = subprocess.Popen(
            [sys.executable, "-c", ONE_SAVE_AFTER_ANOTHER, path, str(10 * trial), str(size)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
        )
        with saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.15))
            assert saver.poll() is None
            saver.kill()
        seen.add(assert_one_whole_version(path, size))
        for name in leftovers(tmp_path):
            cut_short += 1
            with pytest.raises(CheckpointError, match="delete them"):
                read_checkpoint(tmp_path / name, BACKEND)
            (tmp_path / name).unlink()
        assert os.listdir(tmp_path) == [path.name]
        if trial >= 8 and cut_short >= 3:
            break
    # the kills hit saves at work, and between them saves were finished
    assert cut_short
    assert len(seen) > 1


KILLED_AT = """
import os, signal, sys
import numpy as np
from tensormoe.checkpoint import save_checkpoint
function, place, path = sys.argv[1:]
original = getattr(os, function)
def killed(*arguments):
    if place == "after":
        original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, function, killed)
save_checkpoint(path, "MuMoE", {"version": 2}, {k: np.full(9, 2, np.float32) for k in "ab"})
"""


@posix
@pytest.mark.parametrize(
    ("function", "place", "version", "partial"),
    [("fsync", "before", 1, 1), ("replace", "before", 1, 1), ("replace", "after", 2, 0)],
)
def test_killed_at_each_step(
    tmp_path: Path, function: str, place: str, version: int, partial: int
) -> None:
    path = tmp_path / "a"
    save_version(path, 1, 9)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT, function, place, path],
        env=ENVIRONMENT,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert assert_one_whole_version(path, 9) == version
    assert len(leftovers(tmp_path)) == partial
    # another file's save leaves it alone, the next one of this file takes it away
    save_version(tmp_path / "b", 3, 9)
    assert len(leftovers(tmp_path)) == partial
    save_version(path, 3, 9)
    assert assert_one_whole_version(path, 9) == 3
    assert leftovers(tmp_path) == []


WAITING = """
import os, sys
import numpy as np
from tensormoe.checkpoint import save_checkpoint
fsync = os.fsync
def waiting(handle):
    print("writing", flush=True)
    sys.stdin.readline()
    fsync(handle)
os.fsync = waiting
save_checkpoint(sys.argv[1], "MuMoE", {"version": 2}, {k: np.full(9, 2, np.float32) for k in "ab"})
"""


@posix
def test_a_save_at_work_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    saver = subprocess.Popen(
        [sys.executable, "-c", WAITING, path],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with saver:
        assert saver.stdout is not None
        assert saver.stdin is not None
        assert saver.stdout.readline() == b"writing\n"
        (partial,) = leftovers(tmp_path)
        save_version(path, 1, 9)
        assert leftovers(tmp_path) == [partial]
        saver.stdin.write(b"\n" * 9)
        saver.stdin.close()
        assert saver.wait(60) == 0
    assert assert_one_whole_version(path, 9) == 2
    assert leftovers(tmp_path) == []

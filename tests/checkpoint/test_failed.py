"""A save that fails leaves the old file, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tensormoe.errors import CheckpointError
from tests._checkpoint_files import posix
from tests._python import run_python
from tests.checkpoint._versions import assert_one_whole_version, save_version

LIMITED = """
import resource, sys
import numpy as np
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(sys.argv[1], "MuMoE", {"version": 2}, {"a": np.ones(2**20)})
except CheckpointError as error:
    print(error)
"""


@posix
def test_no_room_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_version(path, 1, 9)
    done = run_python("-W", "error", "-c", LIMITED, path)
    assert "could not be written: File too large. What was there before is unchanged" in done.stdout
    assert not done.stderr
    assert assert_one_whole_version(path, 9) == 1
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save_version(path, 1, 9)

    def full(handle: int) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_version(path, 2, 9)
    monkeypatch.undo()
    assert assert_one_whole_version(path, 9) == 1
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, SystemExit])
def test_interrupted_saves_clean_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    interruption: type[BaseException],
) -> None:
    path = tmp_path / "a"
    save_version(path, 1, 9)

    def interrupted(*arguments: Any) -> None:
        raise interruption

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(interruption):
        save_version(path, 2, 9)
    monkeypatch.undo()
    assert assert_one_whole_version(path, 9) == 1
    assert os.listdir(tmp_path) == ["a"]


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            save_version(tmp_path / "a", 1, 9)
    finally:
        tmp_path.chmod(0o700)

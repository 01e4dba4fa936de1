"""Several threads or processes that save to one path."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests._python import ENVIRONMENT
from tests.checkpoint._versions import (
    ONE_SAVE_AFTER_ANOTHER,
    assert_one_whole_version,
    save_version,
)


def test_threads_that_save_to_one_path(tmp_path: Path) -> None:
    path, size = tmp_path / "a", 50_000
    save_version(path, 0, size)

    def save(version: int) -> None:
        save_version(path, version, size)

    def read(_: int) -> int:
        return assert_one_whole_version(path, size)

    with ThreadPoolExecutor(8) as pool:
        saves = [pool.submit(save, version) for version in range(1, 41)]
        reads = [pool.submit(read, count) for count in range(40)]
        for future in (*saves, *reads):
            future.result()
    assert assert_one_whole_version(path, size) in range(1, 41)
    assert os.listdir(tmp_path) == ["a"]


def test_processes_that_save_to_one_path(tmp_path: Path) -> None:
    path, size = tmp_path / "a", 50_000
    save_version(path, 0, size)
    savers = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_SAVE_AFTER_ANOTHER, path, str(10 * number), str(size)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
        )
        for number in (1, 2)
    ]
    try:
        for saver in savers:
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"ready\n"
        seen = set()
        deadline = time.monotonic() + 30
        while len({version // 10 for version in seen}) < 3 and time.monotonic() < deadline:
            seen.add(assert_one_whole_version(path, size))
            seen.add(0)
        assert all(saver.poll() is None for saver in savers), "a save failed"
    finally:
        for saver in savers:
            saver.kill()
            saver.communicate()
    assert {version // 10 for version in seen} == {0, 1, 2}

"""Checkpoints of which a reader can tell whether they are whole, and of which save."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tensormoe.checkpoint import read_checkpoint, save_checkpoint
from tensormoe_numpy import BACKEND

ONE_SAVE_AFTER_ANOTHER = """
import itertools, sys
import numpy as np
from tensormoe.checkpoint import save_checkpoint
path, first, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
versions = [np.full(size, first + k, dtype=np.float32) for k in range(4)]
for count in itertools.count():
    k = count % 4
    version = first + k
    save_checkpoint(path, "MuMoE", {"version": version}, {"a": versions[k], "b": versions[k]})
    if count == 0:  # all that is imported late has been
        print("ready", flush=True)
"""


def assert_one_whole_version(path: Path, size: int) -> int:
    loaded = read_checkpoint(path, BACKEND)
    version: int = loaded.config["version"]
    assert loaded.arrays.keys() == {"a", "b"}
    for array in loaded.arrays.values():
        np.testing.assert_array_equal(array, np.full(size, version, dtype=np.float32))
    return version


def save_version(path: Path, version: int, size: int) -> None:
    array = np.full(size, version, dtype=np.float32)
    save_checkpoint(path, "MuMoE", {"version": version}, {"a": array, "b": array})

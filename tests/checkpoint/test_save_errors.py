"""What can't be saved, which leaves the file as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import BackendError, CheckpointError
from tests._checkpoint_files import some_arrays

ZEROS = np.zeros(2)


def endless() -> dict[str, Any]:
    config: dict[str, Any] = {}
    config["again"] = config
    return config


BAD_CONFIGS = [
    (None, "config must be a mapping"),
    ([1], "config must be a mapping"),
    ({"a": {"b": [0, np.nan]}}, r"nan at config\['a'\]\['b'\]\[1\]"),
    ({"a": float("-inf")}, r"-inf at config\['a'\]"),
    ({"a": np.int64(3)}, r"np.int64\(3\) at config\['a'\]"),
    ({"a": (1, 2)}, r"\(1, 2\) at config\['a'\]"),
    ({"a": {1}}, r"\{1\} at config\['a'\]"),
    ({"a": 10**5000}, r"an int .* at config\['a'\]"),
    ({"a": "\ud800"}, "valid Unicode"),
    ({"a": {2: 3}}, r"keys must be strings; got 2 at config\['a'\]"),
    (endless(), "nested at most 32 deep"),
    ({"a": "x" * 2**23}, "must fit in a header of 8,388,608 bytes"),
]
BAD_ARRAYS = [
    ([ZEROS], CheckpointError, "arrays must be a mapping"),
    ({3: ZEROS}, CheckpointError, "non-empty strings .*; got 3"),
    ({"": ZEROS}, CheckpointError, "non-empty strings"),
    ({"\udc00": ZEROS}, CheckpointError, "valid Unicode"),
    ({"__metadata__": ZEROS}, CheckpointError, "other than '__metadata__'"),
    ({"x": np.zeros(2, complex)}, CheckpointError, "dtype must be one of .*; got 'complex128'"),
    ({"x": np.array([None])}, CheckpointError, "array 'x': dtype must be one of"),
    ({"x": np.array(["a"])}, CheckpointError, "array 'x': dtype must be one of"),
    ({"x": np.zeros((1,) * 40)}, CheckpointError, "array 'x': shape must hold at most 32"),
    ({"x": [1.0]}, BackendError, r"array 'x': arrays must come from one of .*builtins\.list"),
    ({"x": ZEROS, "y": 1.0}, BackendError, r"'y' must be an array of numpy; got builtins\.float"),
    ({"x": np.ma.masked_array([1.0], mask=[True])}, BackendError, "'x': arrays must be plain"),
    (
        {"x": ZEROS, "y": np.ones((1, 1)).view(np.matrix)},
        BackendError,
        "must be a plain, dense array",
    ),
]


@pytest.mark.parametrize(
    ("block", "config", "arrays", "error", "rule"),
    [
        *((block, {}, {}, CheckpointError, "class name") for block in (None, "", "os.system")),
        *(("MuMoE", config, {"x": ZEROS}, CheckpointError, rule) for config, rule in BAD_CONFIGS),
        *(("MuMoE", {}, arrays, error, rule) for arrays, error, rule in BAD_ARRAYS),
    ],
)
def test_what_cannot_be_saved(
    tmp_path: Path, block: Any, config: Any, arrays: Any, error: type[Exception], rule: str
) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, "MuMoE", {}, some_arrays())
    before = path.read_bytes()
    with pytest.raises(error, match=rule):
        save_checkpoint(path, block, config, arrays)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]

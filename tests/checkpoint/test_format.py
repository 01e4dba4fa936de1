"""The bytes of a file: always the same, aligned, and those of the safetensors package."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from tensormoe.checkpoint import ArrayInfo, peek_checkpoint, read_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError
from tensormoe_numpy import BACKEND
from tests._checkpoint_files import CONFIG, METADATA, equal, f32, raw_file, some_arrays
from tests._python import run_python


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    forward = some_arrays()
    backward = dict(reversed(forward.items()))
    save_checkpoint(tmp_path / "a", "MuMoE", {"x": 1, "y": 2}, forward)
    save_checkpoint(tmp_path / "b", "MuMoE", {"y": 2, "x": 1}, backward)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_lie_aligned(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "MuMoE", CONFIG, some_arrays())
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    assert entries.pop("__metadata__") == {
        **METADATA,
        "config": json.dumps(CONFIG, ensure_ascii=False, separators=(",", ":"), sort_keys=True),
    }
    for name, entry in entries.items():
        assert (8 + length + entry["data_offsets"][0]) % some_arrays()[name].itemsize == 0


def test_files_of_the_safetensors_package_load(tmp_path: Path) -> None:
    metadata = {**METADATA, "config": json.dumps(CONFIG), "note": "more keys do no harm"}
    safetensors.numpy.save_file(some_arrays(), tmp_path / "a", metadata=metadata)
    loaded = read_checkpoint(tmp_path / "a", BACKEND)
    assert loaded.config == CONFIG
    assert equal(loaded.arrays, some_arrays())


class RawBackend(type(BACKEND)):  # type: ignore[misc]
    """Gives what it was handed, as a library with other dtypes would."""

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Any:
        return dtype, shape, data


def test_bfloat16_reaches_a_backend_that_has_it(tmp_path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    (tmp_path / "a").write_bytes(raw_file({"x": entry}, b"\x80\x3f\x00\x40"))
    assert peek_checkpoint(tmp_path / "a").arrays["x"] == ArrayInfo("bfloat16", (2,))
    found = read_checkpoint(tmp_path / "a", RawBackend()).arrays["x"]
    assert found == ("bfloat16", (2,), b"\x80\x3f\x00\x40")


def test_white_space_before_the_header(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": METADATA, "x": f32(0, 8, [2])})
    content = raw_file(b" \t\r\n" + header.encode(), bytes(8))
    assert dict(safetensors.deserialize(content))["x"]["shape"] == [2]
    (tmp_path / "a").write_bytes(content)
    assert read_checkpoint(tmp_path / "a", BACKEND).arrays["x"].shape == (2,)


def test_bfloat16_is_an_error_where_numpy_lacks_it(tmp_path: Path) -> None:
    if "ml_dtypes" in sys.modules:
        pytest.skip("NumPy has bfloat16 in this process")
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    (tmp_path / "a").write_bytes(raw_file({"x": entry}, bytes(4)))
    with pytest.raises(CheckpointError, match=r"numpy backend can't make .*'x' of bfloat16"):
        read_checkpoint(tmp_path / "a", BACKEND)


@pytest.mark.skipif(find_spec("ml_dtypes") is None, reason="ml_dtypes is not installed")
def test_bfloat16_of_ml_dtypes(tmp_path: Path) -> None:
    script = """
import sys, ml_dtypes, numpy as np
from tensormoe_numpy import BACKEND
from tensormoe.checkpoint import read_checkpoint, save_checkpoint
array = np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16)
save_checkpoint(sys.argv[1], "MuMoE", {}, {"x": array})
found = read_checkpoint(sys.argv[1], BACKEND).arrays["x"]
assert found.dtype == array.dtype and (found == array).all()
"""
    done = run_python("-c", script, tmp_path / "a")
    assert done.returncode == 0, done.stderr


def test_the_core_alone_looks_inside(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "MuMoE", CONFIG, some_arrays())
    script = """
import sys
from tensormoe.checkpoint import peek_checkpoint
print(peek_checkpoint(sys.argv[1]).arrays["factors.input"].shape)
assert "numpy" not in sys.modules
"""
    done = run_python("-c", script, tmp_path / "a")
    assert done.stdout == "(3, 4)\n", done.stderr

"""Files that are checkpoints of a block and parts of a larger model at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tensormoe.checkpoint import ArrayInfo, peek_checkpoint, read_checkpoint
from tensormoe.checkpoint._format import CheckpointHeader, encode_header
from tensormoe.errors import CheckpointError
from tensormoe_numpy import BACKEND

ARRAYS = {"factors.input": ArrayInfo("float64", (3, 2)), "factors.output": ArrayInfo("float64", ())}


def write(path: Path, prefix: str) -> None:
    header = CheckpointHeader("MuMoE", {"rank": 2}, ARRAYS, prefix=prefix)
    path.write_bytes(encode_header(header) + np.arange(7.0).tobytes())


def test_our_reader_takes_the_prefix_away(tmp_path: Path) -> None:
    write(tmp_path / "plain", "")
    write(tmp_path / "part", "layers.0.experts.")
    plain, part = (read_checkpoint(tmp_path / name, BACKEND) for name in ("plain", "part"))
    assert part.config == plain.config
    assert list(part.arrays) == list(plain.arrays) == list(ARRAYS)
    assert all(np.array_equal(part.arrays[name], plain.arrays[name]) for name in ARRAYS)
    assert peek_checkpoint(tmp_path / "part").prefix == "layers.0.experts."
    # and others see it
    assert set(load_file(tmp_path / "part")) == {f"layers.0.experts.{name}" for name in ARRAYS}


def test_names_without_the_prefix(tmp_path: Path) -> None:
    write(tmp_path / "part", "layers.0.")
    data = (tmp_path / "part").read_bytes()
    (tmp_path / "damaged").write_bytes(data.replace(b'"layers.0.factors.i', b'"layers.1.factors.i'))
    with pytest.raises(CheckpointError, match=r"prefix 'layers\.0\.'; got 'layers\.1\.factors"):
        peek_checkpoint(tmp_path / "damaged")

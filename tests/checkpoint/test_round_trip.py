"""What is saved is what is loaded."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensormoe.checkpoint import ArrayInfo, peek_checkpoint, read_checkpoint, save_checkpoint
from tensormoe_numpy import BACKEND
from tests._checkpoint_files import equal, names, plain

DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
DTYPES += ("float16", "float32", "float64")
arrays = st.dictionaries(
    names,
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    ),
    max_size=5,
)
configs = st.dictionaries(st.text("abμ."), plain, max_size=4)


@given(arrays=arrays, config=configs)
def test_round_trip(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "block.safetensors")
        save_checkpoint(path, "MuMoEMLP", config, arrays)
        loaded = read_checkpoint(path, BACKEND)
        header = peek_checkpoint(path)
        judged = safetensors.numpy.load_file(path)
    assert (loaded.block, loaded.config, loaded.version) == ("MuMoEMLP", config, 1)
    assert json.dumps(loaded.config, sort_keys=True) == json.dumps(config, sort_keys=True)
    assert equal(loaded.arrays, arrays)
    assert equal(judged, arrays)
    assert (header.block, header.config, header.version) == ("MuMoEMLP", config, 1)
    assert header.arrays == {
        name: ArrayInfo(array.dtype.name, array.shape) for name, array in arrays.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3)])
def test_dtypes_and_shapes(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    save_checkpoint(tmp_path / "a", "MuMoE", {}, {"x": array})
    found = read_checkpoint(tmp_path / "a", BACKEND).arrays["x"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array, strict=True)


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    array = np.array([np.nan, -0.0, np.inf, 5e-324, -np.nan])
    save_checkpoint(tmp_path / "a", "MuMoE", {}, {"x": array})
    assert read_checkpoint(tmp_path / "a", BACKEND).arrays["x"].tobytes() == array.tobytes()


def test_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(3, 4)
    kinds = {
        "fortran": np.asfortranarray(array),
        "strided": np.repeat(array, 2, axis=1)[:, ::2],
        "big_endian": array.astype(">f8"),
    }
    save_checkpoint(tmp_path / "a", "MuMoE", {}, kinds)
    for found in read_checkpoint(tmp_path / "a", BACKEND).arrays.values():
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, array)


def test_loaded_arrays_are_writable(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "MuMoE", {}, {"x": np.zeros(3)})
    read_checkpoint(tmp_path / "a", BACKEND).arrays["x"] += 1


def test_a_save_holds_one_array_at_a_time(tmp_path: Path) -> None:
    arrays = {f"a{place}": np.full(2**19, place, "float32") for place in range(8)}
    tracemalloc.start()
    try:
        save_checkpoint(tmp_path / "some", "MuMoE", {}, arrays)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * arrays["a0"].nbytes

"""Checkpoints: what goes in comes out, whatever happens to the file or to the process."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensormoe.checkpoint import (
    PARTIAL_SUFFIX,
    ArrayInfo,
    Checkpoint,
    match_arrays,
    peek_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tensormoe.errors import BackendError, CheckpointError
from tensormoe_numpy import BACKEND

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
    "OMP_NUM_THREADS": "1",
}
DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
DTYPES += ("float16", "float32", "float64")
CONFIG = {
    "spec": {"in_features": 3, "experts": [4, 2], "rank": None, "bias": True},
    "gate": {"alpha": 1.5, "name": "entmax-μ"},
}
METADATA = {"format": "tensormoe", "version": "1", "block": "MuMoE", "config": "{}"}
posix = pytest.mark.skipif(os.name != "posix", reason="uses POSIX signals and file types")


def some_arrays() -> dict[str, np.ndarray]:
    return {
        "factors.input": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "factors.bias": np.arange(5, dtype=np.float16),
        "gate.running_mean_0": np.array(2.5),
        "gate.count": np.array(7, dtype=np.int64),
    }


def raw_file(
    entries: Mapping[str, Any] | str | bytes,
    data: bytes = b"",
    metadata: Mapping[str, Any] | None = METADATA,
) -> bytes:
    """A file with a header of our choosing, sound or not."""
    if isinstance(entries, Mapping):
        whole = {**({} if metadata is None else {"__metadata__": metadata}), **entries}
        entries = json.dumps(whole)
    text = entries if isinstance(entries, bytes) else entries.encode()
    return len(text).to_bytes(8, "little") + text + data


def f32(begin: int, end: int, shape: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def equal(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    """Bits, dtypes, shapes and names; not their order."""
    return left.keys() == right.keys() and all(
        BACKEND.to_bytes(left[name]) == BACKEND.to_bytes(right[name]) for name in left
    )


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(PARTIAL_SUFFIX)]


# What goes in comes out.

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
arrays = st.dictionaries(
    names,
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    ),
    max_size=5,
)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abμ."), inner, max_size=3),
    max_leaves=8,
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
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a"], env=ENVIRONMENT, check=True, timeout=60
    )


def test_the_core_alone_looks_inside(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "MuMoE", CONFIG, some_arrays())
    script = """
import sys
from tensormoe.checkpoint import peek_checkpoint
print(peek_checkpoint(sys.argv[1]).arrays["factors.input"].shape)
assert "numpy" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a"],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "(3, 4)\n"


# Paths.


@pytest.mark.parametrize("name", ["μMoE – 专家.safetensors", "a b", "x" * 250])
def test_unusual_names(tmp_path: Path, name: str) -> None:
    save_checkpoint(str(tmp_path / name), "MuMoE", {}, some_arrays())
    assert equal(read_checkpoint(tmp_path / name, BACKEND).arrays, some_arrays())
    assert os.listdir(tmp_path) == [name]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a", "MuMoE", {}, some_arrays())
    assert equal(read_checkpoint("a", BACKEND).arrays, some_arrays())


@posix
def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    save_checkpoint(link, "MuMoE", {}, {"x": np.zeros(2)})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    save_checkpoint(link, "MuMoE", {}, {"x": np.ones(2)})
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert read_checkpoint(target, BACKEND).arrays["x"].sum() == 2


@pytest.mark.parametrize("path", [None, 3, b"bytes", ["a"]], ids=repr)
def test_no_path(path: Any) -> None:
    for call in (
        lambda: save_checkpoint(path, "MuMoE", {}, {}),
        lambda: read_checkpoint(path, BACKEND),
        lambda: peek_checkpoint(path),
    ):
        with pytest.raises(TypeError, match=r"path must be a str or an os\.PathLike of str; got"):
            call()


def make_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


@posix
@pytest.mark.parametrize(
    ("place", "rule"),
    [
        (lambda folder: str(folder), "is a folder"),
        (lambda folder: "", "is a folder|there is none"),
        (lambda folder: os.devnull, "is a device"),
        (make_pipe, "is a device, pipe or socket"),
        (lambda folder: str(folder / f"a{PARTIAL_SUFFIX}"), "must not end in"),
        (lambda folder: "a\0b", "null character"),
        (lambda folder: str(folder / "no" / "a"), "must exist|there is none"),
        (lambda folder: str(folder / ("x" * 300)), "too long"),
    ],
)
def test_places_where_no_checkpoint_is(
    tmp_path: Path, place: Callable[[Path], str], rule: str
) -> None:
    path = place(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=rule):
        save_checkpoint(path, "MuMoE", {}, some_arrays())
    with pytest.raises(CheckpointError, match=rule):
        read_checkpoint(path, BACKEND)
    assert sorted(os.listdir(tmp_path)) == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must name an existing checkpoint; there is none"):
        read_checkpoint(tmp_path / "a", BACKEND)


# What can't be saved.

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
    (
        {"x": np.zeros(2, complex)},
        CheckpointError,
        "dtype must be one of .*; got 'complex128'",
    ),
    ({"x": np.array([None])}, CheckpointError, "array 'x': dtype must be one of"),
    ({"x": np.array(["a"])}, CheckpointError, "array 'x': dtype must be one of"),
    ({"x": np.zeros((1,) * 40)}, CheckpointError, "array 'x': shape must hold at most 32"),
    ({"x": [1.0]}, BackendError, r"builtins\.list for 'x'"),
    ({"x": ZEROS, "y": 1.0}, BackendError, r"numpy\.ndarray for 'x' and builtins\.float for 'y'"),
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


# What can't be read.

ONE = raw_file({"x": f32(0, 8, [2])}, bytes(8))
DEEP = 100_000
NAMELESS = json.dumps({"__metadata__": METADATA, "": f32(0, 0, [0])})

BAD_LENGTHS = {
    "empty": (b"", "must lie within the file"),
    "cut in the length": (b"\x02\0\0", "must lie within the file"),
    "cut in the header": (ONE[:50], "must lie within the file"),
    "cut in the data": (ONE[:-1], "take 8 bytes; the file holds 7"),
    "bytes at the end": (ONE + b"x", "take 8 bytes; the file holds 9"),
    "length beyond the file": (b"\xff" * 8 + b"{}", "must lie within the file"),
    "a zip file": (b"PK\3\4" + bytes(100), "must begin with|within the file"),
    "a pickle": (b"\x80\4\x95" + bytes(100), "must begin with|within the file"),
}
BAD_HEADERS = {
    "none": ("", "must begin with"),
    "blank before it": (" {}", "must begin with"),
    "a list": ("[]", "must begin with"),
    "half": ("{", "header must be JSON"),
    "two": ("{} {}", "header must be JSON"),
    "no UTF-8": (b'{"\xff":1}', "header must be JSON"),
    "UTF-16": ("{}".encode("utf-16-le"), "header must be JSON"),
    "long integer": ('{"a":' + "9" * 5000 + "}", "header must be JSON"),
    "deep objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "too deeply"),
    "deep list": ('{"a":' + "[" * DEEP + "}", "too deeply"),
    "name twice": ('{"a":1,"b":2,"a":3}', "'a' stands 2 times"),
    "huge": ("{" + " " * 2**23 + "}", "at most 8,388,608"),
    "metadata is a list": ('{"__metadata__":[]}', "metadata must be strings"),
    "empty name": (NAMELESS, "non-empty strings"),
}
BAD_METADATA = {
    "none": (None, "another program"),
    "of another program": ({"format": "pt"}, "got 'pt'.*another program"),
    "no version": ({"format": "tensormoe"}, "got None"),
    "version is a number": ({**METADATA, "version": 1}, "must be strings"),
    "fractional version": ({**METADATA, "version": "1.0"}, "positive integer; got '1.0'"),
    "negative version": ({**METADATA, "version": "-1"}, "positive integer"),
    "long version": ({**METADATA, "version": "9" * 5000}, "positive integer"),
    "newer version": ({**METADATA, "version": "2"}, "at most 1; got 2.*update"),
    "no block": ({k: v for k, v in METADATA.items() if k != "block"}, "'block' is missing"),
    "no config": ({k: v for k, v in METADATA.items() if k != "config"}, "'config' is missing"),
    "bad block": ({**METADATA, "block": "a b"}, "block must be a class name"),
}
BAD_CONFIG_TEXTS = {
    "empty": ("", "config must be JSON"),
    "a list": ("[1]", "config must be a JSON object"),
    "NaN": ('{"a":NaN}', r"nan at config\['a'\]"),
    "overflow": ('{"a":1e999}', r"inf at config\['a'\]"),
    "surrogate": ('{"a":"\ud800"}', "config must be JSON"),
    "escaped surrogate": (r'{"a":"\ud800"}', "valid Unicode"),
    "key twice": ('{"a":1,"a":2}', "must be unique in config"),
    "nested": ('{"a":' + "[" * 40 + "]" * 40 + "}", "at most 32 deep"),
    "deep": ("[" * DEEP, "too deeply"),
}
# one array, in a file of eight bytes of data
BAD_ENTRIES = {
    "a number": (3, "exactly dtype, shape and data_offsets; got 3 for 'x'"),
    "no offsets": ({"dtype": "F32", "shape": []}, "exactly dtype, shape and data_offsets"),
    "unknown dtype": ({**f32(0, 8, [2]), "dtype": "F4"}, "one of .*; got 'F4' for 'x'"),
    "dtype is a list": ({**f32(0, 8, [2]), "dtype": ["F32"]}, "dtype must be one of"),
    "shape is a string": (f32(0, 8, "2"), "shape must be a list; got '2' for 'x'"),
    "shape of floats": (f32(0, 8, [2.0]), "array 'x': .*non-negative integers"),
    "shape of booleans": (f32(0, 4, [True]), "non-negative integers"),
    "negative shape": (f32(0, 8, [-2, -1]), "non-negative integers"),
    "empty but huge": (f32(0, 0, [0, 2**62, 4]), r"fewer than 2\*\*63 bytes"),
    "a thousand axes": (f32(0, 4, [1] * 1000), "at most 32"),
    "shape against bytes": (f32(0, 8, [3]), r"span the 12 bytes of float32 \(3,\)"),
    "dtype against bytes": ({**f32(0, 8, [2]), "dtype": "F64"}, "span the 16 bytes"),
    "one offset": ({**f32(0, 8, [2]), "data_offsets": [0]}, "two non-negative"),
    "offsets are a string": ({**f32(0, 8, [2]), "data_offsets": "08"}, "two non-negative"),
    "negative offset": (f32(-8, 0, [2]), "two non-negative"),
    "offsets swapped": (f32(8, 0, [2]), "must span"),
    "beyond the file": (f32(0, 2**40, [2**38]), "the file holds 8"),
    "hole before": (f32(4, 8, [1]), "begins at byte 4 where 0"),
    "hole after": (f32(0, 4, [1]), "take 4 bytes; the file holds 8"),
}
BAD_PAIRS = {
    "overlap": ((f32(0, 8, [2]), f32(4, 12, [2])), "'y' begins at byte 4 where 8 was due"),
    "the same bytes": ((f32(0, 8, [2]), f32(0, 8, [2])), "'y' begins at byte 0 where 8 was due"),
    "hole between": ((f32(0, 4, [1]), f32(8, 12, [1])), "'y' begins at byte 8 where 4 was due"),
}


def unreadable() -> Iterator[Any]:
    """(content of a file, rule that it breaks)."""
    for name, (content, rule) in BAD_LENGTHS.items():
        yield pytest.param(content, rule, id=f"file: {name}")
    for name, (text, rule) in BAD_HEADERS.items():
        yield pytest.param(raw_file(text), rule, id=f"header: {name}")
    for name, (metadata, rule) in BAD_METADATA.items():
        yield pytest.param(raw_file({}, metadata=metadata), rule, id=f"metadata: {name}")
    for name, (text, rule) in BAD_CONFIG_TEXTS.items():
        content = raw_file({}, metadata={**METADATA, "config": text})
        yield pytest.param(content, rule, id=f"config: {name}")
    for name, (entry, rule) in BAD_ENTRIES.items():
        yield pytest.param(raw_file({"x": entry}, bytes(8)), rule, id=f"entry: {name}")
    for name, ((x, y), rule) in BAD_PAIRS.items():
        yield pytest.param(raw_file({"x": x, "y": y}, bytes(12)), rule, id=f"entries: {name}")
    yield pytest.param(raw_file({"\ud800": f32(0, 0, [0])}), "valid Unicode", id="surrogate name")


@pytest.mark.parametrize(("content", "rule"), list(unreadable()))
def test_what_cannot_be_read(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rule) as peeked:
            peek_checkpoint(path)
        with pytest.raises(CheckpointError, match=rule):
            read_checkpoint(path, BACKEND)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(peeked.value)
    assert str(path) in message
    assert len(message) < 1000
    message.encode()  # can be printed
    assert peak < 2**20 + 40 * len(content)


def test_a_header_of_a_million_equal_names_is_refused_quickly(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(raw_file("{" + ",".join(['"a":1'] * 1_000_000) + "}"))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="stands 1000000 times"):
        peek_checkpoint(tmp_path / "a")
    assert time.perf_counter() - start < 20


def test_no_backend(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"must be a tensormoe\.backend\.Backend; got"):
        read_checkpoint(tmp_path / "a", "numpy")  # type: ignore[arg-type]


def valid_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        save_checkpoint(path, "MuMoE", CONFIG, some_arrays())
        return path.read_bytes()


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` with some bytes changed, dropped, doubled or cut off, mostly in its header."""
    header = 8 + int.from_bytes(content[:8], "little")
    places = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
    token = st.binary(min_size=1, max_size=3) | st.sampled_from(
        [b'"', b"{", b"}", b"[", b"]", b",", b"0", b"-", b"9", b"1e9", b"null", b"\\u", b"\xed\xa0"]
    )
    edit = st.tuples(st.sampled_from(["put", "insert", "drop", "cut", "double"]), places, token)

    def apply(edits: list[tuple[str, int, bytes]]) -> bytes:
        damaged = content
        for kind, place, new in edits:
            before, after = damaged[:place], damaged[place:]
            damaged = {
                "put": before + new + after[len(new) :],
                "insert": before + new + after,
                "drop": before + after[len(new) :],
                "cut": before,
                "double": before + after[: 8 * len(new)] + after,
            }[kind]
        return damaged

    def resize(damaged: bytes) -> bytes:
        # as an attacker would: the length fits the header again, so that the JSON is reached
        length = len(damaged) - (len(content) - header) - 8
        return max(length, 0).to_bytes(8, "little") + damaged[8:]

    edited = st.lists(edit, min_size=1, max_size=4).map(apply)
    return edited | edited.map(resize)


@st.composite
def forged_files(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with values of its header replaced, removed or added: always sound JSON."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    numbers = st.integers(-1, 20) | st.sampled_from([48, 56, 2**31, 2**53, 2**63, 2**64, 10**30])
    values = plain | numbers | st.lists(numbers, max_size=3) | st.sampled_from(["F16", "I8", "2"])
    for _ in range(draw(st.integers(1, 3))):
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or draw(st.booleans()):
                match draw(st.sampled_from(["replace", "remove", "add"])):
                    case "replace":
                        node[key] = draw(values)
                    case "remove":
                        del node[key]
                    case _ if isinstance(node, dict):
                        node[draw(names)] = draw(values)
                    case _:
                        node.append(draw(values))
                break
            node = node[key]
    return raw_file(json.dumps(header), content[start:])


@settings(max_examples=2000)
@given(content=st.deferred(lambda: damaged_bytes(valid_file()) | forged_files(valid_file())))
def test_damaged_files_load_or_say_why(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        path.write_bytes(content)
        loaded, message = None, ""
        try:
            loaded = read_checkpoint(path, BACKEND)
        except CheckpointError as error:
            message = str(error)
    event("loaded" if loaded else "refused: " + message.partition(": ")[2][:24])
    if loaded is None:
        assert str(path) in message
        message.encode()  # can be printed
        return
    assert isinstance(loaded, Checkpoint)
    # never laxer than the format's own reader, which must find the same arrays
    judged = dict(safetensors.deserialize(content))
    assert judged.keys() == loaded.arrays.keys()
    for name, array in loaded.arrays.items():
        assert tuple(judged[name]["shape"]) == array.shape
        assert bytes(judged[name]["data"]) == array.tobytes()


# A save that is killed, or that fails.

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
    [
        ("fsync", "before", 1, 1),
        ("replace", "before", 1, 1),
        ("replace", "after", 2, 0),
    ],
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
    # a later save isn't hindered by what was left
    save_version(path, 3, 9)
    assert assert_one_whole_version(path, 9) == 3


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
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, path],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
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


# Several at once.


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


# How arrays fit a block.


def test_match_of_equal_names_and_shapes() -> None:
    found = some_arrays()
    match = match_arrays({name: array.shape for name, array in found.items()}, found)
    assert match.exact
    assert match.describe() == ""
    assert all(match.arrays[name] is array for name, array in found.items())


def test_strict_match_lists_every_difference() -> None:
    expected = {"a": (2,), "b": (3, 4), "c": (), "d": (5,)}
    found = {"a": np.zeros(2), "b": np.zeros((4, 3)), "d": np.zeros((5, 1)), "e": np.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        match_arrays(expected, found)
    assert str(caught.value).splitlines()[1:] == [
        "'c' () is missing",
        "'e' (1,) is unexpected",
        "'b' must have the shape (3, 4); got (4, 3)",
        "'d' must have the shape (5,); got (5, 1)",
    ]
    match = match_arrays(expected, found, strict=False)
    assert not match.exact
    assert list(match.arrays) == ["a"]
    assert match.arrays["a"] is found["a"]
    assert match.missing == {"c": ()}
    assert match.unexpected == {"e": (1,)}
    assert match.mismatched == {"b": ((3, 4), (4, 3)), "d": ((5,), (5, 1))}
    assert str(caught.value).endswith(match.describe())


def test_match_before_loading(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "MuMoE", {}, some_arrays())
    header = peek_checkpoint(tmp_path / "a")
    shapes = {name: array.shape for name, array in some_arrays().items()}
    assert match_arrays(shapes, header.arrays).exact

"""What can't be read is refused for a reason, at once and in little memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensormoe.checkpoint import peek_checkpoint, read_checkpoint
from tensormoe.errors import BackendError, CheckpointError
from tensormoe_numpy import BACKEND
from tests._checkpoint_files import METADATA, f32, raw_file

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
    "a blank that JSON does not know": ("\v{}", "must begin with"),
    "a list": ("[]", "must begin with"),
    "half": ("{", "header must be JSON"),
    "two": ("{} {}", "header must be JSON"),
    "no UTF-8": (b'{"\xff":1}', "header must be JSON"),
    "UTF-16": ("{}".encode("utf-16-le"), "header must be JSON"),
    "long integer": ('{"a":' + "9" * 5000 + "}", "header must be JSON"),
    "deep objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "too deeply"),
    "deep list": ('{"a":' + "[" * DEEP + "}", "too deeply"),
    "name twice": ('{"a":1,"b":2,"a":3}', "'a' occurs 2 times"),
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
    "newer version": ({**METADATA, "version": "3"}, "at most 2; got 3.*update"),
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
    with pytest.raises(CheckpointError, match="occurs 1000000 times"):
        peek_checkpoint(tmp_path / "a")
    assert time.perf_counter() - start < 20


def test_no_backend(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"must be a tensormoe\.backend\.Backend; got"):
        read_checkpoint(tmp_path / "a", "numpy")  # type: ignore[arg-type]

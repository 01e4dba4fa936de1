"""The bytes of a checkpoint's header, checked in both directions.

The layout is safetensors' own: eight bytes of header length, a JSON header, then the arrays end to
end. It is written and read here, without the package of that name, because its functions that need
no framework take raw memory addresses (from 0.8 on) and give no metadata back. Files pass between
the two unchanged, and a checkpoint needs no package beyond the core.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from tensormoe.errors import CheckpointError

__all__ = [
    "DAMAGED",
    "FORMAT",
    "MAX_HEADER_BYTES",
    "SCHEMA_VERSION",
    "ArrayInfo",
    "CheckpointHeader",
    "brief",
    "encode_header",
    "file_order",
    "parse_header",
]

FORMAT = "tensormoe"
SCHEMA_VERSION = 1
DAMAGED = "The file is damaged or no safetensors file: restore it from a copy."
# room for more than 50,000 arrays; JSON takes some twenty times its length once it is parsed
MAX_HEADER_BYTES = 8 * 1024 * 1024

_METADATA = "__metadata__"
_MAX_DEPTH = 32
_MAX_BYTES = 2**63 - 1
_MAX_AXES = 32  # the least that any array library admits

# canonical dtype name -> (safetensors code, bytes an entry); all readers of the format know these
_DTYPES = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}
_NAMES = {code: name for name, (code, _) in _DTYPES.items()}


@dataclass(frozen=True)
class ArrayInfo:
    """What a header says of one array.

    Args:
        dtype: canonical name, e.g. ``"float32"`` or ``"bfloat16"``.
        shape: the length of each axis; ``()`` for a scalar.

    Raises:
        CheckpointError: a dtype that the format doesn't have, or a shape that no array can have.

    >>> ArrayInfo("float16", (3, 4)).nbytes
    24
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"dtype must be one of {', '.join(_DTYPES)}; got {brief(self.dtype)}. "
                "Convert the array to one of these."
            )
        # products over the axes that aren't empty: libraries refuse more even for empty arrays
        axes_fit = len(self.shape) <= _MAX_AXES and all(map(_is_length, self.shape))
        if not axes_fit or self.itemsize * math.prod(filter(None, self.shape)) > _MAX_BYTES:
            raise CheckpointError(
                f"shape must hold at most {_MAX_AXES} non-negative integers, for fewer than 2**63 "
                f"bytes; got {brief(self.shape)}."
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one entry."""
        return _DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointHeader:
    """Everything in a checkpoint but the values of its arrays.

    Args:
        block: class name of the block that was saved, e.g. ``"MuMoE"``.
        config: the values that rebuild the block, as JSON knows them.
        arrays: dtype and shape of each array by name.
        version: schema version of the file.

    Raises:
        CheckpointError: a block, a config or a name that no checkpoint can have.
    """

    block: str
    config: Mapping[str, Any]
    arrays: Mapping[str, ArrayInfo]
    version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.block, str) or not self.block.isidentifier():
            raise CheckpointError(
                f"block must be a class name such as 'MuMoE'; got {brief(self.block)}."
            )
        if not isinstance(self.config, Mapping):
            raise CheckpointError(
                f"config must be a mapping of plain values; got {brief(self.config)}. "
                "Pass what to_dict() gives."
            )
        _check_plain(dict(self.config), "config", 0)
        for name in self.arrays:
            if not _is_text(name) or name in ("", _METADATA):
                raise CheckpointError(
                    "names of arrays must be non-empty strings of valid Unicode other than "
                    f"{_METADATA!r}; got {brief(name)}. Name arrays such as 'factors.input'."
                )


def encode_header(header: CheckpointHeader) -> bytes:
    """The first part of a file: eight bytes of length and the header, padded to eight bytes.

    Raises:
        CheckpointError: the header is longer than readers accept.
    """
    config = _canonical_json(header.config)
    entries: dict[str, Any] = {
        _METADATA: {
            "format": FORMAT,
            "version": str(header.version),
            "block": header.block,
            "config": config,
        }
    }
    begin = 0
    for name in file_order(header.arrays):
        info = header.arrays[name]
        end = begin + info.nbytes
        entries[name] = {
            "dtype": _DTYPES[info.dtype][0],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = _canonical_json(entries).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"names and config must fit in a header of {MAX_HEADER_BYTES:,} bytes; they take "
            f"{len(text):,}. Keep large values in arrays, and large blocks in several checkpoints."
        )
    return len(text).to_bytes(8, "little") + text


def file_order(arrays: Mapping[str, ArrayInfo]) -> list[str]:
    """Names in the order of the file: wide entries first, so that every array lies aligned."""
    return sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))


def parse_header(text: bytes, data_bytes: int) -> CheckpointHeader:
    """What :func:`encode_header` wrote, arrays in the order of the file; trusts nothing.

    Args:
        text: the header without the eight bytes of its length.
        data_bytes: how many bytes follow the header in the file.

    Raises:
        CheckpointError: whatever is wrong with it.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"a header must begin with '{{'; got {brief(text)}. {DAMAGED}")
    entries = _parse_json(text, "the header")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"metadata must be strings by name; got {brief(metadata)}. {DAMAGED}")
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"the format in the header must be {FORMAT!r}; got {brief(metadata.get('format'))}. "
            "The file was written by another program: read it with that program's own reader and "
            "save the arrays with save_checkpoint."
        )
    version = _parse_version(metadata.get("version"))
    missing = [key for key in ("block", "config") if key not in metadata]
    if missing:
        raise CheckpointError(
            f"metadata must have 'block' and 'config'; {missing[0]!r} is missing. {DAMAGED}"
        )
    arrays = _parse_arrays(entries, data_bytes)
    config = _parse_json(metadata["config"].encode("utf-8", "surrogatepass"), "config")
    return CheckpointHeader(metadata["block"], config, arrays, version)


def brief(value: Any) -> str:
    """``repr`` of a value that may be huge or nested without end."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    try:
        return shortener.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"an {type(value).__name__} too long to print"


def _parse_version(text: str | None) -> int:
    if text is None or not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise CheckpointError(
            f"the schema version must be a positive integer; got {brief(text)}. {DAMAGED}"
        )
    version = int(text)
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"the schema version must be at most {SCHEMA_VERSION}; got {version}. The file was "
            "written by a newer tensormoe: update with pip install --upgrade tensormoe."
        )
    return version


def _parse_arrays(entries: Mapping[str, Any], data_bytes: int) -> dict[str, ArrayInfo]:
    placed: list[tuple[int, int, str, ArrayInfo]] = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(
                "an array must have exactly dtype, shape and data_offsets; got "
                f"{brief(entry)} for {brief(name)}. {DAMAGED}"
            )
        offsets, shape, code = entry["data_offsets"], entry["shape"], entry["dtype"]
        if not _is_lengths(offsets) or len(offsets) != 2:
            raise CheckpointError(
                f"data_offsets must be two non-negative integers; got {brief(offsets)} for "
                f"{brief(name)}. {DAMAGED}"
            )
        if not isinstance(shape, list):
            raise CheckpointError(
                f"shape must be a list; got {brief(shape)} for {brief(name)}. {DAMAGED}"
            )
        if not isinstance(code, str) or code not in _NAMES:
            raise CheckpointError(
                f"dtype must be one of {', '.join(_NAMES)}; got {brief(code)} for {brief(name)}. "
                "Save the array in one of these."
            )
        try:
            info = ArrayInfo(_NAMES[code], tuple(shape))
        except CheckpointError as error:
            raise CheckpointError(f"array {brief(name)}: {error} {DAMAGED}") from None
        begin, end = offsets
        if end - begin != info.nbytes:
            raise CheckpointError(
                f"data_offsets must span the {info.nbytes} bytes of {info.dtype} "
                f"{brief(info.shape)}; got {offsets} for {brief(name)}. {DAMAGED}"
            )
        placed.append((begin, end, name, info))
    placed.sort(key=lambda item: item[:2])
    reached = 0
    for begin, end, name, _ in placed:
        if begin != reached:
            raise CheckpointError(
                f"arrays must lie end to end; {brief(name)} begins at byte {begin} where "
                f"{reached} was due. {DAMAGED}"
            )
        reached = end
    if reached != data_bytes:
        raise CheckpointError(
            f"the arrays take {reached} bytes; the file holds {data_bytes} after the header. "
            f"It is cut short or has foreign bytes at its end. {DAMAGED}"
        )
    return {name: info for _, _, name, info in placed}


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(
                f"names must be unique in {what}; {brief(name)} stands {times} times. {DAMAGED}"
            )
        return found

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply to be read. {DAMAGED}") from None
    except ValueError as error:
        raise CheckpointError(
            f"{what} must be JSON; got {brief(text)} ({brief(str(error))}). {DAMAGED}"
        ) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} must be a JSON object; got {brief(parsed)}. {DAMAGED}")
    return parsed


def _check_plain(value: Any, place: str, depth: int) -> None:
    """That ``value`` comes back equal from JSON; says where it would not."""
    if depth > _MAX_DEPTH:
        raise CheckpointError(
            f"config must be nested at most {_MAX_DEPTH} deep; {place[:80]}... goes deeper."
        )
    if isinstance(value, dict):
        for key, item in value.items():
            if not _is_text(key):
                raise CheckpointError(f"keys must be strings; got {brief(key)} at {place}.")
            _check_plain(item, f"{place}[{brief(key)}]", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]", depth + 1)
    elif not (
        value is None
        or _is_text(value)
        or (isinstance(value, int) and abs(value) < 2**64)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        raise CheckpointError(
            "config must hold plain values: None, bool, int below 2**64, finite float, valid "
            f"Unicode, and dict and list of these; got {brief(value)} at {place}. "
            "Pass what to_dict() gives."
        )


def _canonical_json(value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    return json.dumps(
        plain, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True
    )


def _is_text(value: Any) -> TypeGuard[str]:
    """Half a surrogate pair is a ``str`` to Python, and nothing to UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES


def _is_lengths(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(map(_is_length, values))

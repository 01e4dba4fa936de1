"""The safetensors layout, whoever wrote the file: a header, then arrays end to end.

Eight bytes of header length, a JSON header, and the arrays. It is handled here, without the package
of that name: of its functions that need no array library, one takes raw memory addresses, and the
other takes a whole file as bytes, copies every array out of it, and leaves out the metadata.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, TypeGuard

from tensormoe._validation import brief
from tensormoe.errors import CheckpointError

DAMAGED = "The file is damaged or not a safetensors file: restore it from a copy."
# enough for 50,000 arrays; JSON takes some twenty times its length once it is parsed
MAX_HEADER_BYTES = 8 * 1024 * 1024
METADATA = "__metadata__"

_MAX_BYTES = 2**63 - 1
_MAX_AXES = 32  # the least that any array library admits

# canonical dtype name -> (safetensors code, bytes per entry); all readers of the format know these
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
DTYPES = {code: name for name, (code, _) in _DTYPES.items()}
"""Canonical names of dtypes by the format's own codes."""


@dataclass(frozen=True)
class ArrayInfo:
    """Dtype and shape of one array, as a header has them.

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


def read_frame(path: str, file: IO[bytes], size: int, most: int = MAX_HEADER_BYTES) -> bytes:
    """The text of a header, from the start of a file of ``size`` bytes.

    Raises:
        CheckpointError: it is longer than the file or than ``most`` bytes.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise CheckpointError(
            f"{path!r}: a header must lie within the file; got a length of {length} bytes in a "
            f"file of {size}. {DAMAGED}"
        )
    if length > most:
        raise CheckpointError(
            f"{path!r}: a header must have at most {most:,} bytes; got {length:,}. {DAMAGED}"
        )
    return file.read(length)


def parse_entries(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of any safetensors header by name, as they stand there, and its metadata.

    Raises:
        CheckpointError: not a JSON object, a name that occurs twice, or metadata other than
            strings.
    """
    # the package of that name allows white space before it
    if not text.lstrip(b" \t\r\n").startswith(b"{"):
        raise CheckpointError(f"a header must begin with '{{'; got {brief(text)}. {DAMAGED}")
    entries = parse_json(text, "the header")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"metadata must be strings by name; got {brief(metadata)}. {DAMAGED}")
    return entries, metadata


@dataclass(frozen=True)
class Placed:
    """An array as a header places it, also one of a dtype that is not known here.

    Args:
        name: of the array.
        code: of its dtype, as the format writes it.
        info: dtype and shape; None for a dtype that is not known.
        shape: as the header has it.
        begin: its first byte, counted from the end of the header.
        end: behind its last byte.
    """

    name: str
    code: str
    info: ArrayInfo | None
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def parse_placed(entries: Mapping[str, Any], data_bytes: int) -> list[Placed]:
    """Arrays in the order of the file, which they fill end to end.

    Raises:
        CheckpointError: whatever is wrong with them.
    """
    placed = sorted(
        (_parse_entry(name, entry) for name, entry in entries.items()),
        key=lambda each: (each.begin, each.end),
    )
    reached = 0
    for each in placed:
        if each.begin != reached:
            raise CheckpointError(
                f"arrays must lie end to end; {brief(each.name)} begins at byte {each.begin} where "
                f"{reached} was due. {DAMAGED}"
            )
        reached = each.end
    if reached != data_bytes:
        raise CheckpointError(
            f"the arrays take {reached} bytes; the file holds {data_bytes} after the header. "
            f"It is cut short or has foreign bytes at its end. {DAMAGED}"
        )
    return placed


def _parse_entry(name: str, entry: Any) -> Placed:
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
    if not isinstance(code, str):
        raise unknown_dtype(name, code)
    begin, end = offsets
    try:
        # the shapes of other dtypes hold as far as their axes do: bytes stand for their entries
        info = ArrayInfo(DTYPES.get(code, "uint8"), tuple(shape))
    except CheckpointError as error:
        raise CheckpointError(f"array {brief(name)}: {error} {DAMAGED}") from None
    if code not in DTYPES and begin <= end:
        return Placed(name, code, None, info.shape, begin, end)
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"data_offsets must span the {info.nbytes} bytes of {info.dtype} "
            f"{brief(info.shape)}; got {offsets} for {brief(name)}. {DAMAGED}"
        )
    return Placed(name, code, info, info.shape, begin, end)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which every name is unique.

    Raises:
        CheckpointError: anything else; the message calls it ``what``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(
                f"names must be unique in {what}; {brief(name)} occurs {times} times. {DAMAGED}"
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


def encode_frame(
    arrays: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """The first part of a file: eight bytes of length, and the header padded to eight bytes.

    Args:
        arrays: name, code of the dtype, shape and bytes of each, in the order of the file.
        metadata: strings by name.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, code, shape, size in arrays:
        offsets = [begin, begin + size]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": offsets}
        begin += size
    text = canonical_json(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def canonical_json(value: Any) -> str:
    """JSON in which equal values have equal text."""
    return json.dumps(
        value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True
    )


def code_of(dtype: str) -> str:
    """The format's own code of a canonical dtype.

    >>> code_of("bfloat16")
    'BF16'
    """
    return _DTYPES[dtype][0]


def unknown_dtype(name: str, code: Any) -> CheckpointError:
    """The error for an array of a dtype that is not known here."""
    return CheckpointError(
        f"dtype must be one of {', '.join(DTYPES)}; got {brief(code)} for {brief(name)}. Save the "
        "array in one of these."
    )


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES


def _is_lengths(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(map(_is_length, values))

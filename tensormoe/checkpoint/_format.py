"""The bytes of a checkpoint's header, checked in both directions.

The layout is safetensors' own, written and read without the package of that name
(:mod:`tensormoe.checkpoint._safetensors`). Files pass between the two unchanged, and a checkpoint
needs no package beyond the core.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from tensormoe._rounding import checked_bits
from tensormoe._validation import brief
from tensormoe.checkpoint._safetensors import (
    DAMAGED,
    MAX_HEADER_BYTES,
    METADATA,
    ArrayInfo,
    canonical_json,
    code_of,
    encode_frame,
    parse_entries,
    parse_json,
    parse_placed,
    unknown_dtype,
)
from tensormoe.errors import CheckpointError

FORMAT = "tensormoe"
SCHEMA_VERSION = 2
"""Version of the files that can be read; a newer one is an error."""
# what has nothing that readers of that version do not know is written as such
_PLAIN, _ROUNDED = 1, 2
_MAX_DEPTH = 32


@dataclass(frozen=True)
class CheckpointHeader:
    """Everything in a checkpoint but the values of its arrays.

    Args:
        block: class name of the block that was saved, e.g. ``"MuMoE"``.
        config: the values that rebuild the block, as JSON knows them.
        arrays: dtype and shape of each array by name.
        version: schema version of the file.
        prefix: what stands before every name in the file, so that the arrays of several blocks
            have different names for other programs.
        bits: 8 or 4 where factors are rounded: ``factors.input`` is stored as
            ``factors.input.codes`` and ``factors.input.scales``; None elsewhere.

    Raises:
        CheckpointError: a block, a config or a name that no checkpoint can have.
        SpecError: other bits.
    """

    block: str
    config: Mapping[str, Any]
    arrays: Mapping[str, ArrayInfo]
    version: int = _PLAIN
    prefix: str = ""
    bits: int | None = None

    def __post_init__(self) -> None:
        if checked_bits(self.bits) is not None:
            object.__setattr__(self, "version", max(self.version, _ROUNDED))
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
        if not _is_text(self.prefix):
            raise CheckpointError(f"prefix must be valid Unicode; got {brief(self.prefix)}.")
        for name in self.arrays:
            if not _is_text(name) or name in ("", METADATA):
                raise CheckpointError(
                    "names of arrays must be non-empty strings of valid Unicode other than "
                    f"{METADATA!r}; got {brief(name)}. Name arrays such as 'factors.input'."
                )


def encode_header(header: CheckpointHeader) -> bytes:
    """The first part of a file: eight bytes of length and the header, padded to eight bytes.

    Raises:
        CheckpointError: the header is longer than readers accept.
    """
    metadata = {
        "format": FORMAT,
        "version": str(header.version),
        "block": header.block,
        "config": canonical_json(dict(header.config)),
        **({"prefix": header.prefix} if header.prefix else {}),
        **({"bits": str(header.bits)} if header.bits else {}),
    }
    infos = ((name, header.arrays[name]) for name in file_order(header.arrays))
    frame = encode_frame(
        (
            (header.prefix + name, code_of(info.dtype), info.shape, info.nbytes)
            for name, info in infos
        ),
        metadata,
    )
    if len(frame) - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"names and config must fit in a header of {MAX_HEADER_BYTES:,} bytes; they take "
            f"{len(frame) - 8:,}. Keep large values in arrays, and large blocks in several "
            "checkpoints."
        )
    return frame


class Entries(Protocol):
    """Arrays, or what is known of them, by the size of an entry."""

    @property
    def itemsize(self) -> int: ...


def file_order(arrays: Mapping[str, Entries]) -> list[str]:
    """Names in the order of the file: wide entries first, so that every array lies aligned."""
    return sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))


def parse_header(text: bytes, data_bytes: int) -> CheckpointHeader:
    """Parse a header of :func:`encode_header`, arrays in the order of the file; trust nothing.

    Args:
        text: the header without the eight bytes of its length.
        data_bytes: how many bytes follow the header in the file.

    Raises:
        CheckpointError: whatever is wrong with it.
    """
    entries, metadata = parse_entries(text)
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
    prefix = metadata.get("prefix", "")
    arrays = _parse_arrays(entries, data_bytes, prefix)
    config = parse_json(metadata["config"].encode("utf-8", "surrogatepass"), "config")
    bits = _parse_bits(metadata.get("bits"), version)
    return CheckpointHeader(metadata["block"], config, arrays, version, prefix, bits)


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


def _parse_bits(text: str | None, version: int) -> int | None:
    if text is None:
        return None
    if text not in ("4", "8") or version < _ROUNDED:
        raise CheckpointError(
            f"bits must be 4 or 8, in a file of version {_ROUNDED} or later; got {brief(text)} in "
            f"version {version}. {DAMAGED}"
        )
    return int(text)


def _parse_arrays(entries: Mapping[str, Any], data_bytes: int, prefix: str) -> dict[str, ArrayInfo]:
    found: dict[str, ArrayInfo] = {}
    for each in parse_placed(entries, data_bytes):
        if each.info is None:
            raise unknown_dtype(each.name, each.code)
        if not each.name.startswith(prefix):
            raise CheckpointError(
                f"names must start with the prefix {brief(prefix)}; got {brief(each.name)}. "
                f"{DAMAGED}"
            )
        found[each.name.removeprefix(prefix)] = each.info
    return found


def _check_plain(value: Any, place: str, depth: int) -> None:
    """Refuse a value that does not come back equal from JSON; say where."""
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


def _is_text(value: Any) -> TypeGuard[str]:
    """Half a surrogate pair is a ``str`` to Python, and nothing to UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

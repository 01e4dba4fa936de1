"""The file of a calibration: named arrays of a safetensors file, read one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe.checkpoint._files import checkpoint_path, write_whole
from tensormoe.checkpoint._safetensors import canonical_json, code_of, encode_frame, parse_json
from tensormoe.compression._shards import Shard, open_shard, read_range
from tensormoe.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEY = "tensormoe_calibration"
_VERSION = 1
_DTYPES = ("float64", "float32", "int64")
# entries that are converted at a time
_ENTRIES = 2**20


class StoredArrays(Mapping[str, "NDArray[Any]"]):
    """Arrays of a file by name, each read when it is asked for.

    Args:
        shard: the file.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def __getitem__(self, key: str) -> NDArray[Any]:
        placed = self._shard.entries[key]
        return self._read(key, placed.begin, placed.end, placed.shape)

    def entry(self, key: str, place: int) -> NDArray[Any]:
        """One entry of an array along its first axis, of which no more is read."""
        placed = self._shard.entries[key]
        size = placed.nbytes // placed.shape[0]
        begin = placed.begin + place * size
        return self._read(key, begin, begin + size, placed.shape[1:])

    def _read(self, key: str, begin: int, end: int, shape: tuple[int, ...]) -> NDArray[Any]:
        import numpy as np

        info = self._shard.entries[key].info
        assert info is not None
        data = b"".join(read_range(self._shard, begin, end))
        dtype = np.dtype(info.dtype)
        found = np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)
        found = found.reshape(shape)
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{self._shard.path!r}: {key} must be finite; got NaN or infinity. Calibrate anew."
            )
        return found

    def __contains__(self, key: object) -> bool:
        return key in self._shard.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard.entries)

    def __len__(self) -> int:
        return len(self._shard.entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array, from the header."""
        return self._shard.entries[key].shape

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(each.nbytes for each in self._shard.entries.values())


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]
) -> None:
    """Write arrays and plain values, whole or not at all.

    Raises:
        CheckpointError: the file can't be written.
    """
    # the wide ones first, so that each begins at a multiple of its entries' size
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    placed = []
    for name in names:
        array = arrays[name]
        size = array.dtype.itemsize * prod(array.shape)
        placed.append((name, code_of(array.dtype.name), tuple(array.shape), size))
    text = canonical_json({"version": _VERSION, **about})
    head = encode_frame(placed, {_KEY: text})

    def parts() -> Iterator[bytes]:
        yield head
        for name in names:
            flat = arrays[name].reshape(-1)
            for start in range(0, len(flat), _ENTRIES):
                piece = flat[start : start + _ENTRIES]
                yield piece.astype(piece.dtype.newbyteorder("<")).tobytes()

    write_whole(checkpoint_path(path), parts())


def open_arrays(path: str | os.PathLike[str]) -> tuple[StoredArrays, dict[str, Any]]:
    """The arrays of a file, and the values beside them.

    Raises:
        CheckpointError: not a file of :func:`write_arrays`.
    """
    source = checkpoint_path(path)
    shard = open_shard(os.path.realpath(source))
    if _KEY not in shard.metadata:
        raise CheckpointError(
            f"{source!r} must be a calibration; it is another safetensors file. "
            "tensormoe calibrate-model writes one."
        )
    about = parse_json(shard.metadata[_KEY].encode(), f"the description in {source!r}")
    if about.get("version") != _VERSION:
        raise CheckpointError(
            f"{source!r} must be of version {_VERSION}; it is of {about.get('version')!r}. Install "
            "the newest tensormoe, or calibrate anew."
        )
    for name, each in shard.entries.items():
        if each.info is None or each.info.dtype not in _DTYPES:
            raise CheckpointError(
                f"{source!r}: arrays must be {', '.join(_DTYPES)}; {name} is {each.code}."
            )
    return StoredArrays(shard), about

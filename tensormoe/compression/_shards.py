"""A model on disk: one safetensors file or many, of which only headers are read until asked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

from tensormoe._validation import brief
from tensormoe.checkpoint._files import checkpoint_path, open_regular
from tensormoe.checkpoint._safetensors import (
    DAMAGED,
    Placed,
    parse_entries,
    parse_json,
    parse_placed,
    read_frame,
)
from tensormoe.errors import CheckpointError

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

# what other readers of the format accept
_MAX_HEADER_BYTES = 100 * 10**6
_MAX_INDEX_BYTES = 512 * 2**20
# bytes of a file that are held at a time
_CHUNK = 2**23


@dataclass(frozen=True, eq=False)
class Shard:
    """A safetensors file, of which the header was read.

    Args:
        path: where it is.
        name: of the file, without its folder.
        head: its bytes before the first tensor, as they are.
        metadata: of its header, strings by name.
        entries: its tensors by key, in the order of the file: for each its ``shape``, as ``info``
            its dtype, and as ``begin`` and ``end`` its bytes, counted from the end of ``head``.
        identity: what changes if somebody changes the file: its name, its size in bytes, the time
            of its last change, and a hash of its header.
    """

    path: str
    name: str
    head: bytes
    metadata: Mapping[str, str]
    entries: Mapping[str, Placed]
    identity: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Model:
    """The tensors of a model, as the headers of its files place them.

    Args:
        name: of the file or folder, without those above.
        folder: the folder whose other files belong to the model; None for a file on its own.
        index: name of the file that says which shard has which key, if there is one.
        shards: in the order of their names.
    """

    name: str
    folder: str | None
    index: str | None
    shards: tuple[Shard, ...]

    @cached_property
    def places(self) -> Mapping[str, tuple[Shard, Placed]]:
        """For every key the file that it is in, and its place there."""
        return {key: (shard, each) for shard in self.shards for key, each in shard.entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for _, each in self.places.values())

    @property
    def identity(self) -> list[Mapping[str, Any]]:
        """The identity of each file, which changes if somebody changes the model."""
        return [shard.identity for shard in self.shards]


def open_model(path: str | os.PathLike[str]) -> Model:
    """Read the headers of a model.

    Args:
        path: a ``.safetensors`` file, an index ``.safetensors.index.json``, or a folder with one of
            either kind.

    Raises:
        TypeError: ``path`` is neither a string nor a path.
        CheckpointError: nothing there, a damaged header or index, or a key in two files.
    """
    source = checkpoint_path(path)
    whole = os.path.realpath(source)
    if os.path.isdir(whole):
        folder, listed = whole, _weights_in(source, whole)
    elif whole.endswith(INDEX_SUFFIX):
        folder, listed = os.path.split(whole)
    else:
        shard = open_shard(whole)
        return Model(shard.name, None, None, (shard,))
    name = os.path.basename(whole)
    if not listed.endswith(INDEX_SUFFIX):
        return Model(name, folder, None, (open_shard(os.path.join(folder, listed)),))
    places = _read_index(os.path.join(folder, listed))
    files = sorted(set(places.values()))
    model = Model(name, folder, listed, tuple(open_shard(os.path.join(folder, k)) for k in files))
    _check_keys(model, places)
    return model


def open_shards(shards: Sequence[tuple[str, Mapping[str, Any]]]) -> Model:
    """Some files of a model that another process has opened.

    Args:
        shards: path and identity of each.

    Raises:
        CheckpointError: a file that is not there, or is not the one that the other process has
            opened.
    """
    found = tuple(open_shard(path) for path, _ in shards)
    for shard, (path, identity) in zip(found, shards, strict=True):
        differing = [key for key in identity if shard.identity[key] != identity[key]]
        if differing:
            raise CheckpointError(
                f"{path!r} must be the file that the compression began with; its "
                f"{', '.join(differing)} differ."
            )
    return Model(os.path.basename(os.path.dirname(found[0].path)), None, None, found)


def read_range(shard: Shard, begin: int, end: int) -> Iterator[bytes]:
    """The bytes ``begin`` to ``end`` of a shard's tensors, a few megabytes at a time.

    Raises:
        CheckpointError: the file can't be read, or was changed since its header was.
    """
    with open_regular(shard.path) as (file, _):
        file.seek(len(shard.head) + begin)
        for start in range(begin, end, _CHUNK):
            yield _exactly(file, min(_CHUNK, end - start), shard)


def _exactly(file: IO[bytes], count: int, shard: Shard) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise CheckpointError(f"{shard.path!r}: the file was cut short while it was read.")
    return data


def _weights_in(shown: str, folder: str) -> str:
    """The index or the only weights of a folder."""
    try:
        files = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{shown!r} can't be read: {error.strerror or error}.") from error
    indices = [name for name in files if name.endswith(INDEX_SUFFIX)]
    weights = [name for name in files if name.endswith(WEIGHTS_SUFFIX)]
    usual = f"model{INDEX_SUFFIX}", f"model{WEIGHTS_SUFFIX}"
    for found, name in ((indices, usual[0]), (weights, usual[1])):
        if name in found:
            return name
        if len(found) == 1:
            return found[0]
    if not indices and not weights:
        raise CheckpointError(
            f"the folder {shown!r} must hold a .safetensors file or an index of several; it holds "
            f"{brief(files)}. Name another folder."
        )
    raise CheckpointError(
        f"the folder {shown!r} must hold one model; it holds {', '.join(indices or weights)}. Name "
        "one of these files instead of the folder."
    )


def open_shard(path: str) -> Shard:
    """Read the header of a file.

    Raises:
        CheckpointError: nothing there, or a damaged header.
    """
    with open_regular(path) as (file, size):
        text = read_frame(path, file, size, _MAX_HEADER_BYTES)
        status = os.fstat(file.fileno())
    try:
        entries, metadata = parse_entries(text)
        placed = parse_placed(entries, size - 8 - len(text))
    except CheckpointError as error:
        raise CheckpointError(f"{path!r}: {error}") from error.__cause__
    head = len(text).to_bytes(8, "little") + text
    identity = {
        "name": os.path.basename(path),
        "bytes": size,
        "changed": status.st_mtime_ns,
        "header": hashlib.sha256(head).hexdigest(),
    }
    by_key = {each.name: each for each in placed}
    return Shard(path, os.path.basename(path), head, metadata, by_key, identity)


def _read_index(path: str) -> dict[str, str]:
    """The file of every key."""
    with open_regular(path) as (file, size):
        if size > _MAX_INDEX_BYTES:
            raise CheckpointError(
                f"{path!r}: an index must have at most {_MAX_INDEX_BYTES:,} bytes; got {size:,}."
            )
        text = file.read()
    try:
        places = parse_json(text, "the index").get("weight_map")
    except CheckpointError as error:
        raise CheckpointError(f"{path!r}: {error}") from error.__cause__
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{path!r}: an index must have a 'weight_map' of keys and files; got "
            f"{brief(places)}. {DAMAGED}"
        )
    for key, name in places.items():
        # nothing outside of the folder is read, whatever an index says
        if (
            not isinstance(name, str)
            or name != os.path.basename(name)
            or not name.endswith(WEIGHTS_SUFFIX)
        ):
            raise CheckpointError(
                f"{path!r}: the files of an index must be .safetensors files beside it; got "
                f"{brief(name)} for {brief(key)}. {DAMAGED}"
            )
    return places


def _check_keys(model: Model, places: Mapping[str, str]) -> None:
    """Refuse keys that are not where the index says, or elsewhere too."""
    first: dict[str, str] = {}
    for shard in model.shards:
        for key in shard.entries:
            if key in first:
                raise CheckpointError(
                    f"a key must be in one file; {key!r} is in {first[key]!r} and "
                    f"{shard.name!r}. Remove one of them."
                )
            first[key] = shard.name
    for key, name in places.items():
        if first.get(key) != name:
            raise CheckpointError(
                f"the index places {key!r} in {name!r}; the key is "
                f"{'in ' + repr(first[key]) if key in first else 'in no file'}. {DAMAGED}"
            )

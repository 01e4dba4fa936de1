"""The folder of a healed model: that of the compressed one, with other numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.checkpoint._files import write_whole
from tensormoe.checkpoint._safetensors import DTYPES, Placed
from tensormoe.compression._folder import README
from tensormoe.compression._resume import MANIFEST, Work
from tensormoe.compression._shards import (
    WEIGHTS_SUFFIX,
    Model,
    Shard,
    open_model,
    open_shard,
    read_range,
)
from tensormoe.errors import CheckpointError
from tensormoe_torch._sharded import gathered
from tensormoe_torch.compression._healing._processes import first_process
from tensormoe_torch.compression._healing._tensors import read_tensor, tensor_bytes
from tensormoe_torch.compression._text import quiet

SAVED = "saved"
"""Where transformers saves the model on the way: its names of tensors are those of files."""


@dataclass(frozen=True, eq=False)
class Source:
    """Files of a compressed model.

    Args:
        folder: that holds them.
        shards: files of tensors, by their path from the folder.
        others: paths of all others from the folder.
    """

    folder: str
    shards: Mapping[str, Shard]
    others: tuple[str, ...]

    @property
    def identity(self) -> list[Mapping[str, Any]]:
        """A mark that changes with the files of tensors."""
        return [{**each.identity, "name": path} for path, each in self.shards.items()]


def open_source(folder: str) -> Source:
    """Read the headers of a compressed model, whose factors are in a folder of their own.

    Raises:
        CheckpointError: no folder, or a damaged file.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"a compressed model must be a folder with config.json and weights; there is none at "
            f"{folder!r}."
        )
    paths = sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in names
    )
    weights = [each for each in paths if each.endswith(WEIGHTS_SUFFIX)]
    shards = {each: open_shard(os.path.join(folder, each)) for each in weights}
    others = tuple(each for each in paths if each not in shards and each != MANIFEST)
    return Source(folder, shards, others)


def save_beside(model: nn.Module, work: Work) -> None:
    """Let transformers save a model in the folder in the making; every process calls this."""
    state: dict[str, Tensor] = {
        name: gathered(each.detach()).cpu() for name, each in model.state_dict().items()
    }
    if not first_process():
        return
    shutil.rmtree(os.path.join(work.folder, SAVED), ignore_errors=True)
    saving: Any = model
    with quiet():
        saving.save_pretrained(os.path.join(work.folder, SAVED), state_dict=state)


def check_names(source: Source, work: Work) -> None:
    """Refuse, before a healing, a folder in which its result would have no place.

    Raises:
        CheckpointError: transformers saves tensors by names that the folder does not have.
    """
    there = {key for shard in source.shards.values() for key in shard.entries}
    saved = open_model(os.path.join(work.folder, SAVED)).places
    if strange := sorted(saved.keys() - there):
        raise CheckpointError(
            f"the files of {source.folder!r} must have the names that transformers saves by; "
            f"{strange[0]!r} and {len(strange) - 1} more are not in them. Load the model, and "
            "save it anew by save_pretrained."
        )


def write_healed(source: Source, work: Work, note: str) -> None:
    """Write the files of the compressed model, with what was saved beside.

    Tensors that the healing did not change keep their bytes, and all keep their dtypes.
    """
    saved = open_model(os.path.join(work.folder, SAVED))
    for path, shard in source.shards.items():
        write_whole(work.path(path), _parts(shard, saved))
    for path in source.others:
        with open(os.path.join(source.folder, path), "rb") as file:
            data = file.read()
        if path == README:
            data = data.rstrip(b"\n") + b"\n\n" + note.encode() + b"\n"
        write_whole(work.path(path), (data,))


def _parts(shard: Shard, saved: Model) -> Iterator[bytes]:
    """A file of tensors with its own header."""
    yield shard.head
    for key, placed in shard.entries.items():
        found = saved.places.get(key)
        new = None if found is None else _changed(shard, placed, *found)
        if new is None:
            yield from read_range(shard, placed.begin, placed.end)
        else:
            yield tensor_bytes(new)


def _changed(shard: Shard, placed: Placed, other: Shard, there: Placed) -> Tensor | None:
    """The new numbers of a tensor, in the file's dtype; None if they are the old ones.

    Raises:
        CheckpointError: of another shape.
    """
    if there.shape != placed.shape:
        raise CheckpointError(
            f"{placed.name!r} must have shape {placed.shape}; it was saved with {there.shape}."
        )
    if placed.code not in DTYPES:
        return None
    old, new = read_tensor(shard, placed), read_tensor(other, there)
    return None if torch.equal(old.to(new.dtype), new) else new.to(old.dtype)

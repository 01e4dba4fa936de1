"""A block's configuration and arrays from a checkpoint, checked against one another."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TypeVar

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe.backend import Array, Backend
from tensormoe.checkpoint import match_arrays, read_checkpoint
from tensormoe.errors import CheckpointError, TensormoeError

__all__ = ["read_block"]

C = TypeVar("C", LayerConfig, BlockConfig)


def read_block(
    path: str | PathLike[str], block: str, kind: type[C], backend: Backend
) -> tuple[C, Mapping[str, Array]]:
    """Configuration and arrays of a checkpoint, checked against one another.

    Args:
        path: the file.
        block: class name of the block that it must hold.
        kind: class of the block's configuration.
        backend: the library of the arrays to return.

    Raises:
        CheckpointError: no checkpoint, another kind of block, or arrays that do not fit; the
            message lists every difference.
    """
    saved = read_checkpoint(path, backend)
    if saved.block != block:
        raise CheckpointError(
            f"the file must hold a {block}; got a {saved.block}. Open it with {saved.block}.load."
        )
    try:
        config = kind.from_dict(saved.config)
    except TensormoeError as error:
        raise CheckpointError(f"the file describes no {block}: {error}") from error
    match_arrays({**config.parameter_shapes(), **config.buffer_shapes()}, saved.arrays)
    return config, saved.arrays

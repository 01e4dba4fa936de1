"""Digests by which a model is known again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from tensormoe.checkpoint._files import open_regular
from tensormoe.checkpoint._safetensors import canonical_json
from tensormoe.compression._config_file import read_config
from tensormoe.compression._shards import Model
from tensormoe.errors import CheckpointError

# what changes when a model is saved anew
_VOLATILE = ("transformers_version", "torch_dtype", "dtype", "_name_or_path")
# files that hold a whole tokenizer, the first one that is there; else both of the last
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("tekken.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
)


def digest(value: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def shapes_digest(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """A hash of names and shapes, in any order."""
    return digest(sorted([name, list(shape)] for name, shape in shapes))


def checkpoint_identity(model: Model) -> dict[str, str]:
    """Digests of a model on disk: names and shapes, and its configuration and tokenizer if any."""
    places = model.places.items()
    found = {"checkpoint": shapes_digest((key, each.shape) for key, (_, each) in places)}
    if model.folder is None:
        return found
    try:
        config: Mapping[str, Any] = read_config(model)
    except CheckpointError:
        # a folder may have none
        pass
    else:
        found["config"] = digest({k: v for k, v in config.items() if k not in _VOLATILE})
    return found | tokenizer_identity(model.folder)


def tokenizer_identity(folder: str) -> dict[str, str]:
    """The digest of the tokenizer in a folder; empty where there is none."""
    for names in _TOKENIZERS:
        paths = [os.path.join(folder, name) for name in names]
        if all(map(os.path.isfile, paths)):
            whole = hashlib.sha256()
            for path in paths:
                with open_regular(path) as (file, _):
                    whole.update(file.read())
            return {"tokenizer": whole.hexdigest()}
    return {}

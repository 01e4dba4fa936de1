"""The ``config.json`` beside a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tensormoe.checkpoint._files import open_regular
from tensormoe.checkpoint._safetensors import parse_json
from tensormoe.compression._shards import Model
from tensormoe.errors import CheckpointError

CONFIG = "config.json"
QUANTIZED = "quantization_config"

_MAX_BYTES = 64 * 2**20
# the language model of models that take pictures or sound as well
_TEXT = "text_config"


def read_config(model: Model) -> dict[str, Any]:
    """The configuration of a model.

    Raises:
        CheckpointError: it has none, or one that can't be read.
    """
    if model.folder is None:
        raise CheckpointError("it is a file on its own")
    with open_regular(os.path.join(model.folder, CONFIG)) as (file, size):
        if size > _MAX_BYTES:
            raise CheckpointError(f"it has {size:,} bytes")
        return parse_json(file.read(), CONFIG)


def found_config(model: Model) -> Mapping[str, Any]:
    """The configuration of a model; empty where there is none that can be read."""
    try:
        return read_config(model)
    except CheckpointError:
        return {}


def model_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The types of a model and of its language model."""
    found = (each.get("model_type") for each in _parts(config))
    return tuple(each for each in found if isinstance(each, str))


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Quantization of a model's weights; empty where there is none."""
    found = (each.get(QUANTIZED) for each in _parts(config))
    return next((each for each in found if isinstance(each, Mapping)), {})


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with plain weights."""
    found = {key: each for key, each in config.items() if key != QUANTIZED}
    if isinstance(text := found.get(_TEXT), Mapping):
        found[_TEXT] = {key: each for key, each in text.items() if key != QUANTIZED}
    return found


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in (config, config.get(_TEXT)) if isinstance(each, Mapping)]

"""Format in which the ``config.json`` of a model describes factorized layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

METHOD = "tensormoe"
"""Value of ``quant_method``."""
SCHEMA_VERSION = 2
"""Version of the descriptions that can be read; a newer one is an error."""
# what has nothing that readers of that version do not know is written as such
_PLAIN, _ROUNDED = 1, 2
IMPORT = "tensormoe_torch.huggingface"
"""The module that has to be imported before such a model is loaded."""

PROJECTION_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gate_proj": ("gate_proj", "w1", "gate", "linear_gate"),
        "up_proj": ("up_proj", "w3", "up", "linear_up"),
        "down_proj": ("down_proj", "w2", "down", "linear_down"),
    }
)
"""Names of an expert's projections in models, by role."""


def model_config(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The value of ``quantization_config``.

    Args:
        modules: for each layer by its name in the model its kind and configuration, as plain
            values.
    """
    return {
        "quant_method": METHOD,
        "version": _ROUNDED if any("bits" in each for each in modules.values()) else _PLAIN,
        "import": IMPORT,
        "modules": {name: dict(values) for name, values in modules.items()},
    }

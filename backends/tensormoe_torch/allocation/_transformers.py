"""Models of transformers without values, from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensormoe._validation import brief
from tensormoe.errors import SpecError
from tensormoe_torch.compression._text import model_class


def empty_model(config: Any) -> nn.Module:
    """A model of transformers on the meta device: its layers without values.

    Args:
        config: values of a ``config.json``, or a configuration of transformers.

    Raises:
        SpecError: transformers can't make it.

    >>> config = {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2,
    ...     "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
    >>> from tensormoe.selection import allocate
    >>> allocate(empty_model(config), "50%", experts=2).names
    ('layers.0.mlp', 'layers.1.mlp')
    """
    import transformers

    values = dict(config) if isinstance(config, Mapping) else None
    try:
        made: Any = config
        if values is not None:
            made = transformers.AutoConfig.for_model(**values)
        with torch.device("meta"):
            model: nn.Module = model_class(made, transformers.AutoModel)._from_config(made)
    except Exception as error:
        # any code of a configuration may fail in any way
        name = brief(values.get("model_type") if values is not None else config)
        raise SpecError(
            f"a configuration must be of a model that transformers knows; {name} can't be made: "
            f"{_brief(error)}"
        ) from error
    return model


def _brief(error: Exception) -> str:
    """The beginning of a message: some list all models that there are."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"

"""Models of transformers: without values from a configuration, or from a folder with a text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._validation import brief
from tensormoe.errors import SpecError

_BATCH = 8


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
            model: nn.Module = _class_of(made, transformers.AutoModel)._from_config(made)
    except Exception as error:
        # any code of a configuration may fail in any way
        name = brief(values.get("model_type") if values is not None else config)
        raise SpecError(
            f"a configuration must be of a model that transformers knows; {name} can't be made: "
            f"{_brief(error)}"
        ) from error
    return model


def load_model(folder: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """A model with values and its tokenizer, from a folder on disk.

    Raises:
        SpecError: the folder has none that transformers can open.
    """
    import transformers

    path = os.fspath(folder)
    if not os.path.isdir(path):
        raise SpecError(f"a model with values must be a folder; {path!r} is none.")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        kind = _class_of(config, transformers.AutoModelForCausalLM)
        options: dict[str, Any] = {"local_files_only": True, "dtype": "auto"}
        model = kind.from_pretrained(path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise SpecError(
            f"a model and its tokenizer must be in the folder {path!r}; transformers can't open "
            f"them: {_brief(error)}"
        ) from error
    return model, tokenizer


def _brief(error: Exception) -> str:
    """The beginning of a message: some list all models that there are."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def _class_of(config: Any, default: Any) -> Any:
    """The class that a configuration names, or the default for its family."""
    import transformers

    listed = getattr(config, "architectures", None)
    named = getattr(transformers, listed[0], None) if listed else None
    if named is not None:
        return named
    mapping: Any = default._model_mapping
    return mapping[type(config)]


def text_batches(tokenizer: Any, text: str, context: int, windows: int) -> list[Tensor]:
    """Windows of a text as ids (windows, context), spread evenly over it.

    Raises:
        SpecError: the text is shorter than a window.
    """
    ids = torch.as_tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    count = min(windows, len(ids) // context)
    if not count or context < 2:
        raise SpecError(
            f"the text must have at least one window of {max(context, 2)} tokens; got "
            f"{len(ids)}. Give a longer text, or a smaller context."
        )
    starts = torch.linspace(0, len(ids) - context, count).long()
    rows = torch.stack([ids[start : start + context] for start in starts.tolist()])
    return list(rows.split(_BATCH))

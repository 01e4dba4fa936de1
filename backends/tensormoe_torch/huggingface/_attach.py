"""Models whose configuration describes their factorized layers."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from tensormoe.errors import SpecError
from tensormoe_torch.huggingface._config import TensormoeConfig


def attach(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model write which of its layers are factorized.

    :func:`tensormoe_torch.compress` and :func:`tensormoe_torch.replace` do it themselves. Call this
    for layers that were put in by hand. From then on the model's ``config`` always
    describes its current layers, so once is enough.

    Args:
        model: a model of transformers, or a module that holds some.

    Raises:
        SpecError: there is no model of transformers in it.

    >>> import transformers
    >>> from tensormoe_torch import MuMoEMLP
    >>> sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    >>> model.transformer.h[0].mlp = MuMoEMLP(8, 32, experts=4)
    >>> attach(model)
    >>> list(model.config.to_dict()["quantization_config"]["modules"])
    ['transformer.h.0.mlp']
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, PreTrainedModel):
            _attach(module)
            inside = f"{name}." if name else ""
    if inside is None:
        raise SpecError(
            f"model must be a model of transformers, or hold one; {type(model).__name__} is none."
        )


def _attach(model: PreTrainedModel) -> None:
    before = getattr(model.config, "quantization_config", None)
    if before is not None and not isinstance(before, TensormoeConfig):
        warnings.warn(
            f"save_pretrained can't save factorized layers of a model that is quantized as well "
            f"({type(before).__name__}): loaded again, they would be new and random. Save its "
            "state_dict() instead.",
            stacklevel=4,
        )
        return
    model.config.quantization_config = TensormoeConfig.of(model)


def detach(model: nn.Module) -> None:
    """Let ``save_pretrained`` write a plain model again, where no layers of the library are left.

    :func:`tensormoe_torch.adapters.merge_adapters` does it.

    Args:
        model: a model of transformers, or a module that holds some.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        held = getattr(module.config, "quantization_config", None)
        if isinstance(held, TensormoeConfig) and not held.to_dict()["modules"]:
            del module.config.quantization_config

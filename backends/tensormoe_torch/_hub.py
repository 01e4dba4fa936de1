"""Mark models of Hugging Face transformers whose layers were replaced."""

from __future__ import annotations

import sys
import warnings

from torch import nn

from tensormoe.errors import MissingDependencyError


def mark(model: nn.Module) -> None:
    """Let ``save_pretrained`` write what a changed model holds, if it is one of transformers.

    Without that it would write the old configuration, and ``from_pretrained`` would fill the old
    layers with random numbers.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not any(
        isinstance(each, modeling.PreTrainedModel) for each in model.modules()
    ):
        return
    try:
        from tensormoe_torch.huggingface import attach
    except MissingDependencyError as error:
        warnings.warn(
            f"save_pretrained can't save this model: {error} Or save its state_dict().",
            stacklevel=3,
        )
    else:
        attach(model)


def unmark(model: nn.Module) -> None:
    """Let ``save_pretrained`` write a plain model again, if no layers of the library are left."""
    hub = sys.modules.get("tensormoe_torch.huggingface")
    if hub is not None:
        hub.detach(model)

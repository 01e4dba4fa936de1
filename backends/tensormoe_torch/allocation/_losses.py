"""The loss of a model on batches, and the mean squared gradients of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.allocation._weights import Weights

LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the loss, a scalar tensor."""


def batch_loss(model: nn.Module, batch: Any, loss: LossFunction | None) -> Tensor:
    """The loss of one batch.

    Raises:
        SpecError: it is not a scalar, or there is none.
    """
    found = _own_loss(model, batch) if loss is None else loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        raise SpecError(
            "loss must give a scalar tensor of a model and a batch; got "
            f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}."
        )
    return found.reshape(())


def mean_loss(model: nn.Module, batches: Sequence[Any], loss: LossFunction | None) -> float:
    """The mean over batches, without gradients."""
    with torch.no_grad():
        found = [float(batch_loss(model, each, loss)) for each in batches]
    return sum(found) / len(found)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss in a model's output, or the cross-entropy of the next ids."""
    if isinstance(batch, Mapping):
        made = model(**batch)
    elif isinstance(batch, tuple):
        made = model(*batch)
    else:
        made = model(batch)
    own = getattr(made, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits = getattr(made, "logits", made)
    ids = batch
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    elif isinstance(batch, tuple):
        ids = batch[0] if batch else None
    if (
        not isinstance(ids, Tensor)
        or ids.is_floating_point()
        or not isinstance(logits, Tensor)
        or logits.shape[:-1] != ids.shape
        or ids.ndim < 1
        or ids.shape[-1] < 2
    ):
        raise SpecError(
            "loss must be given for a model whose output has none and is not logits "
            "(…, time, ids) of its input (…, time). Pass loss=…, labels in each batch, or "
            "measure='error'."
        )
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), ids[..., 1:].flatten())


def squared_gradients(
    model: nn.Module, weights: Sequence[Weights], batches: Sequence[Any], loss: LossFunction | None
) -> dict[str, tuple[Tensor, ...]]:
    """Mean squared gradients of the weights by projection, a batch's mean loss at a time.

    Raises:
        SpecError: weights that are not parameters of the model, or have no gradient.
    """
    parameters = {each.untyped_storage().data_ptr(): each for each in model.parameters()}
    owners: dict[int, nn.Parameter] = {}
    for each in weights:
        for view in each.weights:
            owner = parameters.get(view.untyped_storage().data_ptr())
            if owner is None or not owner.is_contiguous():
                raise SpecError(
                    f"weights of {each.name!r} must be a contiguous parameter for gradients to be "
                    "measured. Use measure='loss'."
                )
            owners[id(owner)] = owner
    wide = {
        key: torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
        for key, each in owners.items()
    }
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in owners)
        with torch.enable_grad():
            for batch in batches:
                found = torch.autograd.grad(
                    batch_loss(model, batch, loss), [*owners.values()], allow_unused=True
                )
                for key, gradient in zip(owners, found, strict=True):
                    if gradient is not None:
                        wide[key] += gradient.detach().to(wide[key].dtype).square() / len(batches)
    finally:
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)
    made = {}
    for each in weights:
        parts = []
        for view in each.weights:
            owner = parameters[view.untyped_storage().data_ptr()]
            offset = view.storage_offset() - owner.storage_offset()
            parts.append(wide[id(owner)].as_strided(view.shape, view.stride(), offset))
        made[each.name] = tuple(parts)
    return made

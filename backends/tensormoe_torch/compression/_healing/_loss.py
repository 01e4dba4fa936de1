"""Loss of a compressed model next to the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.compression._evaluate import next_tokens, plain_logits, token_ids
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._healing._settings import Healing
from tensormoe_torch.surgery._inputs import evaluating, run_model


class Distillation:
    """The loss of a batch: divergence from the original's predictions, and what is added to it.

    ``(1 − l) KL(original ‖ model) + l · cross-entropy + w · Σ‖y − y'‖² / Σ‖y'‖²``, per token, with
    ``l`` the share of the text's own tokens and ``w`` the weight of the experts' outputs ``y``,
    of which the mean over the layers is taken (Hinton et al. 2015; Romero et al. 2015).

    Args:
        model: the one that is trained.
        teacher: the original, which runs in evaluation mode.
        settings: the shares.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, settings: Healing) -> None:
        self._model, self._teacher, self._settings = model, teacher, settings
        self._names = _matched(model, teacher) if settings.layers else ()

    def __call__(self, batch: Any) -> Tensor:
        """The loss, a scalar.

        Raises:
            SpecError: models of different vocabularies, or no tokens to predict.
        """
        settings = self._settings
        token_ids(batch)
        with _outputs(self._teacher, self._names) as wanted, evaluating(self._teacher):
            before = plain_logits(self._teacher, run_model(self._teacher, batch))
        with _outputs(self._model, self._names) as found:
            after = plain_logits(self._model, run_model(self._model, batch))
        if before.shape != after.shape:
            raise SpecError(
                "models must have one vocabulary; their logits have shapes "
                f"{tuple(before.shape)} and {tuple(after.shape)}."
            )
        labels, counted = next_tokens(batch, after.device)
        if not bool(counted.any()):
            raise SpecError(
                "batches must hold tokens to predict; got windows of one token or none. Give "
                "longer ones."
            )
        q = F.log_softmax(after[:, :-1].flatten(0, 1)[counted].float(), dim=-1)
        loss = q.new_zeros(())
        if settings.labels < 1:
            rows = before.to(after.device)[:, :-1].flatten(0, 1)[counted].float()
            p = F.log_softmax(rows, dim=-1)
            loss = (1 - settings.labels) * F.kl_div(q, p, log_target=True, reduction="batchmean")
        if settings.labels > 0:
            loss = loss + settings.labels * F.nll_loss(q, labels[counted])
        for name in self._names:
            off = _relative(found[name], wanted[name])
            loss = loss + settings.layers / len(self._names) * off
        return loss


def _matched(model: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Names of modules of experts that both models have.

    Raises:
        SpecError: none, or experts that are called one by one.
    """
    names = [name for name, each in model.named_modules() if isinstance(each, FactorizedExperts)]
    there = dict(teacher.named_modules())
    for name in names:
        if name not in there or isinstance(there[name], nn.ModuleList):
            raise SpecError(
                "experts must have the name of the original's, and be called together, for their "
                f"outputs to be compared; {name!r} does not. Leave layers out."
            )
    if not names:
        raise SpecError(
            f"the model must hold factorized experts for their outputs to be compared; "
            f"{type(model).__name__} holds none. Leave layers out."
        )
    return tuple(names)


@contextmanager
def _outputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[Mapping[str, Tensor]]:
    """Outputs of some modules of a model while it runs."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
            found[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    whole = wanted.to(found.device).float()
    off = (found.float() - whole).square().sum()
    return off / whole.square().sum().clamp(min=torch.finfo(torch.float32).tiny)

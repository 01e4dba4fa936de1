"""Loss of a compressed model next to the original."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.compression._evaluate import next_tokens, plain_logits, token_ids
from tensormoe_torch.compression._healing._settings import Healing
from tensormoe_torch.surgery._inputs import evaluating, run_model


class Distillation:
    """The loss of a batch: divergence from the original's predictions, and cross-entropy.

    ``(1 − l) KL(original ‖ model) + l · cross-entropy`` per token, with ``l`` the share of the
    text's own tokens (Hinton et al. 2015).

    Args:
        model: the one that is trained.
        teacher: the original, which runs in evaluation mode.
        settings: the share of the text's own tokens.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, settings: Healing) -> None:
        self._model, self._teacher, self._settings = model, teacher, settings

    def __call__(self, batch: Any) -> Tensor:
        """The loss, a scalar.

        Raises:
            SpecError: models of different vocabularies, or no tokens to predict.
        """
        settings = self._settings
        token_ids(batch)
        with evaluating(self._teacher):
            before = plain_logits(self._teacher, run_model(self._teacher, batch))
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
        return loss

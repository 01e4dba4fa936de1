"""Training of a compressed model by what the original predicts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._validation import instance, positive_int
from tensormoe.checkpoint._files import checkpoint_path
from tensormoe.errors import SpecError, TrainingError
from tensormoe_torch._sharded import is_sharded
from tensormoe_torch.compression._evaluate import Evaluation, evaluate, next_tokens
from tensormoe_torch.compression._healing._loss import Distillation
from tensormoe_torch.compression._healing._report import HealingProgress, HealingReport
from tensormoe_torch.compression._healing._settings import Healing
from tensormoe_torch.compression._healing._state import read_state, write_state
from tensormoe_torch.compression._healing._trained import Trained, only, trained_parameters
from tensormoe_torch.compression._samples import Batch, listed

HealingCallback = Callable[[HealingProgress], None]


def heal(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    steps: int,
    train: str = "factors",
    lr: float = 1e-3,
    warmup: float = 0.1,
    labels: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    held: Batch | Iterable[Batch] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    callback: HealingCallback | None = None,
) -> HealingReport:
    """Train a compressed model, in place, to predict what the original predicts.

    Each step takes one batch: the Kullback–Leibler divergence KL(original ‖ model) of the next
    token is minimized by AdamW (Hinton et al., Distilling the knowledge in a neural network, 2015).
    Parameters in bfloat16 are moved as copies in float32, and are these copies rounded.

    Args:
        model: what :func:`compress`, ``tensormoe compress`` or :func:`reduce_experts` made of the
            original. Where it is sharded by ``fully_shard``, every process calls this with its
            own share of each batch.
        teacher: the original, of the same vocabulary.
        batches: token ids (batch, tokens), or mappings with ``input_ids``. A sequence is gone
            through again and again, and its items are asked for one by one; other iterables are
            listed.
        steps: of training, one batch each.
        train: ``"factors"`` for factors and routers, ``"factors only"``, or ``"all"`` for every
            parameter of the model, which may be one without factors then.
        lr: the highest learning rate; it rises to it linearly, and falls to zero by a cosine.
        warmup: share of the steps over which it rises.
        labels: share of the loss that is the cross-entropy of the text's own next tokens.
        weight_decay: as of :func:`tensormoe_torch.parameter_groups`.
        clip: norm of the gradients at most.
        held: batches that both models are compared on before and after; see :func:`evaluate`.
        checkpoint: a file that the state is written to. If it is there, the healing goes on from
            it, and ends with the numbers of one that was not interrupted.
        every: steps between two writes of it.
        callback: called before the first step, and after each.

    Returns:
        Losses, and the comparisons.

    Raises:
        SpecError: a model without factors, of another vocabulary or in another dtype; batches
            without tokens to predict; numbers that cannot be.
        TrainingError: a loss or gradients that are not finite; the model is as it was before the
            step that made it so.
        CheckpointError: a state of another healing, or one that can't be read or written.

    >>> import copy
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> from tensormoe_torch.compression import compress
    >>> config = MixtralConfig(vocab_size=32, hidden_size=8, intermediate_size=12,
    ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    ...     initializer_range=0.5)
    >>> original = MixtralForCausalLM(config)
    >>> model = copy.deepcopy(original)
    >>> _ = compress(model, "cp", rank=4)
    >>> tokens = torch.randint(0, 32, (8, 16))
    >>> report = heal(model, original, tokens, steps=20)
    >>> report.losses[-1] < report.losses[0]
    True
    """
    settings = Healing(steps, train, lr, warmup, labels, weight_decay, clip)
    for each in (model, teacher):
        instance(each, nn.Module, "model and teacher", "nn.Modules", SpecError)
    positive_int(every, "every")
    given = _indexed(batches)
    compared = None if held is None else [*_indexed(held)]
    named = trained_parameters(model, settings.train)
    path = None if checkpoint is None else checkpoint_path(checkpoint)
    with only(model, named):
        trained = Trained(model, named, settings)
        loss_of = Distillation(model, teacher, settings)
        # of the model that the healing began with
        state = None if path is None else read_state(path, trained, settings)
        before = state.before if state is not None else _compare(teacher, model, compared)
        if state is not None:
            state.restore(trained)
        losses = [] if state is None else [*state.losses]
        tokens = 0 if state is None else state.tokens
        _tell(callback, losses, settings)
        for step in range(len(losses), settings.steps):
            loss, count = _gradients(step, given[step % len(given)], loss_of, trained)
            if path is not None and step and step % every == 0:
                # parameters whose loss was seen
                write_state(path, trained, settings, losses, tokens, before)
            trained.step(step)
            losses.append(loss)
            tokens += count
            _tell(callback, losses, settings)
        _check_finite(trained, losses)
        if path is not None:
            write_state(path, trained, settings, losses, tokens, before)
    count = sum(each.numel() for each in named.values())
    after = _compare(teacher, model, compared)
    return HealingReport(settings.steps, count, tokens, tuple(losses), before, after)


def _indexed(batches: Any) -> Sequence[Any]:
    """Batches that can be asked for by number.

    Raises:
        SpecError: none.
    """
    if isinstance(batches, tuple):
        # as Tensor.split gives one; elsewhere it is the arguments of a model
        raise SpecError(
            "batches must be a list or one batch; got a tuple, which could be either. Give a list "
            "of token ids (batch, tokens): list(batches)."
        )
    found = batches if isinstance(batches, Sequence) else [*listed(batches)]
    if not len(found):
        raise SpecError("batches must hold tokens; got none. Give token ids (batch, tokens).")
    return found


def _compare(teacher: nn.Module, model: nn.Module, held: list[Any] | None) -> Evaluation | None:
    return None if held is None else evaluate(teacher, model, held)


def _gradients(step: int, batch: Any, loss_of: Distillation, trained: Trained) -> tuple[float, int]:
    """Gradients of a batch; returns its loss, and how many tokens were predicted.

    Raises:
        TrainingError: the loss or the gradients are not finite.
    """
    loss = loss_of(batch)
    loss.backward()
    value, tokens = _over_processes(loss.detach(), batch, trained)
    if isfinite(value) and isfinite(trained.gradient_norm()):
        return value, tokens
    good = step
    if not isfinite(value):
        good -= trained.go_back()
    raise TrainingError(
        f"{'the gradients are' if isfinite(value) else 'the loss is'} not finite at step "
        f"{step + 1}; the model is as it was {f'after step {good}' if good else 'at the start'}. "
        "Lower lr, or look for weights that are too large for their dtype."
    )


def _over_processes(loss: Tensor, batch: Any, trained: Trained) -> tuple[float, int]:
    """The mean loss and all tokens of the processes that share the parameters."""
    counted = int(next_tokens(batch, torch.device("cpu"))[1].sum())
    if not any(is_sharded(each) for each in trained.named.values()):
        return float(loss), counted
    import torch.distributed as dist

    both = torch.stack([loss.double(), loss.new_tensor(counted, dtype=torch.float64)])
    dist.all_reduce(both)
    return float(both[0]) / dist.get_world_size(), int(both[1])


@torch.no_grad()
def _check_finite(trained: Trained, losses: Sequence[float]) -> None:
    """Refuse a last step that left numbers which no loss has seen.

    Raises:
        TrainingError: they are not finite.
    """
    if all(bool(torch.isfinite(each).all()) for each in trained.copies.values()):
        return
    trained.go_back()
    raise TrainingError(
        f"the parameters are not finite after step {len(losses)}; the model is as it was before. "
        "Lower lr."
    )


def _tell(callback: HealingCallback | None, losses: Sequence[float], settings: Healing) -> None:
    if callback is not None:
        done = len(losses)
        last = losses[-1] if losses else None
        callback(HealingProgress(done, settings.steps, last, settings.rate(max(done - 1, 0))))

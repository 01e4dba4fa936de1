"""Batch norm and balance of gates over all processes that train on one batch."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import nn

from tensormoe_torch._gate import ExpertGate
from tensormoe_torch.mixtures import MixtureRouter

__all__ = ["synchronize_gates"]

M = TypeVar("M", bound=nn.Module)


def synchronize_gates(model: M, process_group: dist.ProcessGroup | None = None) -> M:
    """Let batch-norm gates share their statistics between processes, as ``nn.SyncBatchNorm`` does.

    In training, a gate with ``Gate(normalization="batch")`` then takes mean and variance over the
    logits of all processes, whose batches may differ in size, and gradients are those of the whole
    batch. Gates and routers with ``balance`` move their biases by the load
    of all of them. Every process must call
    the layer equally often. Other gates see each token by itself and stay as they are, and so do
    all batch norms of PyTorch's, which ``nn.SyncBatchNorm.convert_sync_batchnorm`` converts.

    Without it, each process normalizes by its own part of the batch and keeps its own running
    statistics and biases; those of the first one are saved.

    Args:
        model: any module, with μMoE layers anywhere inside; changed in place.
        process_group: the processes that share a batch; all of them by default.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.

    >>> from tensormoe import Gate
    >>> from tensormoe_torch import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=2, gate=Gate(normalization="batch"))
    >>> synchronize_gates(nn.Sequential(layer))[0].gate.synchronized
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}.")
    for module in model.modules():
        if isinstance(module, ExpertGate | MixtureRouter) and module.config.buffer_shapes():
            module.synchronized, module.process_group = True, process_group
    return model

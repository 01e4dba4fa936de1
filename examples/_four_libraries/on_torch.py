"""The run on PyTorch."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from _four_libraries.task import DECAY, Result, Task
from tensormoe_torch import MuMoE

__all__ = ["run"]


def run(task: Task) -> Result:
    head = nn.Linear(*task.weight.shape)
    head.weight = nn.Parameter(torch.from_numpy(task.weight.T.copy()))
    head.bias = nn.Parameter(torch.from_numpy(task.bias.copy()))
    model = nn.Sequential(MuMoE.load(task.checkpoint), nn.GELU(), head)
    adam = torch.optim.AdamW(model.parameters(), weight_decay=DECAY)
    losses = []
    start = perf_counter()
    for batch in task.batches:
        loss = cross_entropy(model(torch.from_numpy(batch.images)), torch.from_numpy(batch.labels))
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = batch.rate
        adam.step()
        losses.append(loss.item())
    seconds = perf_counter() - start
    with torch.no_grad():
        logits = model(torch.from_numpy(task.test))
    return Result(tuple(losses), task.accuracy(logits), seconds)

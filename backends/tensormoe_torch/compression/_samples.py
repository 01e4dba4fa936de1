"""Inputs of the experts of a model, from runs of the model on calibration batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.compression._dense import DenseExperts, one_by_one
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.surgery._inputs import evaluating, run_model

Batch: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"
"""An input of a model, its arguments, or its arguments by name."""

# tokens that are compared at a time
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Samples:
    """Tokens, the experts that they went to, and the router's weights.

    Args:
        x: (tokens, in).
        index: (tokens, k) numbers of experts.
        weights: (tokens, k).
    """

    x: Tensor
    index: Tensor
    weights: Tensor

    def of(self, role: str, experts: DenseExperts) -> Tensor:
        """The inputs of a projection, one row per token and expert: (tokens · k, in)."""
        rows = self.x.repeat_interleave(self.index.shape[1], dim=0)
        return experts.hidden(rows, self.index.reshape(-1)) if role == "down_proj" else rows

    def coefficients(self, count: int) -> Tensor:
        """The router's weight of each such row, in the column of its expert: (tokens · k, N)."""
        index = self.index.reshape(-1, 1)
        found = self.x.new_zeros(len(index), count)
        return found.scatter_(1, index, self.weights.reshape(-1, 1).to(found.dtype))


def collect(
    model: nn.Module, experts: Sequence[DenseExperts], batches: Batch | Iterable[Batch]
) -> list[Samples]:
    """Collect the inputs of every module of experts while the model runs, in evaluation mode.

    Experts that are called one by one have weights of 1: theirs are applied outside.

    Raises:
        SpecError: no batches, or some experts get no token of them.
    """
    parts: list[list[Samples]] = [[] for _ in experts]
    handles = []
    for found, each in zip(parts, experts, strict=True):
        modules = [each.module] if each.together else [*each.module.children()]
        for index, module in enumerate(modules):
            hook = _chosen(found, each.routes) if each.together else _alone(found, index)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    alone = isinstance(batches, Tensor | tuple | Mapping)
    listed: Any = [batches] if alone else batches
    if not isinstance(listed, Iterable):
        raise SpecError(f"inputs must be a batch or several of them; got {type(batches).__name__}.")
    try:
        with evaluating(model):
            for batch in listed:
                run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [_joined(found, each) for found, each in zip(parts, experts, strict=True)]


def _joined(parts: list[Samples], experts: DenseExperts) -> Samples:
    if not sum(len(each.x) for each in parts):
        raise SpecError(
            f"inputs must give all selected experts tokens; those of {experts.name!r} got none. "
            "Give other batches, or leave inputs out."
        )
    columns = zip(*((each.x, each.index, each.weights) for each in parts), strict=True)
    x, index, weights = (torch.cat(column) for column in columns)
    return Samples(x, index if experts.groups is None else experts.groups[index], weights)


def _chosen(found: list[Samples], count: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        names = [*inspect.signature(type(module).forward).parameters][1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        x, *choice = (given[name].detach() for name in names if given.get(name) is not None)
        rows = x.reshape(-1, x.shape[-1]).clone()
        if choice:
            index, weights = (each.reshape(len(rows), -1) for each in choice)
            found.append(Samples(rows, index, weights))
            return
        # a block of rows per expert; those of tokens that did not choose it are zero
        numbers = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // count)
        taken = rows.any(dim=1)
        rows = rows[taken]
        found.append(Samples(rows, numbers[taken, None], rows.new_ones(len(rows), 1)))

    return hook


def _alone(found: list[Samples], place: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)).detach()
        rows = x.reshape(-1, x.shape[-1]).clone()
        index = torch.full((len(rows), 1), place, device=rows.device)
        found.append(Samples(rows, index, rows.new_ones(len(rows), 1)))

    return hook


@torch.no_grad()
def output_error(experts: DenseExperts, factorized: FactorizedExperts, samples: Samples) -> float:
    """Error of outputs for samples, relative to those of the dense experts."""
    missing = whole = 0.0
    arrays = (samples.x, samples.index, samples.weights)
    for x, index, weights in zip(*(each.split(_BLOCK) for each in arrays), strict=True):
        rows = one_by_one(experts.routed, x, index) * weights.unsqueeze(-1)
        wanted = rows.sum(dim=1).to(x.dtype)
        found = factorized(x, index, weights)
        missing += float((found - wanted).float().square().sum())
        whole += float(wanted.float().square().sum())
    return (missing / whole) ** 0.5 if whole else 0.0

"""Inputs of the experts of a model, from runs of the model on calibration batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def take(place: int, samples: Samples) -> None:
        parts[place].append(_copied(samples))

    with watched(experts, take), evaluating(model):
        for batch in listed(batches):
            run_model(model, batch)
    return [_joined(found, each) for found, each in zip(parts, experts, strict=True)]


def listed(batches: Batch | Iterable[Batch]) -> Iterable[Any]:
    """Batches one by one, also where there is one alone.

    Raises:
        SpecError: neither a batch nor several.
    """
    if isinstance(batches, Tensor | tuple | Mapping):
        return [batches]
    if not isinstance(batches, Iterable):
        raise SpecError(f"inputs must be a batch or several of them; got {type(batches).__name__}.")
    return batches


@contextmanager
def watched(
    experts: Sequence[DenseExperts],
    take: Callable[[int, Samples], None],
    gradients: Callable[[int, Samples, Tensor], None] | None = None,
) -> Iterator[None]:
    """Hand over what modules of experts get while the model runs.

    Args:
        experts: of the model.
        take: called with a module's place in the list and a call's samples, which are views.
        gradients: called with the gradient (tokens, out) of what it gave as well, in a backward
            pass.
    """
    handles: list[Any] = []
    try:
        for place, each in enumerate(experts):
            modules = [each.module] if each.together else [*each.module.children()]
            for index, module in enumerate(modules):
                expert = None if each.together else index
                read = _Read(module, expert, each.routes, each.groups)
                handles.append(
                    module.register_forward_pre_hook(_taking(place, read, take), with_kwargs=True)
                )
                if gradients is not None:
                    hook = _probing(place, read, gradients)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def standing_in(experts: DenseExperts, new: Any) -> Iterator[None]:
    """The model computes with new experts meanwhile; nothing is put anywhere."""

    def whole(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> Any:
        return new(*args, **kwargs)

    def one(place: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: object) -> Any:
            return new[place](*args, **kwargs)

        return hook

    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [(experts.module, whole)]
    if not experts.together:
        hooks = [(each, one(place)) for place, each in enumerate(experts.module.children())]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def giving(experts: DenseExperts, outputs: Callable[[Samples], Tensor]) -> Iterator[None]:
    """Experts that are called together give something else meanwhile.

    Args:
        experts: of a layer.
        outputs: called with what each call gets; gives (tokens, out).
    """
    read = _Read(experts.module, None, experts.routes, experts.groups)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return outputs(read(args, kwargs)).to(output.dtype).reshape(output.shape)

    handle = experts.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _taking(place: int, read: _Read, take: Callable[[int, Samples], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            take(place, read(args, kwargs))

    return hook


def _probing(
    place: int, read: _Read, gradients: Callable[[int, Samples, Tensor], None]
) -> Callable[..., Tensor]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        samples = read(args, kwargs)
        if len(samples.x) != output.numel() // output.shape[-1]:
            raise SpecError(
                "gradients must be of experts that are called with their tokens' choices; "
                f"{type(module).__qualname__} gets a block of rows per expert. Leave gradients out."
            )
        # where gradients of what the experts gave are read: no parameter has any
        probe = torch.zeros_like(output, requires_grad=True)
        probe.register_hook(
            lambda found: gradients(place, samples, found.reshape(-1, found.shape[-1]))
        )
        return output + probe

    return hook


@dataclass(frozen=True, eq=False)
class _Read:
    """Samples from the arguments of a module's call.

    Args:
        module: that is called.
        expert: which one the module is; None for a module of all.
        count: experts of the router.
        groups: the expert behind each of the router's, where they were merged before.
    """

    module: nn.Module
    expert: int | None
    count: int
    groups: Tensor | None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Samples:
        if self.expert is None:
            names = [*inspect.signature(type(self.module).forward).parameters][1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            x, *choice = (given[name].detach() for name in names if given.get(name) is not None)
            rows = x.reshape(-1, x.shape[-1])
            index, weights = choice if choice else (None, None)
            if index is None or weights is None:
                return self._blocks(rows)
            # no size is left open: a call may have no rows
            k = index.numel() // len(rows) if len(rows) else index.shape[-1]
            index = index.reshape(len(rows), k)
            index = index if self.groups is None else self.groups[index]
            return Samples(rows, index, weights.reshape(len(rows), k))
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)).detach()
        rows = x.reshape(-1, x.shape[-1])
        index = torch.full((len(rows), 1), self.expert, device=rows.device)
        return Samples(rows, index, rows.new_ones(len(rows), 1))

    def _blocks(self, rows: Tensor) -> Samples:
        """A block of rows per expert; those of tokens that did not choose it are zero."""
        size = len(rows) // self.count
        numbers = torch.arange(self.count, device=rows.device).repeat_interleave(size)
        taken = rows.any(dim=1)
        index = numbers[taken, None]
        index = index if self.groups is None else self.groups[index]
        return Samples(rows[taken], index, rows.new_ones(len(index), 1))


def _copied(samples: Samples) -> Samples:
    return Samples(samples.x.clone(), samples.index, samples.weights)


def _joined(parts: list[Samples], experts: DenseExperts) -> Samples:
    if not sum(len(each.x) for each in parts):
        raise SpecError(
            f"inputs must give all selected experts tokens; those of {experts.name!r} got none. "
            "Give other batches, or leave inputs out."
        )
    columns = zip(*((each.x, each.index, each.weights) for each in parts), strict=True)
    return Samples(*(torch.cat(column) for column in columns))


@torch.no_grad()
def output_error(experts: DenseExperts, factorized: FactorizedExperts, samples: Samples) -> float:
    """Error of outputs for samples, relative to those of the dense experts."""
    missing, whole = output_squares(experts, factorized, samples)
    return (missing / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def output_squares(
    experts: DenseExperts, factorized: FactorizedExperts, samples: Samples
) -> tuple[float, float]:
    """Squared norms of the error of outputs for samples, and of the dense experts' outputs."""
    missing = whole = 0.0
    arrays = (samples.x, samples.index, samples.weights)
    for x, index, weights in zip(*(each.split(_BLOCK) for each in arrays), strict=True):
        rows = one_by_one(experts.routed, x, index) * weights.unsqueeze(-1)
        wanted = rows.sum(dim=1).to(x.dtype)
        found = factorized(x, index, weights)
        missing += float((found - wanted).float().square().sum())
        whole += float(wanted.float().square().sum())
    return missing, whole

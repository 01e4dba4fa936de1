"""The parameters of a model that are trained, and their optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tensormoe.errors import SpecError
from tensormoe_torch._base import Mixture
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._sharded import gathered, held_here
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._healing._settings import Healing
from tensormoe_torch.compression._put import sparse_parent
from tensormoe_torch.compression._routers import router_beside

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16,)


def trained_parameters(model: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name.

    Args:
        model: a compressed one.
        train: as of :class:`Healing`.

    Raises:
        SpecError: a model without factors, experts without a router, or parameters that can't be
            trained.
    """
    named = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Mixture) and module.bits is not None:
            raise SpecError(
                f"factors must be floating-point to be trained; those of {name!r} have "
                f"{module.bits} bits. Call dequantize() of such layers before, and "
                f"quantize({module.bits}) after."
            )
    if train != "all":
        wanted = {id(each) for each in _factors(model)}
        if not wanted:
            raise SpecError(
                f"the model must hold factors to be healed; {type(model).__name__} holds none. "
                "Compress it first, or train all of it: train='all'."
            )
        if train == "factors":
            wanted |= {id(each) for each in _routers(model)}
        named = {name: each for name, each in named.items() if id(each) in wanted}
    for name, each in named.items():
        if each.dtype not in (*_WIDE, *_NARROW):
            raise SpecError(
                f"parameters must be float64, float32 or bfloat16 to be trained; {name!r} is "
                f"{str(each.dtype).removeprefix('torch.')}. Load the model with dtype='float32'."
            )
    return named


def _factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Factors of all layers, and biases of experts."""
    for module in model.modules():
        if isinstance(module, Mixture):
            yield from module.factors.parameters()
        elif isinstance(module, FactorizedExperts):
            yield from module.parameters(recurse=False)


def _routers(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of gates, and of the routers of factorized experts."""
    # mixtures are made of this package's experts
    from tensormoe_torch.mixtures import MixtureRouter, SoftRouter, TaskRouter

    for name, module in model.named_modules():
        if isinstance(module, ExpertGate | MixtureRouter | SoftRouter | TaskRouter):
            yield from module.parameters()
        elif isinstance(module, FactorizedExperts) and sparse_parent(model, name) is None:
            try:
                router = router_beside(model, name, module, module.num_experts)
            except SpecError as error:
                raise SpecError(
                    f"{error} Or train the factors alone: train='factors only'."
                ) from None
            yield from router.parameters()


@contextmanager
def only(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients of some parameters alone, in training mode; all is put back afterwards."""
    before = [(each, each.requires_grad) for each in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    inside = {id(each) for each in trained.values()}
    try:
        for each, _ in before:
            each.requires_grad_(id(each) in inside)
        model.train()
        yield
    finally:
        for each, wanted in before:
            each.requires_grad_(wanted)
            each.grad = None
        for module, mode in modes:
            module.training = mode


class Trained:
    """Trained parameters and AdamW, whose numbers are float32 at least.

    A parameter of 16 bits has a copy in float32, which the optimizer moves; after every step it is
    the copy, rounded to the nearest. So steps smaller than half of a parameter's last digit add up,
    and the loss is that of the numbers which are saved.

    Args:
        model: it holds the parameters, and nothing else of it needs gradients.
        named: the parameters.
        settings: rates, decay and clipping.

    Attributes:
        copies: what the optimizer moves, by name: the parameter itself where it has 32 bits.
        optimizer: AdamW.
    """

    def __init__(
        self, model: nn.Module, named: Mapping[str, nn.Parameter], settings: Healing
    ) -> None:
        from tensormoe_torch._groups import parameter_groups

        self.named = named
        self.copies = {
            name: each if each.dtype in _WIDE else nn.Parameter(each.detach().float())
            for name, each in named.items()
        }
        places = {id(each): self.copies[name] for name, each in named.items()}
        groups = parameter_groups(model, settings.weight_decay)
        for group in groups:
            group["params"] = [places[id(each)] for each in group["params"]]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
        self._settings = settings
        self._kept: list[Tensor] = []

    def gradient_norm(self) -> float:
        """The norm of all gradients, which the copies get from the parameters."""
        for name, copy in self.copies.items():
            parameter = self.named[name]
            if copy is not parameter:
                copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)
                parameter.grad = None
        found = [each.grad for each in self.copies.values() if each.grad is not None]
        self._norm = gathered(get_total_norm(found))
        return float(self._norm)

    def step(self, step: int) -> None:
        """Move the parameters by their gradients, clipped."""
        self.keep()
        clip_grads_with_norm_(self.copies.values(), self._settings.clip, self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Give parameters of 16 bits the values of their copies."""
        for name, copy in self.copies.items():
            if copy is not self.named[name]:
                self.named[name].copy_(copy)

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the parameters as they are."""
        here = [held_here(each.detach()) for each in self.copies.values()]
        if self._kept:
            torch._foreach_copy_(self._kept, here)
        else:
            self._kept = [each.clone() for each in here]

    @torch.no_grad()
    def go_back(self) -> bool:
        """Put back what was remembered last; returns whether anything was."""
        if self._kept:
            here = [held_here(each.detach()) for each in self.copies.values()]
            torch._foreach_copy_(here, self._kept)
            self.round()
        return bool(self._kept)

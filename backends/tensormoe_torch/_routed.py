"""Routers and experts of sparse blocks, ours and others', and edits of what they do when called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tensormoe.editing._routing import scaled_weights
from tensormoe.errors import SpecError
from tensormoe.mixtures import ProductConfig, SparseConfig
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import is_named, is_stacked, linears_by_role
from tensormoe_torch.compression._routers import router_beside
from tensormoe_torch.mixtures._base import MixtureModule
from tensormoe_torch.mixtures._router import MixtureRouter
from tensormoe_torch.mixtures._soft import SoftRouter

Amounts = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Found:
    """The only router of a block.

    Args:
        block: it is in.
        router: it; of ours or of others.
        experts: those of a block of others; None for ours.
        count: its outputs.
    """

    block: nn.Module
    router: nn.Module
    experts: nn.Module | None
    count: int


def found_in(block: object) -> Found:
    """The router of a block, and of others' the experts beside it.

    Raises:
        TypeError: not a module.
        SpecError: none, or several.
    """
    if not isinstance(block, nn.Module):
        raise TypeError(f"layers must be modules; got {type(block).__qualname__}.")
    ours = {
        name: Found(block, each, None, _outputs(each))
        for name, each in block.named_modules()
        if isinstance(each, MixtureRouter | SoftRouter)
    }
    others = {name: each for name, each in block.named_modules() if _holds_experts(block, name)}
    places = [*ours, *others]
    if len(places) != 1:
        listed = ", ".join(map(repr, places[:3])) + (", …" if len(places) > 3 else "")
        raise SpecError(
            f"a layer must hold one router of experts; {type(block).__qualname__} holds "
            f"{len(places)}{f': {listed}' if places else ''}. Pass the sparse block itself, such "
            "as model.layers[3].mlp, or a list of them."
        )
    if ours:
        return next(iter(ours.values()))
    ((name, experts),) = others.items()
    if not name:
        raise SpecError(
            "a layer must hold a router of experts beside them; got the experts alone. Pass the "
            "block that they are in."
        )
    count = _experts_of(experts)
    return Found(block, router_beside(block, name, experts, count), experts, count)


def _outputs(router: MixtureRouter | SoftRouter) -> int:
    config: Any = router.config
    if isinstance(config, ProductConfig):
        return config.keys.num_experts
    # where experts were merged, a router has more outputs than there are experts
    return int(config.num_choices if isinstance(config, SparseConfig) else config.num_experts)


def _holds_experts(block: nn.Module, name: str) -> bool:
    """Whether it is the experts of a block of others."""
    module = block.get_submodule(name)
    if isinstance(module, nn.ModuleList):
        is_list = any(linears_by_role(each) for each in module) and is_named(name, module)
    else:
        is_list = False
    if not (is_list or is_stacked(module) or isinstance(module, FactorizedExperts)):
        return False
    parts = name.split(".") if name else []
    parents = (block.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    return not any(isinstance(each, MixtureModule) for each in parents)


def _experts_of(experts: Any) -> int:
    if isinstance(experts, FactorizedExperts):
        return experts.num_experts
    return len(experts) if isinstance(experts, nn.ModuleList) else int(experts.down_proj.shape[0])


class Edited:
    """A module's ``forward`` with edits, which takes its place in the instance for a while.

    Compiled models see it and compile anew, other than for a hook that is put on later, which they
    pass over; and a copy of the module runs the copy's own parameters.

    Args:
        module: whose ``forward`` it is.
        former: what was in its place in the instance, if anything.

    Attributes:
        edits: of one kind, in order; none of them changes nothing.
    """

    def __init__(self, module: nn.Module, former: Callable[..., Any] | None) -> None:
        self.module, self.former = module, former
        self.edits: tuple[Any, ...] = ()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module as it is without edits."""
        if self.former is not None:
            return self.former(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def leave(self) -> None:
        """Put back what was in its place."""
        if self.former is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.former


class SteeredRouter(Edited):
    """A router of others to whose logits amounts are added; it chooses by its own rule."""

    edits: tuple[Amounts, ...]
    calls = 0

    # where a graph breaks inside of a mode, a compiled part would run under it a second time
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if not self.edits:
            return self.run(*args, **kwargs)
        total = [sum(each) for each in zip(*self.edits, strict=True)]
        with _LogitsAdded(total) as mode:
            made = self.run(*args, **kwargs)
        if mode.seen != 1:
            raise SpecError(
                f"a router must make its {len(total)} logits by one linear product to be steered; "
                f"{type(self.module).__qualname__} makes {mode.seen}. Scale the weights of its "
                "experts instead: scaled_routing."
            )
        return made


class _LogitsAdded(TorchFunctionMode):
    """Adds to what a linear product makes, and keeps silent experts out of the choice."""

    def __init__(self, amounts: list[float]) -> None:
        super().__init__()
        self.amounts, self.seen = amounts, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        count, kwargs = len(self.amounts), kwargs or {}
        if func in (torch.topk, Tensor.topk) and -inf in self.amounts:
            scores, *rest = args
            if scores.shape[-1] == count:
                # a bias for the choice, as DeepSeek-V3 has, would bring them back
                silent = [each == -inf for each in self.amounts]
                mask = torch.tensor(silent, device=scores.device)
                index = func(scores.masked_fill(mask, -inf), *rest, **kwargs)[1]
                return torch.return_types.topk((scores.gather(-1, index), index))
        made = func(*args, **kwargs)
        if func is F.linear and made.shape[-1] == count:
            self.seen += 1
            made = made + torch.tensor(self.amounts, dtype=made.dtype, device=made.device)
        return made


class ScaledExperts(Edited):
    """Experts of others, called with indices and weights, of which some weights are multiplied."""

    edits: tuple[Mapping[int, float], ...]

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        for factors in self.edits:
            top_k_weights = scaled_weights(top_k_index, top_k_weights, factors, BACKEND)
        return self.run(hidden_states, top_k_index, top_k_weights)


class ScaledExpert(Edited):
    """One expert of a list, whose outputs are multiplied."""

    edits: tuple[float, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.run(*args, **kwargs)
        for factor in self.edits:
            made = torch.zeros_like(made) if factor == 0.0 else made * factor
        return made


class WatchedBlock(Edited):
    """A block of others, of which a call that does without a call of its router is an error."""

    edits: tuple[SteeredRouter, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.run(*args, **kwargs)
        before = [each.calls for each in self.edits]
        made = self.run(*args, **kwargs)
        for router, calls in zip(self.edits, before, strict=True):
            if router.calls == calls:
                raise SpecError(
                    f"a router must be called to be steered; {type(self.module).__qualname__} "
                    f"takes the weight of its {type(router.module).__qualname__} and does not call "
                    "it. Scale weights instead, with scaled_routing."
                )
        return made


def check_called_together(experts: nn.Module) -> None:
    """Refuse experts whose weights do not come with global numbers.

    Raises:
        SpecError: another signature, or experts that are spread over devices by transformers.
    """
    names = [*inspect.signature(type(experts).forward).parameters]
    if names[1:] != ["hidden_states", "top_k_index", "top_k_weights"]:
        raise SpecError(
            "experts must be called with hidden_states, top_k_index and top_k_weights to be "
            f"scaled; {type(experts).__qualname__} takes {', '.join(names[1:])}. Compress them "
            "first, or edit their weights."
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise SpecError(
            "experts that are spread over devices have numbers of their own on each; got such a "
            f"{type(experts).__qualname__}. Scale them before they are spread."
        )

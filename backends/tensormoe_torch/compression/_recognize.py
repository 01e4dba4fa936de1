"""The activation between an expert's projections, recognized by what the experts compute.

Names of parameters say little about what happens between them. So a few experts run on made-up
inputs, and their activation is the one with which their weights give the same outputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch._activations import ACTIVATIONS
from tensormoe_torch._hooks import without_hooks
from tensormoe_torch.compression._dense import DenseExperts, one_by_one
from tensormoe_torch.compression._experts import Activation, FactorizedExperts
from tensormoe_torch.compression._find import takes_blocks, takes_routing
from tensormoe_torch.compression._gate import Own, has_own_gate, own_activation
from tensormoe_torch.surgery._inputs import evaluating

_TOKENS = 6


def recognized(experts: DenseExperts) -> DenseExperts:
    """The experts with the activation that theirs is.

    Raises:
        SpecError: none gives their outputs, or they can't be called as experts are.
    """
    shown = experts.module if experts.together else next(experts.module.children())
    _check_plain(experts, shown)
    # one expert in double precision tells activations apart in any dtype; all of them would be
    # a large copy, and have an activation by name
    few = experts if experts.together else _first(experts)
    x, index, weights = _made_up(few)
    used = index.unique().tolist()
    arrays = [each for stack in few.stacks.values() for each in (stack.weights, stack.biases)]
    given = [each[place] for each in arrays if each is not None for place in used]
    if not all(bool(torch.isfinite(each).all()) for each in given):
        # the search refuses them, and says which
        return experts
    wanted = _outputs(experts, shown, (x, index, weights))
    own = Own(shown) if has_own_gate(shown) else own_activation(shown)
    acts: Iterable[Activation] = ACTIVATIONS.values() if own is None else (own,)
    errors = [_error(replace(few, act=act), x, index, weights, wanted) for act in acts]
    least = min(errors)
    # sums in another order, on some devices in reduced precision
    if least > max(1e-3, 8 * torch.finfo(x.dtype).eps):
        raise SpecError(
            f"the experts {experts.name!r} ({type(shown).__name__}) must compute "
            "(act(x G) · (x U)) D, or act(x U) D, with an activation of their own or one of "
            f"{', '.join(map(repr, ACTIVATIONS))}; they compute something else. Leave them out of "
            "the selection."
        )
    return replace(experts, act=[*acts][errors.index(least)])


def _check_plain(experts: DenseExperts, shown: nn.Module) -> None:
    """Refuse what a few calls in evaluation mode would not show.

    Raises:
        SpecError: dropout, experts spread over processes, or another way of being called.
    """
    for each in experts.module.modules():
        if isinstance(each, nn.modules.dropout._DropoutNd) and each.p:
            raise SpecError(
                f"experts must be without dropout; {experts.name!r} has {each}. Set its p to 0."
            )
    if getattr(experts.module, "_is_expert_parallel", False):
        raise SpecError(
            f"experts must be in one process; those of {experts.name!r} are spread over several. "
            "Load the model without expert parallelism."
        )
    if experts.together and not (takes_routing(shown) or takes_blocks(shown)):
        wanted = [*inspect.signature(FactorizedExperts.forward).parameters]
        found = [*inspect.signature(type(shown).forward).parameters]
        raise SpecError(
            f"stacked experts must be called with {', '.join(wanted[1:])}, or with "
            f"{wanted[1]} alone; those of {experts.name!r} ({type(shown).__name__}) take "
            f"{', '.join(found[1:])}. Leave them out of the selection."
        )


def _first(experts: DenseExperts) -> DenseExperts:
    stacks = {role: stack.first(torch.float64) for role, stack in experts.stacks.items()}
    return replace(experts, stacks=stacks)


def _made_up(experts: DenseExperts) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that reach both sides of an activation, at most two experts each, and weights."""
    generator = torch.Generator().manual_seed(0)
    first = next(iter(experts.stacks.values())).weights[0]
    x = torch.randn(_TOKENS, first.shape[0], generator=generator)
    # outputs of the first projection are about 2
    norm = float(first.float().norm()) / first.shape[1] ** 0.5
    scale = 2.0 / norm if 0.0 < norm < float("inf") else 1.0
    count = min(2, experts.count)
    index = torch.arange(count).expand(_TOKENS, count).clone()
    weights = torch.rand(_TOKENS, count, generator=generator) + 0.1
    like: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
    return (x * scale).to(**like), index.to(first.device), weights.to(**like)


def _outputs(
    experts: DenseExperts, shown: nn.Module, given: tuple[Tensor, Tensor, Tensor]
) -> object:
    """Outputs of the model's own code for made-up tokens.

    Raises:
        SpecError: it fails.
    """
    try:
        with evaluating(shown), without_hooks(shown):
            if experts.together and takes_routing(shown):
                return shown(*given)
            x, index, weights = given
            if experts.together:
                every = shown(x.repeat(experts.count, 1)).unflatten(0, (experts.count, len(x)))
                chosen = every[index, torch.arange(len(x), device=x.device)[:, None]]
                return (chosen * weights.unsqueeze(-1)).sum(1)
            return copy.deepcopy(shown).to("cpu", torch.float64)(x) * weights
    except Exception as error:
        # any code may run here
        raise SpecError(
            f"the experts {experts.name!r} ({type(shown).__name__}) can't be tried out; calling "
            f"them failed: {error}. Leave them out of the selection."
        ) from error


def _error(
    experts: DenseExperts, x: Tensor, index: Tensor, weights: Tensor, wanted: object
) -> float:
    """Relative error of outputs."""
    with torch.no_grad():
        found = (one_by_one(experts.routed, x, index) * weights.unsqueeze(-1)).sum(1)
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return float("inf")
    missing = (found - wanted).double().norm() / wanted.double().norm().clamp(min=1e-300)
    return float(missing) if bool(torch.isfinite(missing)) else float("inf")

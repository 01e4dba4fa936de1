"""Contexts in which routers of sparse blocks are steered, and the weights of experts scaled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import inf
from typing import Any

import torch
from torch import nn

from tensormoe._validation import flag
from tensormoe.editing._amounts import check_amounts, check_factors, check_numbers
from tensormoe.errors import SpecError
from tensormoe.mixtures import MonetConfig
from tensormoe_torch._routed import (
    Edited,
    Found,
    ScaledExpert,
    ScaledExperts,
    SteeredRouter,
    WatchedBlock,
    check_called_together,
    found_in,
)
from tensormoe_torch._sharded import opened
from tensormoe_torch.mixtures._router import MixtureRouter
from tensormoe_torch.mixtures._soft import SoftRouter

Layers = nn.Module | Sequence[nn.Module]


def steered_routing(layers: Layers, additions: Mapping[int, float]) -> AbstractContextManager[None]:
    """A context in which routers add amounts to the logits of some experts.

    Experts are chosen, and weighted, from the changed logits by the router's own rule: an amount
    above zero brings an expert to tokens that did without it, and ``-inf`` silences it, so that
    another takes its place. It is :func:`tensormoe.editing.steer_routes` wherever the layers are
    called from, under ``generate`` and in models that are compiled already, which compile anew; a
    router of another model then runs uncompiled, so that ``fullgraph=True`` is an error.

    Parameters are not touched, so that files do not hold it; copies that are made meanwhile do.
    Contexts may be nested, and amounts add up. Records that are given to a mixture are used as they
    are.

    Args:
        layers: a sparse block, or a list: ``SparseMoE`` or ``DiverseMoE``, or one of another model
            with its router beside the experts, as Mixtral, Qwen and OLMoE have it, dense or after
            :func:`compress`.
        additions: an amount by the expert's index, finite or ``-inf``; where experts were merged,
            by that of the router's output.

    Raises:
        TypeError: not modules, or not a mapping.
        ShapeError: an index out of range, or every expert silenced.
        SpecError: a layer without a router, or with several; a router without one logit per expert;
            an amount that cannot be.

    >>> import torch
    >>> from tensormoe_torch import SparseMoE
    >>> layer, x = SparseMoE(8, 16, experts=4, top_k=2), torch.randn(5, 8)
    >>> with steered_routing(layer, {3: -torch.inf, 1: 100.0}):
    ...     chosen = layer.route(x).top_k_index
    >>> bool((chosen == 3).any()), chosen[:, 0].tolist()
    (False, [1, 1, 1, 1, 1])
    """
    edits: list[AbstractContextManager[Any]] = []
    for found in _each(layers):
        amounts = tuple(check_amounts(additions, found.count, infinite=True))
        if isinstance(found.router, SoftRouter) or not _has_logits(found.router):
            raise SpecError(
                "a router must have one logit per expert to be steered; got a "
                f"{type(found.router).__qualname__} of other logits. Scale weights instead, with "
                "scaled_routing."
            )
        if isinstance(found.router, MixtureRouter):
            edits.append(_noted(found.router, "steering", amounts))
        else:
            edits.append(_steered_router(found, amounts))
    return _all(edits)


def scaled_routing(layers: Layers, factors: Mapping[int, float]) -> AbstractContextManager[None]:
    """A context in which the weights of some experts are multiplied, and so their outputs.

    A factor above one amplifies an expert, and one of zero silences it: no other takes its place,
    and the others keep their weights. It is :func:`tensormoe.editing.scale_routes`, and otherwise
    like :func:`steered_routing`.

    Args:
        layers: as for :func:`steered_routing`; of the library's, ``SoftMoE`` and ``ProductMoE`` as
            well.
        factors: a finite factor by the expert's index; where experts were merged, by that of the
            router's output.

    Raises:
        TypeError: not modules, or not a mapping.
        ShapeError: an index out of range.
        SpecError: a layer without a router, or with several; a factor that is not a finite number;
            experts whose weights cannot be told.

    >>> import torch
    >>> from tensormoe_torch import SparseMoE
    >>> layer, x = SparseMoE(8, 16, experts=2, top_k=2), torch.randn(5, 8)
    >>> before = layer(x)
    >>> with scaled_routing(layer, {0: 2.0, 1: 2.0}):
    ...     twice = layer(x)
    >>> torch.allclose(twice, 2 * before, atol=1e-6)
    True
    """
    edits: list[AbstractContextManager[Any]] = []
    for found in _each(layers):
        checked = check_factors(factors, found.count)
        experts = found.experts
        if isinstance(found.router, SoftRouter | MixtureRouter):
            if isinstance(found.router.config, MonetConfig):
                raise SpecError(
                    "experts must have one weight each to be scaled; got a mixture whose weights "
                    "are products of one per level. Scale what it is made of."
                )
            edits.append(_noted(found.router, "scaling", checked))
        elif isinstance(experts, nn.ModuleList):
            for index, factor in checked.items():
                edits.append(_edited(experts[index], ScaledExpert, factor))
        else:
            assert experts is not None
            check_called_together(experts)
            edits.append(_edited(experts, ScaledExperts, checked))
    return _all(edits)


def silenced_routing(
    layers: Layers, indices: int | Iterable[int], *, replaced: bool = True
) -> AbstractContextManager[None]:
    """A context in which no token has anything of some experts.

    Args:
        layers: as for :func:`steered_routing`, or without ``replaced`` as for
            :func:`scaled_routing`.
        indices: of the silent experts, or one.
        replaced: whether other experts are chosen in their place, as by a router without them.
            Otherwise tokens lose their shares, and others keep theirs.

    Raises:
        TypeError, ShapeError, SpecError: as :func:`steered_routing` and :func:`scaled_routing`.

    >>> import torch
    >>> from tensormoe_torch import SparseMoE
    >>> layer, x = SparseMoE(8, 16, experts=3, top_k=1), torch.randn(50, 8)
    >>> own = layer.route(x).top_k_index[:, 0] == 0
    >>> with silenced_routing(layer, 0, replaced=False):
    ...     y = layer(x)
    >>> bool((y[own] == 0).all())
    True
    """
    flag(replaced, "replaced")
    silent = check_numbers(indices, min(found.count for found in _each(layers)))
    if replaced:
        return steered_routing(layers, dict.fromkeys(silent, -inf))
    return scaled_routing(layers, dict.fromkeys(silent, 0.0))


@torch.no_grad()
def steer_router(layer: nn.Module, additions: Mapping[int, float]) -> None:
    """Add amounts to the logits of some experts for good, in the bias of the router.

    What :func:`steered_routing` does for a while then belongs to the layer: files hold it, and
    training goes on from it. Sharded biases are written on all processes, which make the same call.

    Args:
        layer: one block, as for :func:`steered_routing`, whose router has a bias: a mixture with
            ``Router(bias=True)``, or that of another model with a parameter ``bias``.
        additions: as for :func:`steered_routing`.

    Raises:
        TypeError, ShapeError, SpecError: as :func:`steered_routing`; also a router without a bias.

    >>> from tensormoe.routing import Router
    >>> from tensormoe_torch import SparseMoE
    >>> layer = SparseMoE(8, 16, experts=3, top_k=1, router=Router(bias=True))
    >>> steer_router(layer, {1: 0.5})
    >>> layer.router.bias.tolist()
    [0.0, 0.5, 0.0]
    """
    found = found_in(layer)
    amounts = check_amounts(additions, found.count, infinite=True)
    bias = found.router._parameters.get("bias")
    if bias is None or tuple(bias.shape) != (found.count,):
        raise SpecError(
            f"a router must have a bias of its {found.count} logits to be steered for good; got a "
            f"{type(found.router).__qualname__} without. Make the mixture with Router(bias=True), "
            "or steer it for a while, with steered_routing."
        )
    with opened([bias]) as (held,):
        held += torch.tensor(amounts, dtype=held.dtype, device=held.device)


def _each(layers: Layers) -> list[Found]:
    several = [*layers] if isinstance(layers, list | tuple | nn.ModuleList) else [layers]
    if not several:
        raise SpecError("layers must name at least one layer; got none.")
    return [found_in(each) for each in several]


def _has_logits(router: nn.Module) -> bool:
    return not isinstance(router, MixtureRouter) or "projection" in router._parameters


@contextmanager
def _all(edits: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in edits:
            stack.enter_context(each)
        yield


@contextmanager
def _noted(router: Any, name: str, edit: Any) -> Iterator[None]:
    """A router of the library's with one more edit."""
    setattr(router, name, (*getattr(router, name), edit))
    try:
        yield
    finally:
        # others may have been opened since
        setattr(router, name, without(getattr(router, name), edit))


@contextmanager
def _steered_router(found: Found, amounts: tuple[float, ...]) -> Iterator[None]:
    """A router of others with one more edit, in a block that has to call it."""
    with (
        _edited(found.router, SteeredRouter, amounts) as router,
        _edited(found.block, WatchedBlock, router),
    ):
        yield


@contextmanager
def _edited(module: nn.Module, kind: type[Edited], edit: Any) -> Iterator[Edited]:
    """A module of others with one more edit of what it does when called."""
    former = vars(module).get("forward")
    here: Edited = former if isinstance(former, kind) else kind(module, former)
    vars(module)["forward"] = here
    here.edits = (*here.edits, edit)
    try:
        yield here
    finally:
        here.edits = without(here.edits, edit)
        # what others have put around it stays, and calls what has no edits any more
        if not here.edits and vars(module).get("forward") is here:
            here.leave()


def without(edits: tuple[Any, ...], edit: Any) -> tuple[Any, ...]:
    """Edits without one of those that are equal to ``edit``."""
    left = [*edits]
    if edit in left:
        left.remove(edit)
    return tuple(left)

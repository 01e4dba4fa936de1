"""Experts that matter least, taken out of a model with their router's outputs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import above, find_experts
from tensormoe_torch.compression._put import dense_layers, put_experts, sparse_parent
from tensormoe_torch.compression._reduce_report import ReducedModule
from tensormoe_torch.compression._routers import COUNTS
from tensormoe_torch.compression._samples import Samples, watched
from tensormoe_torch.surgery._inputs import evaluating, run_model


@dataclass(frozen=True, eq=False)
class Pruned:
    """The experts of a layer that stay.

    Args:
        source: all of them.
        router: chooses from them.
        kept: numbers of those that stay, in ascending order.
        frequencies: how often each was chosen.
        saliency: by which they were kept; None where it was their frequency.
    """

    source: DenseExperts
    router: nn.Module
    kept: tuple[int, ...]
    frequencies: tuple[float, ...]
    saliency: tuple[float, ...] | None


def check_model(model: nn.Module, names: Sequence[str], keep: int | float) -> None:
    """Refuse to prune models of transformers to what their configuration can't say.

    Args:
        model: a model of any kind.
        names: of the experts that are selected.
        keep: experts per layer; a float for a share that is allotted over layers.

    Raises:
        SpecError: layers would have different numbers of experts.
    """
    if not _pretrained(model):
        return
    if isinstance(keep, float):
        raise SpecError(
            f"pruned models of transformers must keep equally many experts in every layer, as "
            f"their configuration has one number; got keep={keep!r}. Give an integer, pass "
            "uniform=True, or merge: how='merge'."
        )
    left = [name for name in find_experts(model, None) if name not in names]
    if left:
        raise SpecError(
            f"all layers of a model of transformers must be pruned, as their configuration has one "
            f"number of experts; {left[0]!r} is not selected. Select all, or merge: how='merge'."
        )


def _pretrained(model: nn.Module) -> list[Any]:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return []
    return [each for each in model.modules() if isinstance(each, modeling.PreTrainedModel)]


def prune(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    layers: Sequence[Pruned],
    batches: list[Any],
    tell: Callable[[int], None],
) -> tuple[ReducedModule, ...]:
    """Prune layers, and see whether the model still runs.

    Args:
        model: it holds them.
        chosen: the modules of experts by name.
        layers: what stays of each.
        batches: that the model runs again.
        tell: called with the number of batches that it ran.

    Raises:
        SpecError: it does not; then it is as it was.
    """
    by_module = {id(layer.source.module): layer for layer in layers}
    done = set()
    with ExitStack() as undo:
        for name, module in chosen.items():
            layer = by_module[id(module)]
            parent = model.get_submodule(name.rpartition(".")[0])
            if len(layer.kept) == layer.source.count or id(parent) in done:
                continue
            done.add(id(parent))
            if sparse_parent(model, name) is not None:
                _prune_ours(model, name, layer, undo.callback)
            elif isinstance(module, FactorizedExperts):
                raise SpecError(
                    f"experts of tensormoe must be a SparseMoE's to be pruned; {name!r} are not. "
                    "Prune the original model, or merge them: how='merge'."
                )
            else:
                _prune_theirs(model, name, layer, undo.callback)
        _try(model, layers, batches, tell)
        _check_shapes(model, layers)
        undo.pop_all()
    return tuple(
        ReducedModule(
            layer.source.name,
            type(layer.source.module).__name__,
            (layer.source.count, len(layer.kept)),
            tuple((n,) for n in layer.kept),
            layer.frequencies,
            layer.saliency,
            None,
            layer.source.parameters_of(len(layer.kept)),
            None,
        )
        for layer in layers
    )


@torch.no_grad()
def _prune_ours(model: nn.Module, name: str, layer: Pruned, later: Callable[..., Any]) -> None:
    source, kept = layer.source, list(layer.kept)
    stacks = {role: stack.tensors() for role, stack in source.stacks.items()}
    new = FactorizedExperts(
        dense_layers(
            {role: weights[kept] for role, (weights, _) in stacks.items()},
            {role: bias[kept] for role, (_, bias) in stacks.items() if bias is not None},
        ),
        source.act,
    )
    parent = sparse_parent(model, name)
    before = parent.experts, parent.router, parent.config
    put_experts(model, name, source.module, new, kept=kept)

    def restore() -> None:
        parent.experts, parent.router, parent.config = before

    later(restore)


def _prune_theirs(model: nn.Module, name: str, layer: Pruned, later: Callable[..., Any]) -> None:
    source, kept = layer.source, list(layer.kept)
    count = source.count
    modules = [source.module, layer.router, *above(model, name)]
    if source.together:
        _take(source.module, kept, count, later)
    else:
        own = source.module._modules
        later(_fill, own, dict(own))
        left = [each for n, each in enumerate(own.values()) if n in layer.kept]
        _fill(own, {str(n): each for n, each in enumerate(left)})
    _take(layer.router, kept, count, later)
    block = model.get_submodule(name.rpartition(".")[0])
    for each in _around(block, layer.router):
        _take_vectors(each, kept, count, later)
    configs = [each.config for each in _pretrained(model)]
    for each in (*modules, *configs):
        for key in COUNTS:
            if getattr(each, key, None) == count:
                later(setattr, each, key, count)
                setattr(each, key, len(kept))


def _fill(table: dict[str, Any], values: Mapping[str, Any]) -> None:
    table.clear()
    table.update(values)


def _take(module: nn.Module, kept: list[int], count: int, later: Callable[..., Any]) -> None:
    """Take entries of those parameters and buffers whose first axis is that of experts."""
    for table, key, old in _held(module):
        if old.ndim and old.shape[0] == count:
            _put(table, key, old, 0, kept, later)


def _around(block: nn.Module, router: nn.Module) -> list[nn.Module]:
    """Modules that may hold a scale or bias of a router's choice: it may lie beside its weight."""
    path = next(name for name, each in block.named_modules() if each is router)
    return [*above(block, path), *router.children()]


def _take_vectors(
    module: nn.Module, kept: list[int], count: int, later: Callable[..., Any]
) -> None:
    """Take entries of those that hold one number per expert, in whichever axis."""
    for table, key, old in _held(module):
        if old.numel() == count and count in old.shape:
            _put(table, key, old, old.shape.index(count), kept, later)


def _held(module: nn.Module) -> list[tuple[Any, str, Tensor]]:
    """A module's own parameters and buffers, with the tables that they are in."""
    tables: tuple[Any, Any] = (module._parameters, module._buffers)
    return [(each, key, old) for each in tables for key, old in each.items() if old is not None]


@torch.no_grad()
def _put(
    table: Any, key: str, old: Tensor, axis: int, kept: list[int], later: Callable[..., Any]
) -> None:
    new = old.index_select(axis, torch.tensor(kept, device=old.device))
    later(table.__setitem__, key, old)
    table[key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _try(
    model: nn.Module, layers: Sequence[Pruned], batches: list[Any], tell: Callable[[int], None]
) -> None:
    """Run the batches again.

    Raises:
        SpecError: it fails, or routers choose experts that are gone.
    """
    sources = [
        replace(layer.source, module=model.get_submodule(layer.source.name)) for layer in layers
    ]
    most = [-1] * len(layers)

    def take(place: int, samples: Samples) -> None:
        if samples.index.numel():
            most[place] = max(most[place], int(samples.index.max()))

    try:
        with watched(sources, take), evaluating(model):
            for count, batch in enumerate(batches, 1):
                run_model(model, batch)
                tell(count)
    except Exception as error:
        # any code may run here
        raise SpecError(
            f"the model must run with fewer experts; it fails: {error} Merge them: how='merge'."
        ) from error
    for layer, last in zip(layers, most, strict=True):
        if last >= len(layer.kept):
            raise SpecError(
                f"the router of {layer.source.name!r} must choose from the {len(layer.kept)} "
                f"experts that are left; it chose {last}. Merge them: how='merge'."
            )


def _check_shapes(model: nn.Module, layers: Sequence[Pruned]) -> None:
    """Refuse a model of transformers that no longer is what its configuration says.

    Raises:
        SpecError: a router has something per expert that was not found.
    """
    blocks = [f"{layer.source.name.rpartition('.')[0]}." for layer in layers]
    names = {id(module): name for name, module in model.named_modules()}
    for each in _pretrained(model):
        try:
            with torch.device("meta"):
                wanted = type(each)(copy.deepcopy(each.config)).state_dict()
        except Exception:
            # any code may run here; a class that is made in another way says nothing
            continue
        start = names[id(each)]
        for key, array in each.state_dict().items():
            name = f"{start}.{key}" if start else key
            whole = wanted.get(key, array).shape
            if whole != array.shape and name.startswith(tuple(blocks)):
                raise SpecError(
                    f"all that a pruned model holds per expert must be found; {name!r} has shape "
                    f"{tuple(array.shape)}, and the configuration gives it {tuple(whole)}. Merge "
                    "the experts: how='merge'."
                )

"""Fewer experts in a sparse model, in place: merged, or pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tensormoe.compression import ExpertGroups, cluster_experts, group_experts, most_frequent
from tensormoe.errors import SpecError
from tensormoe_torch._hub import mark, unmark
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import find_experts, takes_blocks
from tensormoe_torch.compression._merge import Grouped, merge
from tensormoe_torch.compression._prune import Pruned, check_model, prune
from tensormoe_torch.compression._put import sparse_parent
from tensormoe_torch.compression._read import read_experts
from tensormoe_torch.compression._reduce_report import ReductionReport
from tensormoe_torch.compression._reduction import Reduction
from tensormoe_torch.compression._routers import check_prunable, find_router
from tensormoe_torch.compression._routers import watched as watched_routers
from tensormoe_torch.compression._samples import Batch, Samples, watched
from tensormoe_torch.compression._tally import Tally
from tensormoe_torch.surgery._inputs import evaluating, run_model
from tensormoe_torch.surgery._replace import at, num_parameters
from tensormoe_torch.surgery._select import Select
from tensormoe_torch.surgery._surroundings import check_surroundings


def reduce_experts(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    *,
    keep: int | float,
    how: str = "merge",
    groups: str = "router",
    score: str = "frequency",
    uniform: bool = False,
    select: Select | None = None,
    align: bool = True,
    callback: Callable[[int], None] | None = None,
) -> ReductionReport:
    """Leave a sparse model fewer experts, in place: merge experts, or prune the least important.

    ``"merge"``: experts become groups, and of each group the average takes the place of all,
    weighted by how often each is chosen, hidden units permuted to fit those of the one that is
    chosen most often. The router stays and chooses from all old experts: two choices of one merged
    expert count with the sum of their weights. Groups are by ``"router"`` (M-SMoE; Li et al. 2024:
    the experts that are chosen most often, each with those whose router logits are most like its
    own) or by ``"outputs"`` (HC-SMoE; Chen et al. 2025: hierarchical clustering of the experts'
    average outputs).

    ``"prune"``: some experts stay, and the others are gone with the router's outputs for them; it
    chooses from what is left, and normalizes over that. Those stay that have the highest score:
    ``"frequency"``, how often they are chosen, or ``"reap"`` (Lasby et al. 2025), the mean of
    router weight times norm of output over the tokens that go to an expert.

    Experts are found as by :func:`compress`, which can decompose merged ones further (MC-SMoE).
    Dtype, device, mode, hooks and ``requires_grad`` stay. Either all that is selected is changed,
    or nothing is and an error says why. Make optimizers afterwards: they hold parameters.

    Args:
        model: it holds the experts.
        inputs: calibration batches, as for :func:`compress`; the model runs each twice, in
            evaluation mode: for statistics, and to compare outputs or, pruned, to see that it runs.
            Memory does not grow with their number.
        keep: experts per layer as an integer; or as a float in (0, 1] a share of all experts, those
            that are chosen most often in their layer, so that layers may keep different numbers.
        how: ``"merge"`` or ``"prune"``.
        groups: of experts that are merged: ``"router"``, or ``"outputs"``, for which every expert
            runs all tokens.
        score: of experts when some are pruned: ``"frequency"``, or ``"reap"``.
        uniform: whether a share is of every layer's experts, so that all layers keep it.
        select: which experts, as for :func:`compress`; all by default.
        align: whether hidden units are permuted before they are averaged.
        callback: called with the number of batches that ran, up to twice their number.

    Returns:
        Which experts became one or stayed, how often they were chosen, and what it saves; ``print``
        it for a table.

    Raises:
        SpecError: no experts or none that are known, a selection that matches nothing or something
            else, no router beside them, experts that were merged before, weights that are used in
            other places too, calibration batches without a token or that choose fewer experts than
            are to stay, or arguments that cannot be.
            Pruned models of transformers must keep equally many experts in every layer, as their
            configuration has one number.
        ShapeError: experts of different shapes, or weights or logits that are not finite.
        MissingDependencyError: SciPy is not installed, which matches hidden units.

    >>> import torch
    >>> from tensormoe_torch import SparseMoE
    >>> layer = SparseMoE(8, 16, experts=6, top_k=2)
    >>> model = nn.Sequential(nn.Linear(8, 8), layer)
    >>> report = reduce_experts(model, torch.randn(50, 8), keep=4)
    >>> layer.config.experts.num_experts, len(layer.config.groups), report.modules[0].experts
    (4, 6, (6, 4))
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    wanted = Reduction(keep, how, groups, score, uniform, align)
    chosen = find_experts(model, select)
    check_surroundings(model, chosen)
    names = list({id(module): name for name, module in reversed(chosen.items())}.values())[::-1]
    layers = [_layer(model, chosen[name], name) for name in names]
    for layer in layers:
        wanted.check_experts(layer.source)
    if how == "prune":
        check_model(model, names, keep if wanted.allots else 1)
        for layer in layers:
            check_prunable(model, layer.source, layer.router)
    batches = _listed(inputs)
    tallies = _tallies(model, layers, wanted, batches, _told(callback, 0))
    count = num_parameters(model)
    frequencies = [each.frequencies() for each in tallies]
    least = 1 if how == "merge" else max(each.most for each in tallies)
    kept = wanted.counts(frequencies, least)
    for tally, number in zip(tallies, kept, strict=True):
        _check_chosen(tally, number, wanted)
    tell = _told(callback, len(batches))
    if how == "merge":
        grouped = [
            Grouped(each.experts, _groups(each, number, groups), each.frequencies())
            for each, number in zip(tallies, kept, strict=True)
        ]
        modules = merge(model, chosen, grouped, align, batches, tell)
    else:
        stay = [
            _stay(layer, each, n, score)
            for layer, each, n in zip(layers, tallies, kept, strict=True)
        ]
        modules = prune(model, chosen, stay, batches, tell)
    mark(model)
    # a pruned model of transformers is a plain one
    unmark(model)
    tokens = max(each.tokens for each in tallies)
    sizes = (count, num_parameters(model))
    return ReductionReport(how, wanted.criterion, tokens, modules, sizes)


@dataclass(frozen=True, eq=False)
class _Layer:
    """The experts of a layer.

    Args:
        source: them.
        router: chooses from them.
    """

    source: DenseExperts
    router: nn.Module


def _layer(model: nn.Module, module: nn.Module, name: str) -> _Layer:
    source = read_experts(module, name)
    if source.together and takes_blocks(module):
        raise SpecError(
            f"experts must be called with what the router chose to be merged or pruned; those of "
            f"{name!r} ({type(module).__name__}) get a block of tokens each. Factorize them with "
            "compress."
        )
    if isinstance(module, FactorizedExperts) and module.bits is not None:
        raise SpecError(
            f"experts must be floating-point numbers to become fewer; those of {name!r} are "
            f"rounded to {module.bits} bits. Reduce first, then round what is left."
        )
    sparse = sparse_parent(model, name)
    if source.groups is not None or (sparse is not None and sparse.config.groups is not None):
        raise SpecError(
            f"experts must not have been merged before; those of {name!r} were. Start from the "
            "original model."
        )
    return _Layer(source, find_router(model, source))


def _listed(inputs: Any) -> list[Any]:
    """Batches that can be gone through twice."""
    if isinstance(inputs, Tensor | tuple | Mapping):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise SpecError(f"inputs must be a batch or several of them; got {type(inputs).__name__}.")
    return [*inputs]


def _told(callback: Callable[[int], None] | None, before: int) -> Callable[[int], None]:
    def tell(count: int) -> None:
        if callback is not None:
            callback(before + count)

    return tell


def _tallies(
    model: nn.Module,
    layers: list[_Layer],
    wanted: Reduction,
    batches: list[Any],
    tell: Callable[[int], None],
) -> list[Tally]:
    """Statistics of all layers, from a run of the model.

    Raises:
        SpecError: experts that get no tokens, or a router that is not called.
        ShapeError: activations that are not finite.
    """
    saliency, means = wanted.score == "reap", wanted.groups == "outputs"
    tallies = [Tally(layer.source, saliency, means) for layer in layers]

    def take(place: int, samples: Samples) -> None:
        with at(layers[place].source.name):
            tallies[place].add(samples)

    def take_logits(place: int, logits: Tensor) -> None:
        tallies[place].add_logits(logits)

    sources, routers = [each.source for each in layers], [each.router for each in layers]
    with watched_routers(routers, take_logits), watched(sources, take), evaluating(model):
        for count, batch in enumerate(batches, 1):
            run_model(model, batch)
            tell(count)
    for layer, tally in zip(layers, tallies, strict=True):
        name = layer.source.name
        if not tally.seen:
            raise SpecError(
                f"inputs must give all selected experts tokens; those of {name!r} got none. Give "
                "other batches, or leave these experts out of the selection."
            )
        if not tally.called:
            raise SpecError(
                f"the router of experts must be called; that of {name!r}, a "
                f"{type(layer.router).__name__}, is not. Leave {name!r} out of the selection."
            )
    return tallies


def _check_chosen(tally: Tally, kept: int, wanted: Reduction) -> None:
    """Refuse statistics that do not say which experts stay.

    Raises:
        SpecError: fewer experts were chosen at all.
    """
    if kept == tally.experts.count or wanted.groups == "outputs" or tally.chosen >= kept:
        return
    raise SpecError(
        f"inputs must choose at least the {kept} experts that stay; the {tally.tokens:,} tokens of "
        f"{tally.experts.name!r} chose {tally.chosen} of {tally.experts.count}. Give more of them, "
        "or lower keep."
    )


def _groups(tally: Tally, number: int, by: str) -> ExpertGroups:
    with at(tally.experts.name):
        if by == "outputs":
            return cluster_experts(tally.frequencies(), tally.mean_outputs(), number)
        return group_experts(tally.frequencies(), tally.similarity(), number)


def _stay(layer: _Layer, tally: Tally, number: int, score: str) -> Pruned:
    frequencies = tally.frequencies()
    saliency = tally.salient() if score == "reap" else None
    kept = most_frequent(frequencies if saliency is None else saliency, number)
    return Pruned(layer.source, layer.router, kept, frequencies, saliency)

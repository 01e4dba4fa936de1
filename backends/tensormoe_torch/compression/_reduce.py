"""Fewer experts in a sparse model, in place: merged, or pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._validation import choice, flag
from tensormoe.compression import (
    ExpertGroups,
    allot_experts,
    choice_frequencies,
    cosine_similarity,
    group_experts,
    merge_stacks,
    most_frequent,
)
from tensormoe.errors import SpecError
from tensormoe_torch._hub import mark
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import find_experts, takes_blocks
from tensormoe_torch.compression._prune import Pruned, check_model, prune
from tensormoe_torch.compression._put import dense_layers, put_experts, sparse_parent
from tensormoe_torch.compression._read import is_concatenated, read_experts
from tensormoe_torch.compression._reduce_report import ReducedModule, ReductionReport
from tensormoe_torch.compression._routers import check_prunable, find_router, watched
from tensormoe_torch.compression._samples import Batch, Samples, collect, output_error
from tensormoe_torch.surgery._replace import at, num_parameters
from tensormoe_torch.surgery._select import Select
from tensormoe_torch.surgery._surroundings import check_surroundings

WAYS = ("merge", "prune")


def reduce_experts(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    *,
    keep: int | float,
    how: str = "merge",
    select: Select | None = None,
    align: bool = True,
) -> ReductionReport:
    """Leave a sparse model fewer experts, in place: merge experts, or prune those used least.

    ``"merge"`` (M-SMoE; Li et al. 2024): the experts that are chosen most often stay, each other
    one joins the one with the most similar router logits, its hidden units are permuted to fit, and
    the average over the group, weighted by how often each is chosen, takes their place. The router
    stays and chooses from all old experts: two choices of one merged expert count with the sum of
    their weights. ``"prune"``: the other experts are gone, and so are the router's outputs for
    them; it chooses from what is left, and normalizes over that.

    Experts are found as by :func:`compress`, which can decompose merged ones further (MC-SMoE).
    Dtype, device, mode, hooks and ``requires_grad`` stay. Either all that is selected is changed,
    or nothing is and an error says why. Make optimizers afterwards: they hold parameters.

    Args:
        model: it holds the experts.
        inputs: calibration batches, as for :func:`compress`; the model runs each once, in
            evaluation mode, and when it was pruned once more, to see that it runs.
        keep: experts per layer as an integer; or as a float in (0, 1] a share of all experts, those
            that are chosen most often in their layer, so that layers may keep different numbers.
        how: ``"merge"`` or ``"prune"``.
        select: which experts, as for :func:`compress`; all by default.
        align: whether hidden units are permuted before they are averaged.

    Returns:
        Which experts became one or stayed, how often they were chosen, and what it saves; ``print``
        it for a table.

    Raises:
        SpecError: no experts or none that are known, a selection that matches nothing or something
            else, no router beside them, experts that were merged before, weights that are used in
            other places too, calibration batches without a token, or arguments that cannot be.
            Pruned models of transformers must keep equally many experts in every layer, as their
            configuration has one number.
        ShapeError: experts of different shapes, or weights or logits that are not finite.
        MissingDependencyError: SciPy is not installed, which matches hidden units.

    >>> from tensormoe_torch import SparseMoE
    >>> layer = SparseMoE(8, 16, experts=6, top_k=2)
    >>> model = nn.Sequential(nn.Linear(8, 8), layer)
    >>> report = reduce_experts(model, torch.randn(50, 8), keep=4)
    >>> layer.config.experts.num_experts, len(layer.config.groups), report.modules[0].experts
    (4, 6, (6, 4))
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    how = choice(how, WAYS, "how", SpecError)
    flag(align, "align")
    allot_experts([], keep)
    chosen = find_experts(model, select)
    check_surroundings(model, chosen)
    names = list({id(module): name for name, module in reversed(chosen.items())}.values())[::-1]
    layers = [_layer(model, chosen[name], name) for name in names]
    if how == "merge" and align:
        _check_alignable(layers)
    if how == "prune":
        check_model(model, names, keep)
        for layer in layers:
            check_prunable(model, layer.source, layer.router)
    batches = _listed(inputs)
    with watched([layer.router for layer in layers]) as logits:
        samples = collect(model, [layer.source for layer in layers], batches)
    count = num_parameters(model)
    for layer, sample, found in zip(layers, samples, logits, strict=True):
        layer.calibrate(sample, found)
    least = 1 if how == "merge" else max(sample.index.shape[1] for sample in samples)
    kept = allot_experts([layer.frequencies for layer in layers], keep, least=least)
    if how == "merge":
        modules = _merge(model, chosen, layers, kept, align)
    else:
        wanted = [
            Pruned(each.source, each.router, most_frequent(each.frequencies, n), each.frequencies)
            for each, n in zip(layers, kept, strict=True)
        ]
        modules = prune(model, chosen, wanted, batches)
    mark(model)
    return ReductionReport(how, modules, (count, num_parameters(model)))


@dataclass(eq=False)
class _Layer:
    """The experts of a layer, and what calibration says of them.

    Args:
        source: the experts.
        router: chooses from them.
        sample: tokens, with the experts that they went to.
        frequencies: how often each expert was chosen.
        similarity: of their router logits.
    """

    source: DenseExperts
    router: nn.Module
    sample: Samples = field(init=False)
    frequencies: tuple[float, ...] = field(init=False)
    similarity: tuple[tuple[float, ...], ...] = field(init=False)

    def calibrate(self, sample: Samples, logits: list[Tensor]) -> None:
        if not logits:
            raise SpecError(
                f"the router of experts must be called; that of {self.source.name!r}, a "
                f"{type(self.router).__name__}, is not. Leave {self.source.name!r} out of the "
                "selection."
            )
        with at(self.source.name):
            self.sample = sample
            self.frequencies = choice_frequencies(sample.index, self.source.count)
            self.similarity = cosine_similarity(torch.cat(logits))


def _layer(model: nn.Module, module: nn.Module, name: str) -> _Layer:
    source = read_experts(module, name)
    if source.together and takes_blocks(module):
        raise SpecError(
            f"experts must be called with what the router chose to be merged or pruned; those of "
            f"{name!r} ({type(module).__name__}) get a block of tokens each. Factorize them with "
            "compress."
        )
    sparse = sparse_parent(model, name)
    if source.groups is not None or (sparse is not None and sparse.config.groups is not None):
        raise SpecError(
            f"experts must not have been merged before; those of {name!r} were. Start from the "
            "original model."
        )
    return _Layer(source, find_router(model, source))


def _check_alignable(layers: list[_Layer]) -> None:
    """Refuse units that can't be permuted: those whose gate and up projection take turns.

    Raises:
        SpecError: they do.
    """
    for layer in layers:
        source = layer.source
        if source.keeps_biases and not is_concatenated(source.module):
            raise SpecError(
                f"units of experts can't be aligned where gate and up projection take turns, as in "
                f"{source.name!r} ({type(source.module).__name__}). Pass align=False."
            )


def _listed(inputs: Any) -> list[Any]:
    """Batches that can be gone through twice."""
    if isinstance(inputs, Tensor | tuple | Mapping):
        return [inputs]
    if not isinstance(inputs, Iterable):
        raise SpecError(f"inputs must be a batch or several of them; got {type(inputs).__name__}.")
    return [*inputs]


def _merge(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    layers: list[_Layer],
    kept: tuple[int, ...],
    align: bool,
) -> tuple[ReducedModule, ...]:
    """Merge experts, then put them where the old ones were."""
    made: dict[int, tuple[FactorizedExperts, tuple[int, ...]]] = {}
    modules = []
    for layer, number in zip(layers, kept, strict=True):
        source = layer.source
        with at(source.name):
            groups = group_experts(layer.frequencies, layer.similarity, number)
            off = 0.0
            if number < source.count:
                new = _merged(source, groups, align)
                new.groups = torch.tensor(groups.groups, device=layer.sample.index.device)
                off = output_error(source, new, layer.sample)
                made[id(source.module)] = new, groups.groups
        modules.append(
            ReducedModule(
                source.name,
                type(source.module).__name__,
                (source.count, number),
                groups.members,
                layer.frequencies,
                groups.similarity,
                source.parameters_of(number),
                off,
            )
        )
    for name, old in chosen.items():
        if id(old) not in made:
            continue
        new, behind = made[id(old)]
        if sparse_parent(model, name) is None:
            put_experts(model, name, old, new)
        else:
            # the configuration has them
            new.groups = None
            put_experts(model, name, old, new, groups=behind)
    return tuple(modules)


@torch.no_grad()
def _merged(source: DenseExperts, groups: ExpertGroups, align: bool) -> FactorizedExperts:
    weights = {role: stack.weights for role, stack in source.stacks.items()}
    biases = {r: stack.biases for r, stack in source.stacks.items() if stack.biases is not None}
    merged = merge_stacks(weights, groups, biases=biases, align=align)
    return FactorizedExperts(dense_layers(*merged), source.act)

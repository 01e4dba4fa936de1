"""The experts of a sparse model, decomposed and replaced in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._rounding import checked_bits
from tensormoe._validation import flag
from tensormoe.compression import Calibration
from tensormoe.compression._predicted import Lost, badness, lost
from tensormoe.decomposition import Decomposition, Progress, Search, decompose
from tensormoe.decomposition._several import Choice
from tensormoe.errors import SpecError
from tensormoe.selection import Allocation, Budget
from tensormoe_torch._hub import mark
from tensormoe_torch._layer import MuMoE
from tensormoe_torch.compression._compress_checks import (
    calibrated_layer,
    check_bits,
    check_calibration,
    check_sizes,
    kinds_of,
)
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.compression._find import find_experts
from tensormoe_torch.compression._gate_up import arranged, better, check_gate_up
from tensormoe_torch.compression._put import put_experts
from tensormoe_torch.compression._read import read_experts
from tensormoe_torch.compression._report import (
    CompressedModule,
    CompressedProjection,
    CompressionReport,
)
from tensormoe_torch.compression._samples import (
    Batch,
    Samples,
    collect,
    listed,
    output_error,
    standing_in,
)
from tensormoe_torch.compression._share import check_choice, check_share, given_parts
from tensormoe_torch.surgery._allocated import allocated_modules, check_alone
from tensormoe_torch.surgery._replace import at, num_bytes, num_parameters
from tensormoe_torch.surgery._select import Select
from tensormoe_torch.surgery._surroundings import check_surroundings


def compress(
    model: nn.Module,
    factorization: Choice | Allocation,
    *,
    rank: int | tuple[int, ...] | None = None,
    budget: Budget | int | float | None = None,
    tolerance: float | None = None,
    select: Select | None = None,
    inputs: Batch | Iterable[Batch] | None = None,
    weighted: bool = False,
    sequential: bool = False,
    calibration: Calibration | None = None,
    weighting: str = "inputs",
    expert_weights: str = "equal",
    share: str = "equal",
    search: Search | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    seed: int = 0,
    bits: int | str | None = None,
    gate_up: str = "stored",
) -> CompressionReport:
    """Replace the experts of a sparse model by factors of them, in place; its router stays.

    Found are the stacks of experts of Hugging Face transformers 5 (parameters ``gate_up_proj`` and
    ``down_proj``: Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, Llama 4 and others), lists of equal experts
    of ``nn.Linear`` layers (``gate_proj``, ``up_proj`` and ``down_proj``, or ``w1``, ``w3`` and
    ``w2``), and dense experts of ours, a :class:`SparseMoE`'s or merged ones
    (:func:`reduce_experts`). Each projection is decomposed by itself, and
    :class:`FactorizedExperts` take their place, called as they were: they compute what the dense
    experts rebuilt from the factors would. Where experts gate in a way of their own, as those of
    GPT-OSS do, gate and up projection are decomposed as one, and biases stay as they are. A
    :class:`SparseMoE`'s configuration follows.

    Dtype, device, mode, hooks and ``requires_grad`` stay. Either all that is selected is replaced,
    or nothing is and an error says why. Make optimizers afterwards: they hold parameters.

    Args:
        model: it holds the experts.
        factorization: of every projection: a value such as ``CP(64)``, or a name with one of the
            three below. With a budget also several names, or ``"auto"`` for all that there are:
            each projection gets the one that loses least, as
            :func:`tensormoe.decomposition.decompose` finds it; with a calibration, the one by
            which the outputs, or with gradients the loss, lose least. Or a
            :class:`tensormoe.selection.Allocation` of experts, which has one with
            its rank for each projection of each layer, and names the layers.
        rank: bond sizes, with a name.
        budget: of each projection: a :class:`tensormoe.Budget`, a number of parameters, or as a
            float in (0, 1] a share of the weights' own; of weights alone, as the router stays.
        tolerance: the relative error of the weights that each projection is to reach with as few
            parameters as can be.
        select: which experts: patterns, a class, or a function of name and module, as for
            :func:`replace`; a function is asked about modules with experts alone. All by default.
        inputs: calibration batches: an input of the model (a tuple or a mapping are its arguments),
            or any other iterable of inputs. The model runs each once, in evaluation mode, and what
            the experts get is kept meanwhile.
        weighted: whether factors minimize the error of outputs for these inputs rather than that of
            the weights.
        sequential: whether the inputs of a layer are those that it gets once the layers before it
            are compressed, so that it makes up for them; with ``weighted``. The model then runs the
            inputs, which are kept, once for each layer.
        calibration: second moments to weight by instead of inputs, from :func:`calibrate`; errors
            of outputs are then predicted from them.
        weighting: what of the calibration errors are weighted by, one of
            :data:`tensormoe.compression.WEIGHTINGS`.
        expert_weights: what an expert counts, one of
            :data:`tensormoe.compression.EXPERT_WEIGHTS`.
        share: how a budget that is a share is shared out over projections, one of
            :data:`tensormoe.compression.SHARES`: each has the same, or, with a calibration, those
            have more by which the model loses more.
        search: how long to search for each projection, a time limit included.
        callback: called with a :class:`tensormoe.decomposition.Progress` after every sweep, which
            has the projection's name; True ends the search for that projection.
        seed: of the random starts.
        bits: 8 or 4 to keep the factors as integers of so many bits with scales, see
            :meth:`MuMoE.quantize`; 16 or None for factors in the dtype of the weights. A budget
            that is a share is then one of the weights' bytes, and ``"dense"``, which rounds the
            weights themselves, needs none. Errors are those of the rounded factors. With a
            calibration and such a budget ``"auto"``: each projection is stored as it loses least
            within its bytes, in 16, 8 or 4 bits, and factors or the weights themselves.
        gate_up: how gate and up projection are decomposed, one of
            :data:`tensormoe.compression.GATE_UP`: ``"stored"``, as two, but for experts that gate
            in a way of their own and those of a :class:`SparseMoE`, which have one; ``"joined"`` as
            one layer, (in → 2 · hidden); ``"apart"`` as two; or ``"auto"``, with a budget that is a
            share: each layer gets the way that loses less of the outputs, or of the loss, where
            there is a calibration or ``weighted`` inputs, and of the weights elsewhere.

    Returns:
        What was replaced, with errors and parameters; ``print`` it for a table.

    Raises:
        SpecError: no experts, a selection that matches nothing or something else, experts that
            compute something else, weights that are used in other places too, or arguments that
            cannot be, a tolerance with bits among them.
        ShapeError: experts of different shapes, or weights that are not finite.
        CheckpointError: a calibration of another model.
        RankError, BudgetError: as :func:`tensormoe.decomposition.decompose`, with the name of the
            projection; and a rank with which factors would have more entries than the weights, or
            more bytes.
        KeyboardInterrupt: Ctrl-C; the model is as it was.

    >>> class Expert(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w1, self.w3 = nn.Linear(6, 8), nn.Linear(6, 8)
    ...         self.w2 = nn.Linear(8, 6)
    ...     def forward(self, x):
    ...         return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
    >>> model = nn.ModuleDict({"experts": nn.ModuleList(Expert() for _ in range(4))})
    >>> report = compress(model, "cp", rank=4)
    >>> report.names, type(model["experts"]).__name__
    (('experts',), 'FactorizedExperts')
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be an nn.Module; got {type(model).__name__}.")
    flag(weighted, "weighted")
    if weighted and inputs is None:
        raise SpecError("weighted compression needs inputs; got none. Pass inputs=….")
    if flag(sequential, "sequential") and not weighted:
        raise SpecError("sequential compression is weighted by inputs. Pass weighted=True too.")
    check_calibration(model, calibration, weighted, weighting, expert_weights)
    check_share(share, bits, budget, calibration)
    check_choice(factorization, rank, budget, tolerance)
    check_gate_up(gate_up, factorization, budget)
    if isinstance(factorization, Allocation):
        given = {"rank": rank, "budget": budget, "tolerance": tolerance, "select": select}
        check_alone("compress", given)
        wanted = allocated_modules(model, factorization, ("experts",), "replace")
        select = tuple(wanted)
    chosen = find_experts(model, select)
    check_surroundings(model, chosen)
    # a module that is used in several places is replaced by one
    names = list({id(module): name for name, module in reversed(chosen.items())}.values())[::-1]
    sources = [arranged(model, read_experts(chosen[name], name), gate_up) for name in names]
    others = [replace(each, joined=True) for each in sources] if gate_up == "auto" else []
    chosen_kinds = _kinds(sources, others, factorization)
    for source in sources:
        check_bits(source, bits)
        if budget is None and tolerance is None:
            check_sizes(source, chosen_kinds[source.name], rank, checked_bits(bits))
    samples: list[Samples] | list[None] = [None] * len(sources)
    batches = [] if inputs is None else listed(inputs)
    if sequential:
        batches = [*batches]
    elif inputs is not None:
        samples = collect(model, sources, batches)

    parts = given_parts(sources, chosen_kinds, budget, share, bits, calibration, others)
    count, size = num_parameters(model), num_bytes(model)
    made: dict[int, FactorizedExperts] = {}
    modules = []
    with ExitStack() as replaced:
        for source, at_once in zip(sources, samples, strict=True):
            sample = collect(model, [source], batches)[0] if sequential else at_once

            def fitted(
                source: DenseExperts, role: str, sample: Samples | None = sample
            ) -> tuple[Decomposition, Lost | None]:
                part = parts[source.name, role]
                with at(f"{source.name}.{role}"):
                    made, off = _decomposed(
                        source,
                        role,
                        sample,
                        part.kind,
                        rank=rank,
                        budget=part.budget,
                        tolerance=tolerance,
                        weighted=weighted,
                        calibrated=calibrated_layer(source, role, calibration),
                        weighting=(weighting, expert_weights),
                        search=search,
                        callback=_named(callback, f"{source.name}.{role}"),
                        seed=seed,
                        bits=part.bits,
                    )
                if made.report.ended == "interrupted":
                    # all or nothing
                    raise KeyboardInterrupt
                return made, off

            made_of: Mapping[str, tuple[Decomposition, Lost | None]] = {
                role: fitted(source, role) for role in source.roles
            }
            if gate_up == "auto":
                rows = sample if weighted else None
                source, made_of = better(source, made_of, fitted, rows)
            found = {role: each for role, (each, _) in made_of.items()}
            increases = {
                role: None if off is None else off.predicted_loss
                for role, (_, off) in made_of.items()
            }
            few = {role: parts[source.name, role].bits for role in found}
            layers = {role: _layer(each, few[role]) for role, each in found.items()}
            new = FactorizedExperts(layers, source.new_act, _kept_biases(source))
            made[id(source.module)] = new
            off = None if sample is None else output_error(source, new, sample)
            new.groups = source.groups
            if sequential:
                replaced.enter_context(standing_in(source, new))
            sizes = {role: each.factor_bytes for role, each in layers.items()}
            modules.append(_reported(source, found, increases, off, few, sizes))
    for name, old in chosen.items():
        put_experts(model, name, old, made[id(old)])
    mark(model)
    kept = sum(_rounded_entries(each) for each in {id(m): m for m in made.values()}.values())
    counts, nbytes = (count, num_parameters(model) + kept), (size, num_bytes(model))
    return CompressionReport(tuple(modules), counts, nbytes)


def _kinds(
    sources: Iterable[DenseExperts],
    others: Iterable[DenseExperts],
    factorization: Choice | Allocation,
) -> dict[str, Mapping[str, Choice]]:
    """The factorization of each projection by layer, and of what is tried besides.

    Raises:
        SpecError: an allocation for other experts.
    """
    found: dict[str, Mapping[str, Choice]] = {}
    for source in (*sources, *others):
        kinds = kinds_of(source, factorization)
        found[source.name] = {**found.get(source.name, {}), **kinds}
    return found


def _layer(found: Decomposition, bits: int | None) -> MuMoE:
    """The layer of factors; rounded ones have the codes again that their values were made of."""
    layer = MuMoE.restore(found.config(), found.parameters)
    return layer if bits is None else layer.quantize(bits)


def _rounded_entries(experts: FactorizedExperts) -> int:
    """Entries of factors that are no parameters any more."""
    layers = (each for each in experts.modules() if isinstance(each, MuMoE))
    return sum(each.spec.num_parameters for each in layers if each.bits is not None)


def _reported(
    source: DenseExperts,
    found: Mapping[str, Decomposition],
    increases: Mapping[str, float | None],
    off: float | None,
    bits: Mapping[str, int | None],
    sizes: Mapping[str, int],
) -> CompressedModule:
    itemsize = source.dtype.itemsize
    projections = tuple(
        CompressedProjection(
            r,
            source.own_sizes(r)[:2],
            each.spec.factorization,
            each.report,
            bits[r],
            (itemsize * each.report.dense_parameters, sizes[r]),
            increases[r],
        )
        for r, each in found.items()
    )
    return CompressedModule(
        source.name, type(source.module).__name__, source.count, projections, off
    )


def _kept_biases(source: DenseExperts) -> dict[str, Tensor]:
    """Biases that are no part of the factors, by role."""
    if not source.keeps_biases:
        return {}
    found = {role: stack.tensors()[1] for role, stack in source.stacks.items()}
    return {role: each.clone() for role, each in found.items() if each is not None}


@torch.no_grad()
def _decomposed(
    source: DenseExperts,
    role: str,
    sample: Samples | None,
    factorization: Choice,
    *,
    rank: int | tuple[int, ...] | None,
    budget: Budget | int | float | None,
    tolerance: float | None,
    weighted: bool,
    calibrated: tuple[Calibration, str] | None,
    weighting: tuple[str, str],
    search: Search | None,
    callback: Callable[[Progress], bool | None] | None,
    seed: int,
    bits: int | None,
) -> tuple[Decomposition, Lost | None]:
    """Factors of a projection, and what is lost on a calibration's data."""
    weights, bias = source.decomposed(role)
    moments = judge = None
    if calibrated is not None:
        calibration, layer = calibrated
        judge = partial(badness, calibration, layer, role, bias=bias is not None)
        moments = calibration.moments(layer, role, *weighting, bias=bias is not None)
    found = decompose(
        weights,
        factorization,
        rank=rank,
        budget=budget,
        tolerance=tolerance,
        bias=bias,
        inputs=None if sample is None else sample.of(role, source),
        coefficients=None if sample is None else sample.coefficients(source.count),
        weighted=weighted,
        moments=moments,
        search=search,
        callback=callback,
        judge=judge,
        seed=seed,
        bits=bits,
    )
    if calibrated is None:
        return found, None
    off = lost(calibration, layer, role, _pairs(found, weights, bias), bias is not None)
    report = replace(found.report, output_error=off.output_error)
    return replace(found, report=report), off


def _pairs(found: Decomposition, weights: Tensor, bias: Tensor | None) -> Iterator[tuple[Any, Any]]:
    """Of every expert its matrix, a row of biases below it, and what is missing, on the host."""
    layer = MuMoE.restore(found.config(), found.parameters)
    for place in range(len(weights)):
        whole, row = layer.expert(place)
        matrix, rebuilt = weights[place], whole
        if bias is not None:
            assert row is not None
            matrix = torch.cat([matrix, bias[place][None]])
            rebuilt = torch.cat([rebuilt, row[None]])
        given, stored = (each.double().cpu().numpy() for each in (matrix, rebuilt))
        yield given, given - stored


def _named(
    callback: Callable[[Progress], bool | None] | None, name: str
) -> Callable[[Progress], bool | None] | None:
    """A callback whose progress carries a name."""
    return None if callback is None else lambda each: callback(replace(each, name=name))

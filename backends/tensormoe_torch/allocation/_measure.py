"""Losses of a model by factors of each of its projections, measured on samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tensormoe import LayerSpec
from tensormoe._validation import choice, flag, instance, is_number
from tensormoe.decomposition import Search
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization, FactorizationLike
from tensormoe.selection import LayerSite, Sensitivity, SensitivityPoint
from tensormoe.selection._allocate_units import Unit, checked_kinds, units_of
from tensormoe_torch.allocation._losses import LossFunction, mean_loss, squared_gradients
from tensormoe_torch.allocation._moments import output_errors
from tensormoe_torch.allocation._sites import model_sites
from tensormoe_torch.allocation._weights import Weights, read_weights
from tensormoe_torch.compression._samples import Batch, Samples, collect
from tensormoe_torch.surgery._inputs import evaluating

MEASURES = ("loss", "gradient", "error")
_AROUND = (0.3, 0.6, 1.0, 1.6, 2.5)


def measure_sensitivities(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    *,
    what: str | Sequence[str] | None = None,
    sites: Sequence[LayerSite] | None = None,
    factorization: FactorizationLike | Sequence[FactorizationLike] = "cp",
    experts: int | tuple[int, ...] = 16,
    shares: Sequence[float] = (0.1, 0.2, 0.35, 0.6),
    measure: str = "loss",
    loss: LossFunction | None = None,
    weighted: bool = False,
    search: Search | None = None,
    seed: int = 0,
    callback: Callable[[str, SensitivityPoint], None] | None = None,
) -> tuple[Sensitivity, ...]:
    """Measure what a model loses by factors of each of its projections, at a few ranks.

    One projection at a time is rebuilt from its factors, and put back. Three measures:

    - ``"loss"``: the increase of the model's loss on the inputs, with this projection alone
      replaced: a run of the model for each rank.
    - ``"gradient"``: ½ Σ F·Δ² over the entries of the projection, with Δ their error and F their
      mean squared gradient, a diagonal of the Fisher information (LeCun et al., Optimal brain
      damage, 1990; Theis et al. 2018): a backward pass for each batch, and memory for F.
    - ``"error"``: the squared error of the projection's own outputs, relative to them, whatever
      becomes of it in the model; it needs no loss.

    Args:
        model: with values; it is as it was afterwards.
        inputs: calibration batches: an input of the model (a tuple or a mapping are its arguments),
            or several. They are run again for each rank, so that a few thousand tokens do.
        what: layers, as for :func:`model_sites`.
        sites: these instead, from :func:`model_sites`.
        factorization: a name or class, or several.
        experts: of the mixtures that linear layers and MLPs become.
        shares: of each projection's parameters that factors are made with; ranks between them are
            interpolated.
        measure: one of the three.
        loss: from the model and a batch to its loss, a scalar tensor. By default the ``loss`` that
            the model's output has (models of transformers, given labels), or the cross-entropy of
            the next of the ids that are its input.
        weighted: whether experts are decomposed as ``compress(weighted=True)`` does.
        search: how long to search for each decomposition.
        seed: of the random starts.
        callback: called with the name of a projection and each point that is known of it.

    Returns:
        One per projection, for :func:`tensormoe.selection.allocate`.

    Raises:
        SpecError: layers that can't be replaced, no batches, a model without a loss, or one that
            is not finite.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    >>> ids = torch.randint(9, (4, 6))
    >>> found = measure_sensitivities(model, ids, what="linear", experts=1, shares=(0.3, 0.6))
    >>> [(each.name, len(each.points)) for each in found]
    [('1', 2), ('2', 2)]
    """
    choice(measure, MEASURES, "measure", SpecError)
    flag(weighted, "weighted")
    if sites is None:
        sites = model_sites(model, what)
    elif what is not None:
        raise SpecError("what and sites exclude one another; got both. Drop one.")
    search = Search() if search is None else search
    instance(search, Search, "search", "a Search or None", SpecError)
    kinds = checked_kinds(factorization)
    batches = listed(inputs)
    groups = units_of(sites, experts, None)
    weights = [read_weights(model, site) for site in sites]
    with evaluating(model):
        samples = _samples(model, weights, batches, measure == "error" or weighted)
        score = _scorer(model, weights, batches, measure, loss)
        found = []
        for units, group, sample in zip(groups, weights, samples, strict=True):
            for unit, each in zip(units, group, strict=True):
                points = []
                for spec in _specs(unit, kinds, _checked_shares(shares)):
                    *rebuilt, off = each.approximated(spec, search, seed, sample, weighted)
                    value = score(each, tuple(rebuilt), off)
                    points.append(_point(each.name, spec, value))
                    if callback is not None:
                        callback(each.name, points[-1])
                found.append(Sensitivity(each.name, tuple(points)))
    return tuple(found)


Rebuilt = tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]
Score = Callable[[Weights, Any, float | None], float]


def around(share: float) -> tuple[float, ...]:
    """Shares at which losses are measured for a budget of one."""
    return tuple(dict.fromkeys(min(1.0, share * each) for each in _AROUND))


def listed(inputs: Any) -> list[Any]:
    """Batches in a list.

    Raises:
        SpecError: there are none.
    """
    if isinstance(inputs, Tensor | tuple | Mapping):
        return [inputs]
    if not isinstance(inputs, Iterable) or isinstance(inputs, str):
        raise SpecError(f"inputs must be a batch or several of them; got {type(inputs).__name__}.")
    found = list(inputs)
    if not found:
        raise SpecError("inputs must hold at least one batch; got none.")
    return found


def _checked_shares(shares: Sequence[float]) -> Sequence[float]:
    ordered = isinstance(shares, list | tuple) and shares
    if not ordered or not all(is_number(each) and 0 < each <= 1 for each in shares):
        raise SpecError(f"shares must be numbers in (0, 1], at least one; got {shares!r}.")
    return sorted(shares)


def _specs(
    unit: Unit, kinds: Sequence[type[Factorization]], shares: Sequence[float]
) -> list[LayerSpec]:
    """Layers of factors by rising share, none twice."""
    return [
        spec
        for kind in kinds
        for spec in dict.fromkeys(unit.spec(kind, share * unit.before) for share in shares)
    ]


def _point(name: str, spec: LayerSpec, value: float) -> SensitivityPoint:
    if value != value or value in (float("inf"), float("-inf")):
        raise SpecError(
            f"sensitivities must be finite; got {value} for {name!r} with {spec.factorization!r}. "
            "Look for NaN in the model's outputs for these inputs."
        )
    return SensitivityPoint(spec.factorization, spec.num_parameters, value)


def _samples(
    model: nn.Module, weights: Sequence[Sequence[Weights]], batches: list[Any], wanted: bool
) -> list[Samples | None]:
    """Inputs of stacks of experts, where they are needed; None of other layers."""
    stacks = [group[0].stack for group in weights if group[0].stack is not None]
    made = iter(collect(model, [each for each, _ in stacks], batches) if wanted and stacks else [])
    return [next(made) if wanted and group[0].stack is not None else None for group in weights]


def _scorer(
    model: nn.Module,
    weights: Sequence[Sequence[Weights]],
    batches: list[Any],
    measure: str,
    loss: LossFunction | None,
) -> Score:
    """A function from other weights of a projection to what is lost by them."""
    flat = [each for group in weights for each in group]
    if measure == "error":
        errors = output_errors(model, [each for each in flat if each.stack is None], batches)
        return lambda each, made, off: errors(each, *made) if off is None else off**2
    if measure == "gradient":
        squares = squared_gradients(model, flat, batches, loss)

        def by_gradient(each: Weights, made: Rebuilt, _: float | None) -> float:
            pairs = zip(squares[each.name], each.weights, made[0], strict=True)
            return sum(
                0.5 * float((square * (new - old).to(square.dtype).square()).sum())
                for square, old, new in pairs
            )

        return by_gradient
    before = mean_loss(model, batches, loss)

    def by_loss(each: Weights, made: Rebuilt, _: float | None) -> float:
        with each.replaced(*made):
            return mean_loss(model, batches, loss) - before

    return by_loss

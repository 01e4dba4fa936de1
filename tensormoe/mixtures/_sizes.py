"""Hidden sizes of experts that differ, and what each size gets of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensormoe._validation import brief, is_number, positive_int
from tensormoe.errors import SpecError
from tensormoe.mixtures._budget import shared_out
from tensormoe.mixtures._experts import ExpertsConfig, experts_config
from tensormoe.selection import Budget

SPREAD = 0.5
"""Largest deviation from the mean size, relative to it, unless another is given."""


def paired_sizes(
    hidden_features: int, experts: int, spread: float = SPREAD, *, multiple: int = 1
) -> tuple[int, ...]:
    """Hidden sizes in pairs h + δ and h - δ, the largest first (Sun et al. 2024).

    Experts n and N - 1 - n are a pair, of 2h hidden units, so that all experts have the parameters
    of as many equal ones, and devices that hold pairs hold equally much. The δ of the pairs are
    equally spaced, up to ``spread`` times h.

    Args:
        hidden_features: h, the mean size.
        experts: N, even.
        spread: of the sizes, between 0 and 1.
        multiple: what every δ is a multiple of: 64, for instance, for sizes that suit a device
            where h does.

    Raises:
        SpecError: an odd number of experts, sizes that are not positive, or sizes that are all
            equal.

    >>> paired_sizes(64, 4), paired_sizes(1024, 8, 0.75, multiple=64)
    ((96, 80, 48, 32), (1792, 1600, 1408, 1216, 832, 640, 448, 256))
    """
    mean, count = positive_int(hidden_features, "hidden_features"), positive_int(experts, "experts")
    step = positive_int(multiple, "multiple")
    if count % 2:
        raise SpecError(
            f"experts must be an even number to be paired; got {count}. Add one, or give "
            "hidden_features as a tuple with one size per expert."
        )
    if not is_number(spread) or not 0 < spread < 1:
        raise SpecError(
            f"spread must be a number between 0 and 1; got {brief(spread)}. Use 0.5, or SparseMoE "
            "for experts of one size."
        )
    pairs = count // 2
    away = [step * round(spread * mean * pair / (pairs * step)) for pair in range(pairs, 0, -1)]
    if away[0] >= mean:
        raise SpecError(
            f"sizes must be positive; got {mean - away[0]} for hidden_features={mean}, "
            f"spread={spread} and multiple={step}. Lower the spread or the multiple."
        )
    if away[0] == 0:
        raise SpecError(
            f"sizes must differ; got {mean} for all, with hidden_features={mean}, spread={spread} "
            f"and multiple={step}. Raise the spread or lower the multiple."
        )
    return (*(mean + each for each in away), *(mean - each for each in reversed(away)))


def checked_sizes(
    hidden_features: int | Sequence[int], experts: int | None = None, spread: float | None = None
) -> tuple[int, ...]:
    """One hidden size per expert, from the arguments of a constructor.

    Args:
        hidden_features: one size per expert, equal ones side by side; or their mean.
        experts: N, needed with a mean.
        spread: of the pairs, with a mean.

    Raises:
        SpecError: sizes that cannot be, or another number of them.
    """
    if not isinstance(hidden_features, Sequence):
        if experts is None:
            raise SpecError(
                "experts must be given where hidden_features is the mean size; got "
                f"hidden_features={brief(hidden_features)} alone. Give a number, or a tuple with "
                "one size per expert."
            )
        return paired_sizes(hidden_features, experts, SPREAD if spread is None else spread)
    if spread is not None:
        raise SpecError(
            f"spread must be None where each expert has a size; got {brief(spread)}. Leave it out, "
            "or give the mean size."
        )
    if not hidden_features:
        raise SpecError("hidden_features must hold one size per expert; got none.")
    sizes = tuple(
        positive_int(size, f"hidden_features of expert {place}")
        for place, size in enumerate(hidden_features)
    )
    if experts is not None and positive_int(experts, "experts") != len(sizes):
        raise SpecError(
            f"hidden_features must hold one size per expert, {experts}; got {len(sizes)}. Leave "
            "experts out, or give the mean size."
        )
    for place, size in enumerate(sizes[1:], 1):
        if size != sizes[place - 1] and size in sizes[:place]:
            raise SpecError(
                f"hidden_features must have equal sizes side by side; got {size} for expert "
                f"{place} and for expert {sizes.index(size)}, with others between. Sort them."
            )
    return sizes


def sized_experts(
    in_features: int,
    sizes: Sequence[tuple[int, int]],
    out_features: int | None,
    *,
    factorization: Any,
    rank: int | tuple[int, ...] | None,
    budget: Budget | int | None,
    router: int,
    kind: str,
    act_layer: str | None,
    bias: bool,
) -> tuple[ExpertsConfig, ...]:
    """Groups of experts, one per hidden size.

    A budget is split in proportion to the parameters of dense experts.

    Args:
        in_features: size of an input.
        sizes: hidden size and number of experts of each group.
        out_features: size of an output; ``in_features`` by default.
        factorization: one for all layers, a pair, or a pair for each group.
        rank: as for :func:`experts_config`, the same for all groups.
        budget: as for :func:`experts_config`.
        router: parameters of the router, for a budget.
        kind: "swiglu" or "mlp".
        act_layer: as for :func:`experts_config`.
        bias: as for :func:`experts_config`.

    Raises:
        SpecError, RankError, BudgetError: as :func:`experts_config`.
    """
    if kind == "linear":
        raise SpecError(
            "kind must be 'swiglu' or 'mlp' for experts of different hidden sizes; got 'linear'. "
            "Use SparseMoE for linear experts."
        )
    options: Any = {"kind": kind, "act_layer": act_layer, "bias": bias, "rank": rank}
    each = per_group(factorization, len(sizes), "sizes")

    def group(place: int, share: int | None = None, **changed: Any) -> ExpertsConfig:
        size, count = sizes[place]
        named = options | {"factorization": each[place], "budget": share} | changed
        return experts_config(in_features, size, out_features, count, **named)

    if budget is None:
        return tuple(map(group, range(len(sizes))))
    dense = [group(place, factorization="dense", rank=None) for place in range(len(sizes))]
    return shared_out(budget, [one.num_parameters for one in dense], group, router)


def per_group(factorization: Any, groups: int, unit: str) -> list[Any]:
    """The factorization, or pair of them, of each group of experts.

    Args:
        factorization: one for all, a pair, or a tuple for each group.
        groups: their number.
        unit: what there is a group for each of, for messages.

    Raises:
        SpecError: another number of tuples.
    """
    each = factorization if isinstance(factorization, list | tuple) else ()
    if not each or not all(isinstance(one, tuple) for one in each):
        return [factorization] * groups
    if len(each) != groups:
        raise SpecError(
            f"factorization must be one, a pair, or a pair for each of the {groups} {unit}; got "
            f"{len(each)} pairs."
        )
    return [one[0] if len(one) == 1 else one for one in each]

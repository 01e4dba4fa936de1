"""Fewer experts: which stay, and which become one (Li et al. 2024; Chen et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from tensormoe._validation import positive_int
from tensormoe.errors import ShapeError, SpecError


@dataclass(frozen=True)
class ExpertGroups:
    """Experts of a layer that become one, by :func:`group_experts` or :func:`cluster_experts`.

    Args:
        groups: (N,) number of the group of each expert.
        dominant: (M,) the expert of each group that is chosen most often; in ascending order.
        shares: (N,) weight of each expert in its group's average; they sum to one per group.
        similarity: (N,) cosine of each expert's router logits, or average outputs, and its dominant
            expert's.
    """

    groups: tuple[int, ...]
    dominant: tuple[int, ...]
    shares: tuple[float, ...]
    similarity: tuple[float, ...]

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each group, the dominant one first."""
        return tuple(
            (first, *(n for n, each in enumerate(self.groups) if each == group and n != first))
            for group, first in enumerate(self.dominant)
        )


def allot_experts(
    frequencies: Sequence[Sequence[float]], keep: int | float, *, least: int = 1
) -> tuple[int, ...]:
    """Numbers of experts that layers keep.

    Of a share of all experts, those that are chosen most often in their layer are kept, whatever
    the layer, and ``least`` of each layer in any case (Li et al. 2024, section 3.2).

    Args:
        frequencies: of the experts of each layer, as :func:`choice_frequencies` gives them.
        keep: experts per layer as an integer, or a share of all experts as a float in (0, 1].
        least: experts that every layer keeps.

    Raises:
        SpecError: a number or a share that these layers can't keep.

    >>> allot_experts([(0.4, 0.3, 0.2, 0.1), (0.7, 0.1, 0.1, 0.1)], 0.5)
    (3, 1)
    """
    sizes = [len(each) for each in frequencies]
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise SpecError(f"keep must be a share in (0, 1], or an integer; got {keep!r}.")
        total = round(keep * sum(sizes))
        if total < least * len(sizes):
            raise SpecError(
                f"keep must leave every layer {least} experts, {least * len(sizes)} of "
                f"{sum(sizes)}; got {keep!r}, {total} of them. Raise it."
            )
    else:
        count = positive_int(keep, "keep")
        most = min(sizes, default=count)
        if not min(least, most) <= count <= most:
            raise SpecError(
                f"keep must be {least} to {most} experts per layer; got {count}. Give a share of "
                "all experts as a float, or another number."
            )
        return (count,) * len(sizes)
    ranked = [(layer, n) for layer, each in enumerate(frequencies) for n in _ranked(each)]
    first = {pair for layer in range(len(sizes)) for pair in _first(ranked, layer, least)}
    rest = sorted(
        (pair for pair in ranked if pair not in first), key=lambda p: -frequencies[p[0]][p[1]]
    )
    kept = [*first, *rest[: total - len(first)]]
    return tuple(sum(layer == each for each, _ in kept) for layer in range(len(sizes)))


def _first(ranked: list[tuple[int, int]], layer: int, count: int) -> list[tuple[int, int]]:
    return [pair for pair in ranked if pair[0] == layer][:count]


def _ranked(frequencies: Sequence[float]) -> list[int]:
    """Experts by frequency, the most frequent first, ties to the lower number."""
    return sorted(range(len(frequencies)), key=lambda n: -frequencies[n])


def most_frequent(frequencies: Sequence[float], keep: int) -> tuple[int, ...]:
    """The ``keep`` experts that are chosen most often, in ascending order.

    Args:
        frequencies: (N,) of the experts, or other scores, as :func:`reap_saliency` gives them.
        keep: how many stay.

    >>> most_frequent((0.1, 0.5, 0.1, 0.3), 2)
    (1, 3)
    """
    return tuple(sorted(_ranked(frequencies)[:keep]))


def group_experts(
    frequencies: Sequence[float], similarity: Sequence[Sequence[float]], keep: int
) -> ExpertGroups:
    """Group every expert with the one of the ``keep`` most frequent that is most like it.

    An expert's weight in the average of its group is its share of the group's choices; in a group
    that is never chosen, the dominant expert has all of it.

    Args:
        frequencies: (N,) how often experts are chosen.
        similarity: (N, N), as :func:`cosine_similarity` gives it for the router's logits.
        keep: M, the number of groups.

    Raises:
        SpecError: not 1 to N groups, or frequencies that are negative or not finite.
        ShapeError: similarities of other experts, or NaN.

    >>> groups = group_experts((0.5, 0.25, 0.25), ((1, 0, 0.5), (0, 1, 0.1), (0.5, 0.1, 1)), 2)
    >>> groups.members, groups.groups
    (((0, 2), (1,)), (0, 1, 0))
    >>> groups.shares, groups.similarity
    ((0.6666666666666666, 1.0, 0.3333333333333333), (1.0, 1.0, 0.5))
    """
    count, groups = len(frequencies), checked_keep(frequencies, keep)
    if len(similarity) != count or any(len(row) != count for row in similarity):
        raise ShapeError(f"similarity must be a matrix ({count}, {count}); got another shape.")
    if any(each != each for row in similarity for each in row):
        raise ShapeError("similarity must not be NaN; got some.")
    dominant = most_frequent(frequencies, groups)
    place = {n: group for group, n in enumerate(dominant)}
    # ties go to the expert that is chosen more often
    ordered = sorted(dominant, key=lambda n: -frequencies[n])
    found = [place[n] if n in place else place[_best(similarity[n], ordered)] for n in range(count)]
    return weighted_groups(frequencies, similarity, found, dominant)


def weighted_groups(
    frequencies: Sequence[float],
    similarity: Sequence[Sequence[float]],
    groups: Sequence[int],
    dominant: tuple[int, ...],
) -> ExpertGroups:
    """Groups, and the weight of each expert in its group's average: its share of the choices."""
    totals = [0.0] * len(dominant)
    for n, group in enumerate(groups):
        totals[group] += frequencies[n]
    return ExpertGroups(
        tuple(groups),
        dominant,
        tuple(
            frequencies[n] / totals[group] if totals[group] else float(n in dominant)
            for n, group in enumerate(groups)
        ),
        tuple(
            1.0 if n in dominant else float(similarity[n][dominant[group]])
            for n, group in enumerate(groups)
        ),
    )


def checked_keep(frequencies: Sequence[float], keep: int) -> int:
    """The number of groups.

    Raises:
        SpecError: not 1 to N groups, or frequencies that are negative or not finite.
    """
    count, groups = len(frequencies), positive_int(keep, "keep")
    if groups > count:
        raise SpecError(f"keep must be at most the {count} experts; got {groups}. Lower it.")
    for n, each in enumerate(frequencies):
        if not isfinite(each) or each < 0.0:
            raise SpecError(f"frequencies must be finite and not negative; got {each} at {n}.")
    return groups


def _best(similarity: Sequence[float], among: Sequence[int]) -> int:
    return max(among, key=lambda n: similarity[n])

"""Fewer experts: which stay, and which become one (M-SMoE, Li et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from tensormoe._validation import positive_int
from tensormoe.backend import Array, backend_of
from tensormoe.decomposition._solve import to_host, wide
from tensormoe.errors import ShapeError, SpecError


@dataclass(frozen=True)
class ExpertGroups:
    """Experts of a layer that become one, by :func:`group_experts`.

    Args:
        groups: (N,) number of the group of each expert.
        dominant: (M,) the expert of each group that is chosen most often; in ascending order.
        shares: (N,) weight of each expert in its group's average; they sum to one per group.
        similarity: (N,) cosine of each expert's router logits and its dominant expert's.
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


def choice_frequencies(index: Array, experts: int) -> tuple[float, ...]:
    """Shares of a router's choices that fall on each expert.

    Args:
        index: (tokens, k) numbers of chosen experts, of any library.
        experts: N.

    Returns:
        N shares, which sum to one.

    Raises:
        ShapeError: no choices, or numbers that are not of these experts.

    >>> import numpy as np
    >>> choice_frequencies(np.array([[0, 2], [2, 1]]), 4)
    (0.25, 0.25, 0.5, 0.0)
    """
    import numpy as np

    count = positive_int(experts, "experts")
    backend = backend_of(index)
    if not backend.namespace.isdtype(index.dtype, "integral"):
        raise ShapeError(f"index must hold integers, numbers of experts; got {index.dtype}.")
    found = to_host(index, backend).reshape(-1)
    if not found.size:
        raise ShapeError("index must hold a choice at least; got none. Give calibration tokens.")
    outside = found[(found < 0) | (found >= count)]
    if outside.size:
        raise ShapeError(
            f"index must hold numbers of experts, 0 to {count - 1}; got {int(outside[0])}."
        )
    counts = np.bincount(found.astype("int64"), minlength=count)
    return tuple((counts / counts.sum()).tolist())


def cosine_similarity(columns: Array) -> tuple[tuple[float, ...], ...]:
    """Cosines between columns: of router logits (tokens, N), how alike experts are chosen.

    Args:
        columns: (tokens, N) logits of a router, of any library.

    Returns:
        (N, N) cosines; of a column of zeros 0.

    Raises:
        ShapeError: not a matrix, no tokens, or entries that are not finite.

    >>> import numpy as np
    >>> cosine_similarity(np.array([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]))[0]
    (1.0, 1.0, 0.0)
    """
    import numpy as np

    if columns.ndim != 2 or not columns.shape[0]:
        raise ShapeError(
            f"logits must be a matrix (tokens, N) of one token at least; got shape "
            f"{tuple(columns.shape)}. Give calibration tokens."
        )
    found = wide(columns, backend_of(columns))
    if not np.isfinite(found).all():
        column = int(np.argwhere(~np.isfinite(found))[0][1])
        raise ShapeError(f"logits must be finite; those of expert {column} are not.")
    lengths = np.linalg.norm(found, axis=0)
    unit = found / np.where(lengths == 0.0, 1.0, lengths)
    return tuple(map(tuple, np.clip(unit.T @ unit, -1.0, 1.0).tolist()))


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
    count, groups = len(frequencies), positive_int(keep, "keep")
    if groups > count:
        raise SpecError(f"keep must be at most the {count} experts; got {groups}. Lower it.")
    for n, each in enumerate(frequencies):
        if not isfinite(each) or each < 0.0:
            raise SpecError(f"frequencies must be finite and not negative; got {each} at {n}.")
    if len(similarity) != count or any(len(row) != count for row in similarity):
        raise ShapeError(f"similarity must be a matrix ({count}, {count}); got another shape.")
    if any(each != each for row in similarity for each in row):
        raise ShapeError("similarity must not be NaN; got some.")
    dominant = most_frequent(frequencies, groups)
    place = {n: group for group, n in enumerate(dominant)}
    # ties go to the expert that is chosen more often
    ordered = sorted(dominant, key=lambda n: -frequencies[n])
    found = [place[n] if n in place else place[_best(similarity[n], ordered)] for n in range(count)]
    totals = [0.0] * groups
    for n, group in enumerate(found):
        totals[group] += frequencies[n]
    return ExpertGroups(
        tuple(found),
        dominant,
        tuple(
            frequencies[n] / totals[group] if totals[group] else float(n in place)
            for n, group in enumerate(found)
        ),
        tuple(
            1.0 if n in place else float(similarity[n][dominant[group]])
            for n, group in enumerate(found)
        ),
    )


def _best(similarity: Sequence[float], among: Sequence[int]) -> int:
    return max(among, key=lambda n: similarity[n])

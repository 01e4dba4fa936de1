"""Experts grouped by what they give: hierarchical clustering (HC-SMoE, Chen et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensormoe.backend import Array, backend_of
from tensormoe.compression._grouping import ExpertGroups, checked_keep, weighted_groups
from tensormoe.compression._statistics import product_cosines
from tensormoe.decomposition._solve import wide
from tensormoe.errors import ShapeError


def cluster_experts(frequencies: Sequence[float], outputs: Array, keep: int) -> ExpertGroups:
    """Group experts whose average outputs are close, by hierarchical clustering.

    HC-SMoE (Chen et al. 2025, arXiv 2410.08589): every expert is a cluster at first, and the two
    closest clusters become one until ``keep`` are left. Two clusters are as far apart as their
    experts on average (average linkage), two experts as the Euclidean distance of their average
    outputs. What the router chooses has no part in it but in the weights: an expert's weight in the
    average of its group is its share of the group's choices. In a group that is never chosen, the
    dominant expert has all of it.

    Args:
        frequencies: (N,) how often experts are chosen.
        outputs: (N, out) the mean of each expert's outputs over all tokens, also those that did not
            choose it, of any library.
        keep: M, the number of groups.

    Raises:
        SpecError: not 1 to N groups, or frequencies that are negative or not finite.
        ShapeError: outputs of other experts, or not finite.

    >>> import numpy as np
    >>> outputs = np.array([[0.0, 1.0], [5.0, 0.0], [0.0, 2.0], [9.0, 0.0]])
    >>> groups = cluster_experts((0.1, 0.4, 0.3, 0.2), outputs, 2)
    >>> groups.members
    ((1, 3), (2, 0))
    """
    count, groups = len(frequencies), checked_keep(frequencies, keep)
    if outputs.ndim != 2 or outputs.shape[0] != count:
        raise ShapeError(
            f"outputs must be a matrix ({count}, out), a row per expert; got shape "
            f"{tuple(outputs.shape)}."
        )
    rows = wide(outputs, backend_of(outputs))
    similarity = product_cosines(rows @ rows.T, "average outputs")
    clusters = _joined(_distances(rows), groups)
    # the first of those that are chosen most often
    leaders = [max(each, key=lambda n: frequencies[n]) for each in clusters]
    place = {
        n: group for group, leader in enumerate(sorted(leaders)) for n in _of(clusters, leader)
    }
    return weighted_groups(
        frequencies, similarity, [place[n] for n in range(count)], tuple(sorted(leaders))
    )


def _of(clusters: Sequence[Sequence[int]], member: int) -> Sequence[int]:
    return next(each for each in clusters if member in each)


def _distances(rows: Any) -> Any:
    """Euclidean distances (N, N); infinite of a row and itself, which never join."""
    import numpy as np

    found = np.stack([np.linalg.norm(rows - row, axis=1) for row in rows])
    np.fill_diagonal(found, np.inf)
    return found


def _joined(distances: Any, count: int) -> list[list[int]]:
    """Clusters of average linkage, of which ``count`` are left; ties go to the lower numbers.

    The distance to a cluster of two is the mean of theirs, weighted by sizes (Lance and Williams
    1967), so that the sum over pairs is never taken again.
    """
    import numpy as np

    members = [[n] for n in range(len(distances))]
    alive = [*range(len(distances))]
    while len(alive) > count:
        first, second = np.unravel_index(int(np.argmin(distances)), distances.shape)
        one, other = len(members[first]), len(members[second])
        row = (one * distances[first] + other * distances[second]) / (one + other)
        row[first] = np.inf
        distances[first], distances[:, first] = row, row
        distances[second], distances[:, second] = np.inf, np.inf
        members[first] = sorted(members[first] + members[second])
        alive.remove(int(second))
    return [members[n] for n in alive]

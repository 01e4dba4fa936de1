"""Shares of one budget for the projections of all layers, by what a model loses.

Of every projection the singular values of its experts, weighted by second moments, say what the
closest product of every rank loses: a curve of loss against entries without any search. Entries go
where they lower the sum most (Shoham & Gersho 1988). Factors of other networks lose something else,
but mostly need more where products do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensormoe.selection._allocate_solve import Point, along_curves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensormoe.compression._calibration import Calibration

SHARES = ("equal", "sensitivity")
"""Ways to share a budget out: the same share of every projection, or by what the model loses."""

LEAST, MOST = 0.25, 3.0
"""Of an equal share, that a projection gets at least and at most."""


def loss_curve(
    stack: NDArray[Any], calibration: Calibration, layer: str, role: str, bias: bool = False
) -> tuple[Point, ...]:
    """Loss of the closest product of every rank for each expert, against its entries.

    Args:
        stack: the experts (N, in, out), with one more row each where there are biases.
        calibration: of the model. With gradients a loss is the predicted increase of the model's,
            see :func:`predicted_loss`; without, the squared relative error of outputs.
        layer: one of its layers.
        role: of the projection.
        bias: whether the matrices have a row of biases.

    Raises:
        CheckpointError: no such layer or projection.
    """
    import numpy as np

    experts, rows, columns = stack.shape
    side = min(rows, columns)
    per_token = calibration.arrays[f"{layer}.counts"] / calibration.tokens[layer]
    metric = calibration.gradients(layer, role)
    writing = None if metric is None else _root(metric)
    tails = np.zeros(side + 1)
    for matrix, own, share in zip(
        stack, calibration.inputs_of_experts(layer, role, bias), per_token.tolist(), strict=True
    ):
        if not share:
            continue
        found = _root(own).T @ matrix.astype("float64")
        found = found if writing is None else found @ writing
        gram = found @ found.T if rows <= columns else found.T @ found
        squares = np.maximum(np.linalg.eigvalsh(gram), 0.0) * share
        # from the largest rank to none: nothing is missing, then the smallest values
        tails[1:] += np.cumsum(squares)
    losses = tails[::-1] * (0.5 if metric is not None else 1.0 / (tails[-1] or 1.0))
    cost = experts * (rows + columns)
    return tuple(Point(rank * cost, float(loss)) for rank, loss in enumerate(losses))


def shared(
    curves: Mapping[str, Sequence[Point]], sizes: Mapping[str, int], limit: int
) -> dict[str, int]:
    """Entries for each projection, together at most a limit, with the smallest sum of losses.

    None gets less than :data:`LEAST` or more than :data:`MOST` of the share that its size gives it,
    as a curve says nothing of other networks far from there.

    Args:
        curves: of each, from no entries on.
        sizes: entries of its experts.
        limit: of entries for all together.

    >>> steep, flat = [Point(0, 9.0), Point(40, 0.0)], [Point(0, 1.0), Point(40, 0.0)]
    >>> shared({"a": steep, "b": flat}, {"a": 40, "b": 40}, 40)
    {'a': 35, 'b': 5}
    """
    whole = sum(sizes.values())
    bounded = []
    for name, points in curves.items():
        equal = limit * sizes[name] / whole
        bounded.append(_between(points, LEAST * equal, min(MOST * equal, sizes[name] - 1)))
    found = along_curves(bounded, limit)
    return {name: int(point.cost) for name, point in zip(curves, found, strict=True)}


def _between(points: Sequence[Point], least: float, most: float) -> list[Point]:
    """The part of a curve between two costs, with points on its ends."""
    import numpy as np

    costs, losses = [each.cost for each in points], [each.loss for each in points]
    ends = [Point(each, float(np.interp(each, costs, losses))) for each in (least, most)]
    inside = [each for each in points if least < each.cost < most]
    return [ends[0], *inside, ends[1]]


def _root(moments: NDArray[Any]) -> NDArray[Any]:
    """R with R Rᵀ the moments, which need not be of full rank."""
    import numpy as np

    values, vectors = np.linalg.eigh(moments.astype("float64"))
    found: NDArray[Any] = vectors * np.sqrt(np.maximum(values, 0.0))
    return found

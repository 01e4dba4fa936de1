"""Shares of one budget for the projections of all layers, by what a model loses.

Of every projection the singular values of its experts, weighted by second moments, say what the
closest product of every rank loses: a curve of loss against bytes without any search. Of entries in
few bits, what rounding loses comes on top. Where the response of the model's loss was measured, the
curve is of what it makes of that. Bytes go where they lower the sum most (Shoham & Gersho 1988).
Factors of other networks lose something else, but mostly need more where products do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe._rounding import round_to_nearest, rounded_values, stored_bytes
from tensormoe.backend import get_backend
from tensormoe.compression._predicted import lost_to_second_order
from tensormoe.compression._response import Response
from tensormoe.selection._allocate_solve import Point, along_curves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensormoe.compression._calibration import Calibration

SHARES = ("equal", "sensitivity")
"""Ways to share a budget out: the same share of every projection, or by what the model loses."""

LEAST, MOST = 0.25, 3.0
"""Of an equal share, that a projection gets at least and at most."""


@dataclass(frozen=True)
class Form:
    """Form in which a projection is stored.

    Args:
        bits: 8 or 4 of each entry; None for entries of the dtype.
        whole: whether the experts themselves are rounded, and not factors.
    """

    bits: int | None = None
    whole: bool = False


PLAIN = (Form(),)
"""Factors of the dtype."""
FORMS = (Form(), Form(8), Form(4), Form(8, whole=True), Form(4, whole=True))
"""All forms that there are."""


@dataclass(frozen=True)
class Part:
    """Part of a budget for one projection.

    Args:
        form: how it is stored.
        nbytes: that it may take.
    """

    form: Form
    nbytes: int


def loss_curve(
    stack: NDArray[Any],
    calibration: Calibration,
    layer: str,
    role: str,
    bias: bool = False,
    *,
    forms: Sequence[Form] = PLAIN,
    itemsize: int = 4,
) -> tuple[Point, ...]:
    """Loss of the closest product of every rank for each expert, against its bytes.

    Rounding adds what it takes from the experts themselves, and twice that from two factors.

    Args:
        stack: the experts (N, in, out), with one more row each where there are biases.
        calibration: of the model. With gradients a loss is the predicted increase of the model's,
            see :func:`predicted_loss`; without, the squared relative error of outputs.
        layer: one of its layers.
        role: of the projection.
        bias: whether the matrices have a row of biases.
        forms: that factors may be stored in; each is the label of its points.
        itemsize: bytes of an entry that is not rounded.

    Raises:
        CheckpointError: no such layer or projection.
    """
    experts, rows, columns = stack.shape
    losses = _tails(stack, calibration, layer, role, bias)
    known = calibration.gradients(layer, role) is not None
    response = calibration.response(layer, role) if known else Response()
    noise = {
        bits: 0.0 if bits is None else _noise(stack, calibration, layer, role, bias, bits)
        for bits in dict.fromkeys(form.bits for form in forms)
    }
    points = []
    for form in forms:
        rounding = noise[form.bits]
        if form.whole:
            size = stored_bytes(stack.shape, form.bits, itemsize)
            points.append(Point(size, response(rounding), form))
            continue
        for rank, loss in enumerate(losses):
            size = sum(
                stored_bytes((side, experts, rank), form.bits, itemsize) for side in (rows, columns)
            )
            whole = response(loss + (2.0 * rounding if rank else 0.0))
            points.append(Point(size, whole, form))
    return tuple(points)


def _tails(
    stack: NDArray[Any], calibration: Calibration, layer: str, role: str, bias: bool
) -> list[float]:
    """Losses of products of every rank, from none on."""
    import numpy as np

    _, rows, columns = stack.shape
    per_token = calibration.arrays[f"{layer}.counts"] / calibration.tokens[layer]
    metric = calibration.gradients(layer, role)
    writing = None if metric is None else _root(metric)
    tails = np.zeros(min(rows, columns) + 1)
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
    scale = 0.5 if metric is not None else 1.0 / (tails[-1] or 1.0)
    return [float(each) for each in tails[::-1] * scale]


def _noise(
    stack: NDArray[Any], calibration: Calibration, layer: str, role: str, bias: bool, bits: int
) -> float:
    """Loss by rounding the experts themselves."""
    backend = get_backend("numpy")
    codes, scales = round_to_nearest(stack.astype("float32"), bits, backend)
    values = rounded_values(codes, scales, stack.shape, bits, backend)
    pairs = ((matrix, matrix - near) for matrix, near in zip(stack, values, strict=True))
    found = lost_to_second_order(calibration, layer, role, pairs, bias)
    return found.output_error**2 if found.predicted_loss is None else found.predicted_loss


def shared(
    curves: Mapping[str, Sequence[Point]],
    sizes: Mapping[str, int],
    limit: int,
    *,
    alike: bool = False,
) -> dict[str, Part]:
    """Bytes and a form for each projection, together at most a limit, with the least loss.

    None gets less than :data:`LEAST` or more than :data:`MOST` of the share that its size gives it,
    as a curve says nothing of other networks far from there.

    Args:
        curves: of each, from no bytes on, in every form.
        sizes: bytes of its experts.
        limit: of bytes for all together.
        alike: whether each gets the same share of its size, and the best form within that.

    >>> steep, flat = [Point(0, 9.0, 1), Point(40, 0.0, 1)], [Point(0, 1.0, 1), Point(40, 0.0, 1)]
    >>> parts = shared({"a": steep, "b": flat}, {"a": 40, "b": 40}, 40)
    >>> {name: part.nbytes for name, part in parts.items()}
    {'a': 35, 'b': 5}
    """
    whole, bounded = sum(sizes[name] for name in curves), []
    for name, points in curves.items():
        equal = limit * sizes[name] / whole
        if alike:
            least = most = equal
        else:
            least, most = LEAST * equal, min(MOST * equal, sizes[name] - 1)
        by_form: dict[Any, list[Point]] = {}
        for point in points:
            by_form.setdefault(point.label, []).append(point)
        ends = [part for each in by_form.values() for part in _between(each, least, most)]
        bounded.append([min(ends, key=lambda each: each.loss)] if alike else ends)
    found = along_curves(bounded, limit)
    return {
        name: Part(point.label, int(point.cost))  # type: ignore[arg-type]
        for name, point in zip(curves, found, strict=True)
    }


def best_part(curve: Sequence[Point], size: int, limit: int) -> Part:
    """The form with the least loss within some bytes, for one projection.

    Args:
        curve: from no bytes on, in every form.
        size: bytes of its experts.
        limit: of bytes.
    """
    return shared({"": curve}, {"": size}, limit, alike=True)[""]


def _between(points: Sequence[Point], least: float, most: float) -> list[Point]:
    """The part of a curve of one form between two costs, with points on its ends."""
    import numpy as np

    label = points[0].label
    if len(points) == 1:
        # it is there, or it is not
        return [replace(points[0], cost=max(points[0].cost, least))] * (points[0].cost <= most)
    costs, losses = [each.cost for each in points], [each.loss for each in points]
    ends = [Point(each, float(np.interp(each, costs, losses)), label) for each in (least, most)]
    inside = [each for each in points if least < each.cost < most]
    return [ends[0], *inside, ends[1]]


def _root(moments: NDArray[Any]) -> NDArray[Any]:
    """R with R Rᵀ the moments, which need not be of full rank."""
    import numpy as np

    values, vectors = np.linalg.eigh(moments.astype("float64"))
    found: NDArray[Any] = vectors * np.sqrt(np.maximum(values, 0.0))
    return found

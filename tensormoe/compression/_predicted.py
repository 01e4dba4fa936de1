"""Increase of a model's loss, as a calibration predicts it from what experts lose.

Errors of outputs change a loss by half of their square in the metric of its second derivatives,
to second order and where the loss is at a minimum. Second moments of its gradients stand for
those (the empirical Fisher information), and inputs and gradients are taken to be independent, as
in K-FAC (Martens & Grosse 2015). Where the response of the loss to known errors was measured, the
increase is the measured one of an error of that size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe.decomposition._moments import energy, relative

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensormoe.compression._calibration import Calibration

Pairs = Iterable[tuple["NDArray[Any]", "NDArray[Any]"]]
"""Of every expert its matrix (in, out), and what is missing of it."""


@dataclass(frozen=True)
class Lost:
    """Losses of a projection on the calibration's data.

    Args:
        output_error: relative error of its outputs.
        predicted_loss: increase of the model's loss, in nats per token; None where no gradients
            were gathered.
        energy: squares of the outputs, summed over experts, that the error is relative to.
    """

    output_error: float
    predicted_loss: float | None
    energy: float = 0.0


def predicted_loss(
    calibration: Calibration, layer: str, role: str, pairs: Pairs, bias: bool = False
) -> float | None:
    """The increase of a model's loss if one projection of one layer loses something.

    With rows of a token and one of its experts, tₙ of them per token for expert n, it is

        ½ Σₙ tₙ tr(G Δₙᵀ Sₙ Δₙ):

    half of the expected square of what the loss changes by to first order, in nats per token. G are
    the second moments of the loss's gradients with respect to the projection's outputs, and S those
    of its inputs, of each expert where they were gathered. Where the calibration measured what
    errors of the layer do, ``calibrate(…, measure=True)``, the increase is what was measured of one
    as large. Increases of several projections and layers add up, as far as they are small.

    Args:
        calibration: with gradients, of :func:`tensormoe_torch.compression.calibrate` with a loss.
        layer: one of its layers.
        role: of the projection.
        pairs: of every expert its matrix (in, out), and what is missing of it, Δₙ.
        bias: whether the matrices have one more row, of biases.

    Returns:
        The increase; None where the calibration has no gradients, or where experts were called one
        by one, which does not tell how many tokens there were.

    Raises:
        CheckpointError: no such layer or projection.

    >>> import numpy as np
    >>> from tensormoe.compression import Calibration
    >>> one, ones = np.eye(1), np.ones(2)
    >>> arrays = {"counts": 30 * ones, "weights": 15 * ones, "squares": ones, "hidden": 4 * one}
    >>> arrays |= {"hidden.mean": np.ones(1), "down_proj.values": np.ones((2, 1))}
    >>> arrays |= {"down_proj.gradients": 0.01 * one}
    >>> found = Calibration({f"a.{name}": each for name, each in arrays.items()}, {"a": 30}, {})
    >>> pairs = [(one, 0.5 * one), (one, 0 * one)]  # the first expert loses half of its weight
    >>> round(predicted_loss(found, "a", "down_proj", pairs), 6)
    0.005
    """
    return lost(calibration, layer, role, pairs, bias).predicted_loss


def lost(calibration: Calibration, layer: str, role: str, pairs: Pairs, bias: bool = False) -> Lost:
    """Error of outputs and increase of the loss, of one pass over the experts."""
    found = lost_to_second_order(calibration, layer, role, pairs, bias)
    if found.predicted_loss is None:
        return found
    increase = calibration.response(layer, role)(found.predicted_loss)
    return replace(found, predicted_loss=increase)


def lost_to_second_order(
    calibration: Calibration, layer: str, role: str, pairs: Pairs, bias: bool = False
) -> Lost:
    """The same without any measured response."""
    rows = calibration.arrays[f"{layer}.counts"] / calibration.tokens[layer]
    metric = None if _one_by_one(calibration, layer) else calibration.gradients(layer, role)
    moments = calibration.inputs_of_experts(layer, role, bias)
    increase, squares = 0.0, []
    for share, own, (matrix, missing) in zip(rows.tolist(), moments, pairs, strict=True):
        if not share:
            continue
        squares.append((share * energy(missing, own, None), share * energy(matrix, own, None)))
        if metric is not None:
            increase += 0.5 * share * energy(missing, own, metric)
    whole = sum(each for _, each in squares)
    return Lost(relative(squares), None if metric is None else increase, whole)


def badness(
    calibration: Calibration, layer: str, role: str, pairs: Pairs, bias: bool = False
) -> float:
    """Loss by the factors of a projection: of the model where that is known, else of outputs."""
    found = lost(calibration, layer, role, pairs, bias)
    return found.output_error if found.predicted_loss is None else found.predicted_loss


def summed(increases: Iterable[float | None]) -> float | None:
    """The sum of increases; None where one is not known."""
    listed = [*increases]
    known = [each for each in listed if each is not None]
    return sum(known) if known and len(known) == len(listed) else None


def _one_by_one(calibration: Calibration, layer: str) -> bool:
    """Whether rows of a layer were counted as tokens: nobody told the experts weights."""
    counts, weights = (calibration.arrays[f"{layer}.{name}"] for name in ("counts", "weights"))
    return len(counts) > 1 and bool((counts == weights).all())

"""Decompositions of the experts and of two controls, scored on weights, outputs and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np

from _stockfish.forward import Product, dense, factorized, run
from _stockfish.network import Layer, Network
from _stockfish.positions import Samples
from tensormoe.decomposition import (
    ErrorCurve,
    ErrorPoint,
    Report,
    Search,
    decompose,
    error_curves,
)
from tensormoe.factorizations import Factorization

__all__ = [
    "Evaluation",
    "Study",
    "best",
    "evaluate",
    "expert_outputs",
    "noise",
    "output_error",
    "shuffled",
    "study",
]


@dataclass(frozen=True, eq=False)
class Study:
    """One layer's decompositions.

    Args:
        layer: of the network.
        trained: curves of the experts; errors of outputs are those on held-out positions.
        noise: curves of Gaussian experts of the same norms.
        shuffled: curves of the experts, each with its inputs in another order.
        weighted: the experts again, fitted to the outputs of other positions; without positions
            empty.
    """

    layer: Layer
    trained: tuple[ErrorCurve, ...]
    noise: tuple[ErrorCurve, ...]
    shuffled: tuple[ErrorCurve, ...]
    weighted: tuple[ErrorCurve, ...]


def noise(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian experts, each with its expert's norm: nothing to find within or between them."""
    drawn = rng.standard_normal(weights.shape)
    norms = [np.linalg.norm(each, axis=(1, 2), keepdims=True) for each in (weights, drawn)]
    return (drawn * (norms[0] / norms[1])).astype(weights.dtype)


def shuffled(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each expert with its inputs in an order of its own: nothing to find between them.

    Entries, norms and singular values of every expert stay.
    """
    return np.stack([rng.permutation(each, axis=0) for each in weights])


def study(
    layer: Layer,
    budgets: Sequence[float],
    search: Search,
    fitted: Samples | None,
    held_out: Samples | None,
) -> Study:
    """Decompose one layer's experts in every factorization at every budget."""
    rng = np.random.default_rng(0)
    weights = layer.weights

    def curves(array: np.ndarray, seen: Samples | None = None) -> tuple[ErrorCurve, ...]:
        return error_curves(
            array,
            budgets=budgets,
            inputs=None if seen is None else seen.inputs,
            coefficients=None if seen is None else seen.coefficients,
            search=search,
        )

    trained = curves(weights, held_out)
    weighted: tuple[ErrorCurve, ...] = ()
    if fitted is not None and held_out is not None:
        weighted = tuple(_weighted(layer, curve, search, fitted, held_out) for curve in trained)
    return Study(
        layer, trained, curves(noise(weights, rng)), curves(shuffled(weights, rng)), weighted
    )


def _weighted(
    layer: Layer, curve: ErrorCurve, search: Search, fitted: Samples, held_out: Samples
) -> ErrorCurve:
    """The same ranks, fitted to outputs; their error is that on held-out positions."""
    points = []
    for point in curve.points:
        product, report = _product(layer, point.factorization, search, fitted)
        error = output_error(layer, product, held_out)
        points.append(ErrorPoint(point.factorization, replace(report, output_error=error)))
    return ErrorCurve(curve.name, tuple(points))


def output_error(layer: Layer, product: Product, seen: Samples) -> float:
    """Relative error of the outputs of the experts that are chosen, without biases.

    Returns:
        NaN without samples.
    """
    given = dense(layer)(seen.inputs, seen.experts)
    lost = given - product(seen.inputs, seen.experts)
    whole = np.linalg.norm(given)
    return float(np.linalg.norm(lost) / whole) if whole else nan


def best(
    curves: Sequence[ErrorCurve], budget: float, *, outputs: bool = False
) -> ErrorPoint | None:
    """The smallest error within a share of parameters."""
    fronts = [point for curve in curves for point in curve.front(outputs=outputs)]
    within = [point for point in fronts if point.report.ratio <= budget]

    def error(point: ErrorPoint) -> float:
        report = point.report
        return report.error if not outputs or report.output_error is None else report.output_error

    return min(within, key=error, default=None)


def expert_outputs(
    study: Study, budget: float, search: Search, fitted: Samples | None, held_out: Samples
) -> list[float]:
    """The outputs' error by expert, for the smallest error of weights within a budget."""
    point = best(study.trained, budget)
    if point is None:
        return [nan] * len(study.layer.weights)
    product = _product(study.layer, point.factorization, search, fitted)[0]
    parts = [held_out.experts == expert for expert in range(len(study.layer.weights))]
    return [
        output_error(study.layer, product, Samples(held_out.inputs[part], held_out.experts[part]))
        for part in parts
    ]


def _product(
    layer: Layer, kind: Factorization, search: Search, fitted: Samples | None
) -> tuple[Product, Report]:
    """A layer of factors fitted to weights, or to the outputs of samples."""
    found = decompose(
        layer.weights,
        kind,
        inputs=None if fitted is None else fitted.inputs,
        coefficients=None if fitted is None else fitted.coefficients,
        weighted=fitted is not None,
        search=search,
        compare=False,
    )
    return factorized(found, layer.step), found.report


@dataclass(frozen=True)
class Evaluation:
    """Changes of the engine's evaluations.

    Args:
        layers: whose experts were decomposed.
        weighted: whether they were fitted to outputs.
        share: stored entries per entry of the experts' weights.
        off: median absolute difference, in pawns.
        same_sign: share of positions in which the same side is ahead.
    """

    layers: tuple[str, ...]
    weighted: bool
    share: float
    off: float
    same_sign: float


def evaluate(
    network: Network,
    kinds: Sequence[Factorization | None],
    search: Search,
    fitted: Sequence[Samples] | None,
    held_out: Samples,
) -> Evaluation:
    """Run the network with layers of factors, and compare.

    Args:
        network: the network.
        kinds: of each layer; None keeps it as it is.
        search: how long to search for factors.
        fitted: what each layer is fitted to; None fits weights.
        held_out: positions that are evaluated.
    """
    products, stored = [], 0
    for place, (layer, kind) in enumerate(zip(network.layers, kinds, strict=True)):
        if kind is None:
            products.append(dense(layer))
            stored += layer.integers.size
            continue
        product, report = _product(layer, kind, search, None if fitted is None else fitted[place])
        products.append(product)
        stored += report.parameters
    exact = run(network, [dense(layer) for layer in network.layers], held_out).pawns
    pawns = run(network, products, held_out).pawns
    names = (each.name for each, kind in zip(network.layers, kinds, strict=True) if kind)
    return Evaluation(
        tuple(names),
        fitted is not None,
        stored / sum(layer.integers.size for layer in network.layers),
        float(np.median(np.abs(pawns - exact))),
        float(np.mean(np.sign(pawns) == np.sign(exact))),
    )

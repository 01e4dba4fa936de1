"""Loads, histograms and specialisation: counted by hand, the same on every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from tensormoe import TopK
from tensormoe.analysis import (
    activation_histogram,
    class_histogram,
    expert_load,
    risk_difference,
    specialization,
)
from tensormoe.backend import get_backend
from tensormoe.errors import ShapeError, SpecError
from tensormoe.routing import Router, choose, spread
from tests._cupy_standin import device, installed

LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.tensor,
    "jax": jnp.asarray,
    "cupy": lambda array: device({"": array})[""],
}


def draw(seed: int, rows: int = 40, experts: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.random((rows, experts)) * (rng.random((rows, experts)) < 0.4)
    return weights.astype("float32"), rng.integers(0, 3, rows)


def by_index(dense: np.ndarray, k: int) -> TopK:
    order = np.argsort(-dense, axis=1)[:, :k]
    return TopK(order, np.take_along_axis(dense, order, 1))


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.9))
def test_load_counts_what_is_above_the_threshold(seed: int, threshold: float) -> None:
    dense, _ = draw(seed)
    found = expert_load(dense, threshold=threshold)
    assert found.inputs == 40
    np.testing.assert_allclose(found.mass, dense.sum(0, dtype="float64"), rtol=1e-5)
    assert (found.counts == (dense > threshold).sum(0)).all()
    assert set(found.dead) == {n for n in range(6) if not (dense[:, n] > threshold).any()}
    assert found.active == pytest.approx((dense > threshold).sum(1).mean())
    np.testing.assert_allclose(found.share, dense.mean(0, dtype="float64"), rtol=1e-5, atol=1e-9)
    parts = expert_load(dense[:7], threshold=threshold) + expert_load(
        dense[7:].reshape(3, 11, 6), threshold=threshold
    )
    assert (parts.counts == found.counts).all()
    assert parts.inputs == 40


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_coefficients_by_index_count_as_dense_ones(seed: int, k: int) -> None:
    dense, labels = draw(seed)
    chosen = by_index(dense, k)
    same = spread(chosen, 6, get_backend("numpy"))
    for read in (
        lambda a: expert_load(a, experts=6).mass,
        lambda a: expert_load(a, experts=6, threshold=0.3).counts,
        lambda a: activation_histogram(a, experts=6, bins=4),
        lambda a: class_histogram(a, labels, experts=6).mass,
        lambda a: class_histogram(a, labels, experts=6, weighted=False).mass,
        lambda a: class_histogram(a, labels, experts=6).samples,
    ):
        np.testing.assert_allclose(read(chosen), read(same), rtol=1e-5, atol=1e-6)


def test_every_library_gives_the_same() -> None:
    dense, labels = draw(3)
    chosen = by_index(dense, 2)
    with installed():
        found = []
        for put in LIBRARIES.values():
            index = TopK(put(chosen.indices), put(chosen.values))
            histogram = class_histogram(put(dense), put(labels), classes=4)
            found.append(
                [
                    expert_load(put(dense), threshold=0.2).mass,
                    expert_load(index, experts=6).mass,
                    activation_histogram(put(dense)),
                    activation_histogram(index, experts=6),
                    histogram.mass,
                    class_histogram(index, put(labels), experts=6).mass,
                    specialization(histogram).divergence,
                    specialization(histogram).baseline,
                ]
            )
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_routing_records_know_their_experts() -> None:
    logits = np.random.default_rng(0).standard_normal((40, 7)).astype("float32")
    routes = choose(Router("softmax"), logits, 2).reshaped((5, 8), get_backend("numpy"))
    found = expert_load(routes)
    assert found.counts.sum() == 5 * 8 * 2
    assert found.mass.shape == (7,)
    assert found.mass.sum() == pytest.approx(float(routes.top_k_weights.sum()), rel=1e-5)


def test_histogram_of_activations() -> None:
    found = activation_histogram(np.array([[0.0, 1.0], [0.49, -1.0], [0.51, 2.0]]), bins=2)
    assert found.tolist() == [[2, 1], [1, 2]]


@given(st.integers(0, 2**32 - 1))
def test_class_histogram(seed: int) -> None:
    dense, labels = draw(seed)
    found = class_histogram(dense, labels, classes=3)
    for expert in range(6):
        for label in range(3):
            want = dense[labels == label, expert].sum(dtype="float64")
            assert found.mass[expert, label] == pytest.approx(want, rel=1e-5)
    assert found.inputs.tolist() == [(labels == label).sum() for label in range(3)]
    parts = [
        class_histogram(dense[part], labels[part], classes=3) for part in (slice(9), slice(9, 40))
    ]
    np.testing.assert_allclose((parts[0] + parts[1]).mass, found.mass, rtol=1e-5)
    np.testing.assert_allclose((parts[0] + parts[1]).samples, found.samples, rtol=1e-5)
    counted = class_histogram(dense, labels, classes=3, weighted=False)
    assert (counted.samples == (dense > 0).sum(0)).all()


def test_divergence_is_that_of_scipy() -> None:
    dense, labels = draw(5)
    histogram = class_histogram(dense, labels, classes=3)
    everything = histogram.mass.sum(0)
    want = [jensenshannon(row, everything, base=2) ** 2 for row in histogram.mass]
    np.testing.assert_allclose(specialization(histogram).divergence, want, atol=1e-12)


def test_chance_is_not_specialisation() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 2000)
    for experts in (4, 64, 512):
        few = np.eye(experts)[rng.integers(0, experts, 2000)]
        found = specialization(class_histogram(few, labels))
        # few inputs per expert are far from all by chance: the baseline takes that away
        assert abs(found.mean) < 0.02
        assert experts == 4 or np.nanmean(found.divergence) > 0.05
    special = np.eye(10)[labels]
    found = specialization(class_histogram(special, labels))
    assert found.mean > 0.6
    assert (found.divergence <= 1).all()


def test_experts_that_nobody_uses() -> None:
    dense = np.zeros((4, 3))
    dense[:, 0] = 1.0
    found = specialization(class_histogram(dense, [0, 1, 1, 0]))
    assert found.divergence[0] == 0
    assert np.isnan(found.excess[1:]).all()
    # what is as far from all as chance has less than the mean of chance
    assert found.mean == -found.baseline[0] < 0
    assert np.isnan(specialization(class_histogram(0 * dense, [0, 1, 1, 0])).mean)
    one = specialization(class_histogram(dense, [0, 0, 0, 0]))
    assert one.divergence[0] == one.baseline[0] == 0


def test_rates_of_two_sets() -> None:
    dense, _ = draw(1)
    first, second = expert_load(dense[:10]), expert_load(dense[10:])
    found = risk_difference(first, second)
    np.testing.assert_allclose(found, (dense[:10] > 0).mean(0) - (dense[10:] > 0).mean(0))


ROWS = np.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: expert_load((ROWS, ROWS)), ShapeError, "must be those of one level; got 2"),
        (lambda: expert_load(TopK(ROWS, ROWS)), ShapeError, "experts must be given"),
        (lambda: expert_load(ROWS, experts=4), ShapeError, "axis of 4 experts; got shape"),
        (lambda: expert_load(ROWS, threshold="half"), SpecError, "threshold must be a number"),
        (lambda: activation_histogram(ROWS, bins=0), SpecError, "bins must be a positive"),
        (lambda: class_histogram(ROWS, [0, 1]), ShapeError, "one per input; got 2 for 4"),
        (lambda: class_histogram(ROWS, [0, 1, 2, 3], classes=3), ShapeError, "got 3 at position 3"),
        (lambda: class_histogram(ROWS, [0, 1, -1, 3]), ShapeError, "got -1 at position 2"),
        (lambda: class_histogram(ROWS, [0.5] * 4), ShapeError, "labels must be integers"),
        (lambda: class_histogram(ROWS, ["a"] * 4), ShapeError, "labels must be integers"),
        (lambda: class_histogram(ROWS[:0], []), ShapeError, "classes must be given"),
        (
            lambda: class_histogram(ROWS, [0] * 4) + class_histogram(ROWS, [1] * 4),
            ShapeError,
            "Pass classes=C",
        ),
        (
            lambda: risk_difference(expert_load(ROWS), expert_load(ROWS, threshold=0.5)),
            ShapeError,
            "same experts and threshold",
        ),
        (lambda: specialization(class_histogram(ROWS, [0] * 4), draws=0), SpecError, "draws must"),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

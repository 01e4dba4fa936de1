"""Explorations: numbers, batches, libraries."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_torch
from tensormoe import TopK
from tensormoe.analysis import (
    Exploration,
    Images,
    Texts,
    Tokens,
    class_histogram,
    expert_load,
    expert_similarity,
    explore,
    explore_coefficients,
    interventions,
    polysemanticity,
    specialization,
)
from tensormoe.analysis._explorer._top import top_inputs
from tensormoe_numpy import MuMoE, MuMoEMLP
from tests.explorer._pages import sparse

RNG = np.random.default_rng(0)
ROWS, FEATURES, CLASSES = 90, 6, 4
X = RNG.standard_normal((ROWS, FEATURES)).astype("float32")
LABELS = RNG.integers(0, CLASSES, ROWS)


def gated(experts: int | tuple[int, ...] = (5, 3)) -> MuMoE:
    """A layer whose gate chooses: fresh ones are all alike."""
    layer = MuMoE(FEATURES, CLASSES, experts, "tensor_ring", rank=2, seed=1)
    for name, array in layer.parameters.items():
        if name.startswith("gate.projection"):
            array[:] = np.random.default_rng(7).standard_normal(array.shape) * 2
    return layer


def test_numbers_are_those_of_analysis() -> None:
    layer = gated()
    found = explore(layer, X, LABELS, head="identity", classes=CLASSES, top=6, nearest=2)
    coefficients = layer.coefficients(X)
    assert found.experts == (5, 3)
    for level, made in enumerate(found.levels):
        load = expert_load(coefficients[level])
        np.testing.assert_array_equal(made.load.mass, load.mass)
        np.testing.assert_array_equal(made.load.counts, load.counts)
        histogram = class_histogram(coefficients[level], LABELS, classes=CLASSES)
        np.testing.assert_array_equal(made.histogram.mass, histogram.mass)
        special = specialization(histogram)
        np.testing.assert_array_equal(made.specialization.excess, special.excess)
        effects = interventions(layer.config, layer.arrays, X, LABELS, level=level)
        np.testing.assert_array_equal(made.interventions.lost, effects.lost)
        assert effects.lost.sum() > 0
        np.testing.assert_array_equal(made.polysemanticity, polysemanticity(effects))
        cosines = expert_similarity(layer.config, layer.arrays, level)
        np.fill_diagonal(cosines, -2)
        np.testing.assert_array_equal(made.nearest.numbers[:, 0], cosines.argmax(axis=1))
        np.testing.assert_array_equal(made.nearest.cosines[:, 0], cosines.max(axis=1))
    expected = np.einsum("ta,tb->ab", *coefficients) / ROWS
    np.testing.assert_allclose(found.grids[0], expected, rtol=1e-6)


@pytest.mark.parametrize("framework", [np.asarray, torch.tensor, jnp.asarray])
def test_contributions_are_what_silent_experts_take_away(framework: Any) -> None:
    layer = gated()
    arrays = {name: framework(each) for name, each in layer.arrays.items()}
    found = explore(
        layer.config, framework(X), LABELS, arrays=arrays, head="identity", classes=CLASSES, top=6
    )
    coefficients = layer.coefficients(X)
    for number, each in found.recorded.items():
        assert len(each.contributions) == 2
        for level, part in enumerate(each.contributions):
            assert part.experts.tolist() == np.flatnonzero(coefficients[level][number]).tolist()
            np.testing.assert_allclose(part.logits.sum(axis=0), each.logits, atol=1e-4)
            pair = [int(n) for n in part.experts[:2]]
            mixed = [a[number : number + 1].copy() for a in coefficients]
            mixed[level][:, pair] = 0.0
            without = layer(X[number : number + 1], mixed)[0]
            taken = np.array(each.logits) - part.logits[: len(pair)].sum(axis=0)
            np.testing.assert_allclose(taken, without, atol=1e-4)


@pytest.mark.parametrize("linear", [True, False])
def test_changed_logits_are_those_of_the_layer_run_again(linear: bool) -> None:
    layer = gated()
    out = np.random.default_rng(3).standard_normal((CLASSES, CLASSES)).astype("float32")

    def rest(outputs: np.ndarray) -> np.ndarray:
        return outputs if linear else np.tanh(outputs) @ out

    head = "identity" if linear else rest
    found = explore(layer, X, LABELS, head=head, classes=CLASSES, top=4)
    assert found.linear == linear
    assert found.scales == ((0.0,) if linear else (0.0, 0.5, 2.0))
    changes = 0
    for level, made in enumerate(found.levels):
        for expert in range(made.experts):
            for slot, number in enumerate(made.top.numbers[expert]):
                row = X[number : number + 1]
                logits = rest(layer(row))
                recorded = found.recorded[int(number)]
                np.testing.assert_allclose(recorded.logits, logits[0], atol=1e-5)
                assert recorded.label == LABELS[number]
                for index, scale in enumerate(found.scales):
                    mixed = [each.copy() for each in layer.coefficients(row)]
                    mixed[level][0, expert] *= scale
                    again = rest(layer(row, coefficients=mixed))[0]
                    np.testing.assert_allclose(
                        made.top.changed[expert, slot, index], again, atol=1e-5
                    )
                    changes += again.argmax() != logits.argmax()
    assert changes


def test_affected_inputs_are_those_whose_prediction_changes() -> None:
    layer = gated()
    found = explore(layer, X, head="identity", top=4)
    (coefficients, _), whole = layer.coefficients(X), layer(X).argmax(axis=1)
    counts = []
    for expert in range(5):
        silent = [each.copy() for each in layer.coefficients(X)]
        silent[0][:, expert] = 0
        moved = layer(X, coefficients=silent).argmax(axis=1) != whole
        rows = np.flatnonzero(moved & (coefficients[:, expert] > 0))
        order = rows[np.argsort(-coefficients[rows, expert], kind="stable")][:4]
        affected = found.levels[0].affected.numbers[expert]
        assert affected[affected >= 0].tolist() == order.tolist()
        counts.append(len(rows))
        for number, changed in zip(order, found.levels[0].affected.changed[expert], strict=False):
            assert changed[0].argmax() != np.argmax(found.recorded[int(number)].logits)
    assert min(counts) < 4 < max(counts)


def test_batches_add_up() -> None:
    layer = gated()
    pictures = RNG.integers(0, 256, (ROWS, 3, 3)).astype("uint8")

    def part(start: int, stop: int) -> Exploration:
        return explore(
            layer,
            X[start:stop],
            LABELS[start:stop],
            head="identity",
            classes=CLASSES,
            examples=Images(pictures[start:stop]),
        )

    whole, added = part(0, ROWS), part(0, 40) + part(40, 40) + part(40, ROWS)
    assert added.inputs == ROWS
    assert list(added.recorded) == list(whole.recorded)
    for number, each in whole.recorded.items():
        assert added.recorded[number].content == each.content
        np.testing.assert_allclose(added.recorded[number].logits, each.logits, rtol=1e-5, atol=1e-6)
        for one, two in zip(added.recorded[number].contributions, each.contributions, strict=True):
            np.testing.assert_array_equal(one.experts, two.experts)
            np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    for one, two in zip(added.levels, whole.levels, strict=True):
        np.testing.assert_array_equal(one.top.numbers, two.top.numbers)
        np.testing.assert_allclose(one.top.values, two.top.values, rtol=1e-6)
        np.testing.assert_allclose(one.top.changed, two.top.changed, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.histogram.mass, two.histogram.mass, rtol=1e-5)
        np.testing.assert_array_equal(one.interventions.lost, two.interventions.lost)
        np.testing.assert_array_equal(one.affected.numbers, two.affected.numbers)
        assert one.load.inputs == ROWS
    np.testing.assert_allclose(added.grids[0], whole.grids[0], rtol=1e-5)


def test_every_framework_says_the_same() -> None:
    layer = gated()
    config, arrays = layer.config, layer.arrays
    expected = explore(layer, X, LABELS, head="identity", classes=CLASSES)
    moved = {name: jax.numpy.asarray(value) for name, value in arrays.items()}
    tensors = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
    module = tensormoe_torch.MuMoE.restore(config, tensors)
    # as a user has it: labels are tensors, gradients are on
    cases = [
        (module, torch.from_numpy(X), torch.from_numpy(LABELS), None),
        (tensormoe_jax.nnx.MuMoE.restore(config, moved), jax.numpy.asarray(X), LABELS, None),
        (tensormoe_jax.equinox.MuMoE.restore(config, moved), jax.numpy.asarray(X), LABELS, None),
        (config, X, LABELS.tolist(), arrays),
    ]
    assert isinstance(cases[1][0], flax.nnx.Module)
    assert isinstance(cases[2][0], eqx.Module)
    for model, x, labels, given_arrays in cases:
        found = explore(model, x, labels, arrays=given_arrays, head="identity", classes=CLASSES)
        for one, two in zip(found.levels, expected.levels, strict=True):
            np.testing.assert_array_equal(one.top.numbers, two.top.numbers)
            np.testing.assert_allclose(one.top.changed, two.top.changed, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(one.load.mass, two.load.mass, rtol=1e-4)
            np.testing.assert_array_equal(one.interventions.lost, two.interventions.lost)
            np.testing.assert_array_equal(one.nearest.numbers, two.nearest.numbers)
        # what the page holds differs in rounding alone
        assert abs(len(found.html()) - len(expected.html())) < 2000


def test_blocks() -> None:
    block = MuMoEMLP(FEATURES, 10, CLASSES, experts=4, rank=3, seed=0)
    block.parameters["gate.projection_0"][:] = RNG.standard_normal((FEATURES, 4))
    found = explore(block, X, LABELS, head="identity", classes=CLASSES, top=3)
    (level,) = found.levels
    assert not found.linear
    cosines = expert_similarity(block.config, block.parameters)
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(level.nearest.numbers[:, 0], cosines.argmax(axis=1))
    assert not any(each.contributions for each in found.recorded.values())
    coefficients = block.coefficients(X)[0]
    lost = 0
    for expert in range(4):
        mixed = coefficients.copy()
        mixed[:, expert] = 0
        without = block(X, coefficients=[mixed])
        number = level.top.numbers[expert, 0]
        np.testing.assert_allclose(level.top.changed[expert, 0, 0], without[number], atol=1e-5)
        right = block(X).argmax(axis=1) == LABELS
        lost += int((right & (without.argmax(axis=1) != LABELS)).sum())
    assert level.interventions.lost.sum() == lost > 0
    module = tensormoe_torch.MuMoEMLP.restore(
        block.config, {name: torch.from_numpy(each) for name, each in block.arrays.items()}
    )
    with pytest.raises(ValueError, match=r"Call layer\.eval\(\)"):
        explore(module, torch.from_numpy(X), LABELS, head="identity", classes=CLASSES)
    again = explore(module.eval(), torch.from_numpy(X), LABELS, head="identity", classes=CLASSES)
    np.testing.assert_array_equal(again.levels[0].interventions.lost, level.interventions.lost)


def test_coefficients_by_index_and_runs() -> None:
    dense = sparse(RNG, ROWS, 7, 2)
    order = np.argsort(-dense, axis=1)[:, :2]
    chosen = TopK(order, np.take_along_axis(dense, order, axis=1))
    one = explore_coefficients(dense, LABELS)
    two = explore_coefficients(chosen, LABELS, experts=7)
    np.testing.assert_allclose(one.levels[0].top.values, two.levels[0].top.values)
    np.testing.assert_array_equal(one.levels[0].top.numbers, two.levels[0].top.numbers)
    weights = RNG.standard_normal((7, CLASSES)).astype("float32")

    def run(x: np.ndarray, coefficients: list[np.ndarray]) -> np.ndarray:
        return x[:, :CLASSES] + coefficients[0] @ weights

    found = explore_coefficients(dense, LABELS, classes=CLASSES, inputs=X, run=run)
    expert = 2
    number = found.levels[0].top.numbers[expert, 0]
    expected = run(X, [dense])[number] - dense[number, expert] * weights[expert]
    np.testing.assert_allclose(found.levels[0].top.changed[expert, 0, 0], expected, atol=1e-5)


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_top_inputs_against_a_sort(rows: int, experts: int, k: int, seed: int) -> None:
    # few values, so that many are equal
    values = np.random.default_rng(seed).integers(0, 4, (rows, experts)) / 3
    found = top_inputs(values, k)
    for expert in range(experts):
        column = values[:, expert]
        order = [row for row in sorted(range(rows), key=lambda r: (-column[r], r)) if column[row]]
        order = (order + [-1] * k)[:k]
        assert found.numbers[expert].tolist() == order
        assert found.values[expert].tolist() == [column[r] if r >= 0 else 0 for r in order]


def test_top_inputs_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.integers(0, 9, (100, 4)) / 8
    whole = top_inputs(values, 3)
    monkeypatch.setattr("tensormoe.analysis._explorer._top._PAIRS", 20)
    parts = top_inputs(values, 3)
    np.testing.assert_array_equal(whole.numbers, parts.numbers)


def test_marks_keep_to_their_text() -> None:
    texts = [["a", "b", "c"], ["d"], ["e", "f"]]
    values = np.arange(1, 7)[:, None] / 10
    found = explore_coefficients(values, examples=Tokens(texts, window=2), top=6)
    (level,) = found.levels
    for slot, number in enumerate(level.top.numbers[0]):
        content = found.recorded[int(number)].content
        text, at = Tokens(texts).place(int(number))
        first = max(at - 2, 0)
        assert content == {"tokens": texts[text][first : at + 3], "first": first - at}
        start = sum(map(len, texts[:text]))
        expected = [
            values[start + at + d, 0] if 0 <= at + d < len(texts[text]) else 0 for d in range(-2, 3)
        ]
        np.testing.assert_allclose(level.top.marks[0, slot], expected, rtol=1e-6)


def test_no_labels_no_inputs_one_class_unused_experts() -> None:
    free = explore_coefficients(sparse(RNG, 10, 3))
    assert free.class_names == ()
    assert free.levels[0].histogram is None
    empty = explore_coefficients(np.zeros((0, 3)), [], classes=2, examples=Texts([]))
    assert empty.inputs == 0
    assert empty.levels[0].top.numbers.max() == -1
    one = explore_coefficients(np.eye(3)[[0, 0, 1]], [0, 0, 0])
    assert one.levels[0].specialization.divergence[:2].tolist() == [0, 0]
    assert one.levels[0].load.dead.tolist() == [2]
    for found in (free, empty, one):
        assert found.html()
    layer = gated()
    nothing = explore(layer, X[:0], LABELS[:0], head="identity", classes=CLASSES)
    assert nothing.inputs == 0
    blind = explore(layer, X, head="identity")
    assert blind.levels[0].histogram is None
    assert blind.levels[0].top.changed is not None

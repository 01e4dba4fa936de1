"""Interventions equal the loop that silences one expert after the other, on every library."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import CP, Dense, Factorization, Gate, LayerSpec
from tensormoe.analysis import (
    Interventions,
    chance_polysemanticity,
    expert_similarity,
    interventions,
    interventions_by_runs,
    logit_attribution,
    polysemanticity,
)
from tensormoe.backend import get_backend
from tensormoe.editing import silence_experts
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import (
    BlockConfig,
    LayerConfig,
    Options,
    apply_experts,
    level_outputs,
    materialize,
    route,
)
from tensormoe_torch import MuMoEMLP
from tests._cupy_standin import device, installed
from tests._kinds import DELTAS, KINDS, UNEVEN

NUMPY = get_backend("numpy")
LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.tensor,
    "jax": jnp.asarray,
    "cupy": lambda array: device({"": array})[""],
}


def layer(
    kind: Factorization, experts: Any = (4, 3), bias: bool = True, gate: Gate | None = None
) -> tuple[LayerConfig, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    config = LayerConfig(LayerSpec(6, 5, experts, kind, bias), gate or Gate())
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal(shape) for name, shape in config.parameter_shapes().items()}
    return config, arrays, rng.standard_normal((30, 6)), rng.integers(0, 5, 30)


def by_loop(
    config: LayerConfig, arrays: dict[str, Any], x: Any, labels: Any, level: int, head: Any = None
) -> Interventions:
    """One pass for each expert, with its slice set to zero."""
    shares = route(config, arrays, x, NUMPY).coefficients

    def predict(values: dict[str, Any]) -> Any:
        made = apply_experts(config, values, x, shares, NUMPY)
        return (made if head is None else head(made)).argmax(1)

    right = predict(arrays) == labels
    classes = 5
    rows = []
    for expert in range(config.spec.experts[level]):
        still = predict(silence_experts(config, arrays, expert, level)) == labels
        rows.append(
            [
                np.bincount(labels[where], minlength=classes)
                for where in (right & ~still, ~right & still)
            ]
        )
    counts = [np.bincount(labels[where], minlength=classes) for where in (right, right | True)]
    return Interventions(
        np.array([lost for lost, _ in rows]), np.array([gained for _, gained in rows]), *counts
    )


def same(found: Interventions, want: Interventions) -> None:
    for name in ("lost", "gained", "correct", "inputs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("kind", [each for each in UNEVEN if each not in DELTAS], ids=repr)
def test_as_the_loop(kind: Factorization, level: int) -> None:
    given_ = layer(kind)
    want = by_loop(*given_, level)
    assert want.lost.sum() > 0
    same(interventions(*given_, level=level), want)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_of_a_level_add_up(kind: Factorization, bias: bool) -> None:
    """Parts that deltas have in common count as part of each expert."""
    for experts in ((7,), (4, 3)):
        config, arrays, x, _ = layer(kind, experts, bias)
        shares = route(config, arrays, x, NUMPY).coefficients
        whole = apply_experts(config, arrays, x, shares, NUMPY)
        for level in range(len(experts)):
            made = level_outputs(config, arrays, x, shares, level, NUMPY)
            assert made.shape == (experts[level], 30, 5)
            total = np.einsum("nbo,bn->bo", made, shares[level])
            np.testing.assert_allclose(total, whole, atol=1e-10)


def test_with_a_head_and_in_parts() -> None:
    config, arrays, x, labels = layer(CP(7), (6,), gate=Gate("softmax"))
    weight = np.random.default_rng(4).standard_normal((5, 5))

    def head(rows: Any) -> Any:
        return np.tanh(rows) @ weight

    want = by_loop(config, arrays, x, labels, 0, head)
    same(interventions(config, arrays, x, labels, head=head, classes=5), want)
    parts = [
        interventions(config, arrays, x[part], labels[part], head=head, classes=5)
        for part in (slice(11), slice(11, None))
    ]
    same(parts[0] + parts[1], want)
    shares = route(config, arrays, x, NUMPY).coefficients
    other = interventions_by_runs(
        lambda rows, mixed: head(apply_experts(config, arrays, rows, mixed, NUMPY)),
        x,
        labels,
        shares,
        batch=17,
    )
    same(other, want)


def test_every_library_gives_the_same() -> None:
    config, arrays, x, labels = layer(CP(7), (4, 3))
    found, attributed, alike = [], [], []
    direction = np.random.default_rng(2).standard_normal((30, 5)).astype("float32")
    with installed():
        for put in LIBRARIES.values():
            values = {name: put(array.astype("float32")) for name, array in arrays.items()}
            rows = put(x.astype("float32"))
            found.append(interventions(config, values, rows, put(labels), level=1))
            shares = route(
                config, values, rows, get_backend("numpy") if put is np.asarray else _of(rows)
            ).coefficients
            attributed.append(
                logit_attribution(config, values, rows, shares, put(direction), level=1)
            )
            alike.append(expert_similarity(config, values, 1))
    for other in found[1:]:
        same(other, found[0])
    for each in attributed[1:]:
        np.testing.assert_allclose(each, attributed[0], atol=1e-5)
    for each in alike[1:]:
        np.testing.assert_allclose(each, alike[0], atol=1e-6)


def _of(array: Any) -> Any:
    from tensormoe.backend import backend_of

    return backend_of(array)


def test_steps_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = layer(CP(7))
    want = interventions(*given_)
    monkeypatch.setattr("tensormoe.analysis._interventions._BLOCK", 1)
    same(interventions(*given_), want)


def test_blocks_by_runs() -> None:
    torch.manual_seed(0)
    block = MuMoEMLP(6, 8, 5, experts=4, rank=6, gate=Gate("softmax"))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x, labels = torch.randn(25, 6), torch.randint(0, 5, (25,))

    @torch.no_grad()
    def run(rows: Any, mixed: Any) -> Any:
        return block(rows, mixed)

    with torch.no_grad():
        (shares,) = block.coefficients(x)
        found = interventions_by_runs(run, x, labels, [shares])
        right = block(x).argmax(1) == labels
        for expert in range(4):
            silent = silence_experts(
                block.config, {n: p.detach() for n, p in block.named_parameters()}, expert
            )
            still = MuMoEMLP.restore(block.config, silent)(x).argmax(1) == labels
            assert found.lost[expert].sum() == (right & ~still).sum()
            assert found.gained[expert].sum() == (~right & still).sum()
    assert found.correct.sum() == right.sum()


def test_unused_experts_change_nothing() -> None:
    config, arrays, x, labels = layer(CP(7), (6,))
    shares = np.zeros((30, 6))
    shares[:, 2] = 1.0
    found = interventions(config, arrays, x, labels, [shares])
    assert found.lost[[0, 1, 3, 4, 5]].sum() == found.gained[[0, 1, 3, 4, 5]].sum() == 0
    measure = polysemanticity(found)
    assert np.isnan(measure[[0, 1, 3, 4, 5]]).all()
    assert 0 <= measure[2] < 1


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_polysemanticity_lies_between_one_class_and_all(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    correct = rng.integers(1, 50, classes)
    lost = rng.integers(0, correct + 1, (7, classes))
    lost[0] = 0
    lost[0, seed % classes] = 1
    lost[1] = correct  # all of every class: the most that can be
    found = polysemanticity(Interventions(lost, 0 * lost, correct, correct))
    assert found[0] == 0
    most = np.sqrt((1 - 1 / classes) ** 2 + (classes - 1) / classes**2)
    assert found[1] == pytest.approx(most)
    assert np.nanmax(found) <= most + 1e-12


def test_chance_is_that_of_as_many_predictions() -> None:
    correct = np.array([40, 160])
    lost = np.array([[1, 0], [4, 16], [40, 160], [0, 0]])
    found = chance_polysemanticity(Interventions(lost, 0 * lost, correct, correct), draws=400)
    assert found[0] == 0
    # a fifth of the predictions are of the first class: its share of them weighs four times as much
    shares = [(first / 40, (20 - first) / 160) for first in range(21)]
    chances = [comb(20, first) * 0.2**first * 0.8 ** (20 - first) for first in range(21)]
    want = sum(p * 2**0.5 * min(a, b) / (a + b) for p, (a, b) in zip(chances, shares, strict=True))
    assert found[1] == pytest.approx(want, abs=0.03)
    assert np.isnan(found[3])
    with pytest.raises(SpecError, match="draws must be a positive"):
        chance_polysemanticity(Interventions(lost, lost, correct, correct), draws=0)


@pytest.mark.parametrize("kind", UNEVEN, ids=repr)
def test_similarity_is_that_of_matrices(kind: Factorization) -> None:
    config, arrays, _, _ = layer(kind)
    whole, _ = materialize(config, arrays, NUMPY)
    for level in (0, 1):
        rows = np.moveaxis(whole, level, 0).reshape(config.spec.experts[level], -1)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(
            expert_similarity(config, arrays, level), rows @ rows.T, atol=1e-9
        )


@pytest.mark.parametrize("how", ["matrices", "composed"])
@pytest.mark.parametrize("kind", UNEVEN, ids=repr)
def test_similarity_in_blocks_is_that_of_matrices(kind: Factorization, how: str) -> None:
    config, arrays, whole = block(kind)
    for level in (0, 1):
        rows = []
        first, second = (np.moveaxis(each, level, 0) for each in whole)
        for one, two in zip(first, second, strict=True):
            # all experts of the other level have a part
            parts = [one, two] if how == "matrices" else [one @ two]
            rows.append(np.concatenate([each.ravel() for each in parts]))
        made = np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
        found = expert_similarity(config, arrays, level, how=how)
        np.testing.assert_allclose(found, made @ made.T, atol=1e-9)


def test_hidden_units_in_another_order_are_the_same_composed_expert() -> None:
    config, arrays, _ = block(Dense())
    first, second = arrays["first.factors.weight"], arrays["second.factors.weight"]
    order = np.random.default_rng(0).permutation(first.shape[-1])
    first[2] = first[0][..., order] * 2.0
    second[2] = second[0][..., order, :] / 2.0
    assert expert_similarity(config, arrays, how="composed")[0, 2] == pytest.approx(1.0)
    assert expert_similarity(config, arrays)[0, 2] < 0.9


def block(kind: Factorization) -> tuple[BlockConfig, dict[str, Any], list[Any]]:
    """A block of two levels with random arrays, and the matrices of its layers."""
    specs = LayerSpec(5, 6, (4, 3), kind), LayerSpec(6, 3, (4, 3), kind)
    config = BlockConfig(LayerConfig(specs[0], Gate()), LayerConfig(specs[1], None), "gelu")
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal(s) for name, s in config.parameter_shapes().items()}
    whole = []
    for name, layer in (("first.", config.first), ("second.", config.second)):
        own = {k.removeprefix(name): each for k, each in arrays.items() if k.startswith(name)}
        whole.append(materialize(LayerConfig(layer.spec, None), own, NUMPY)[0])
    return config, arrays, whole


def test_similarity_of_a_silent_expert() -> None:
    config, arrays, _, _ = layer(CP(7), (4,))
    found = expert_similarity(config, silence_experts(config, arrays, 2))
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]][:, [0, 1, 3]]).all()


CONFIG, ARRAYS, X, LABELS = layer(CP(7), (6,))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: interventions(CONFIG, ARRAYS, X, LABELS[:3]), ShapeError, "got 3 for 30 inputs"),
        (lambda: interventions(CONFIG, ARRAYS, X, LABELS, level=1), ShapeError, "level must lie"),
        (
            lambda: interventions(CONFIG, ARRAYS, X, LABELS, [np.ones((4, 6))]),
            ShapeError,
            "those of the 30 inputs",
        ),
        (
            lambda: interventions(LayerConfig(CONFIG.spec, None), ARRAYS, X, LABELS),
            ShapeError,
            "has no gate",
        ),
        (
            lambda: interventions(
                Options(6, "cp", rank=2).block(6, 8),
                ARRAYS,
                X,
                LABELS,  # type: ignore[arg-type]
            ),
            SpecError,
            "the configuration of a layer",
        ),
        (
            lambda: logit_attribution(CONFIG, ARRAYS, X, [np.ones((30, 6))], np.ones(4)),
            ShapeError,
            "directions must be",
        ),
        (lambda: expert_similarity(CONFIG, ARRAYS, 2), ShapeError, "level must lie"),
        (lambda: expert_similarity(CONFIG, ARRAYS, how="pair"), SpecError, "how must be"),
        (lambda: expert_similarity(CONFIG, ARRAYS, how="composed"), SpecError, "for a layer"),
        (
            lambda: expert_similarity(
                Options(6, "cp", rank=2, gate="entmax").block(6, 8, gated=True), {}, how="composed"
            ),
            SpecError,
            "for gated ones",
        ),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

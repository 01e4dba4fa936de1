"""Experts replaced by given matrices: the best slice, as brute force finds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, BaseDelta, Dense, LayerSpec, SharedBasis, SharedDelta, TensorRing, Tucker
from tensormoe.testing import reconstruct_by_einsum
from tensormoe_torch import MuMoE, replace_expert, restored
from tests._kinds import KINDS
from tests.torch._helpers import assert_near, build, factors_of, normal, pick, put, weights

EXPERTS = [(5,), (4, 3), (2, 3, 2)]

SEVERAL = ("low_rank", "shared_basis", "base_delta")
"""Where an expert has more than one array of its own."""


def carriers(layer: MuMoE, level: int) -> dict[str, int]:
    """The arrays whose slices are fitted, with the axis of a level's experts."""
    kind = layer.spec.factorization.name
    if kind == "dense":
        return {"weight": level, "bias": level}
    if kind == "low_rank":
        return {"input": 1 + level, "bias": level}
    if kind == "base_delta":
        # all of them are affine in these, around the base
        return {"input": 1 + level, "bias_1": level}
    if kind in ("shared_basis", "shared_delta"):
        wide = layer.spec.in_features >= layer.spec.out_features
        bias = "bias_1" if kind == "shared_delta" else "bias"
        return {"output": 1 + level} if wide else {"input": 1 + level, bias: level}
    return {f"expert_{level}": 0}


def jacobian_fit(
    layer: MuMoE, level: int, place: int, target: np.ndarray, rows: slice
) -> np.ndarray:
    """The best slice by brute force: the design matrix column by column, then SVD."""
    arrays, names = factors_of(layer), carriers(layer, level)
    sliced = [np.moveaxis(arrays[name], axis, 0)[place] for name, axis in names.items()]
    size = sum(each.size for each in sliced)

    def expert(flat: np.ndarray) -> np.ndarray:
        changed = dict(arrays)
        parts = np.split(flat, np.cumsum([s.size for s in sliced]))
        for (name, axis), part in zip(names.items(), parts, strict=False):
            shape = np.moveaxis(arrays[name], axis, 0)[place].shape
            changed[name] = put(arrays[name], axis, place, part.reshape(shape))
        full = reconstruct_by_einsum(layer.spec.factorization, changed)
        return pick(full, level, place)[..., rows, :].ravel()

    common = expert(np.zeros(size))
    design = np.stack([expert(row) - common for row in np.eye(size)], axis=1)
    found = np.linalg.lstsq(design, target[..., rows, :].ravel() - common, rcond=None)[0]
    return (common + design @ found).reshape(target[..., rows, :].shape)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_replacing_is_least_squares(kind: Any, experts: tuple[int, ...], with_bias: bool) -> None:
    assert_least_squares(build(LayerSpec(6, 5, experts, kind)), with_bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_replacing_where_experts_are_stored_at_the_input(with_bias: bool) -> None:
    assert_least_squares(build(LayerSpec(4, 5, (4, 3), SharedBasis((2, 3)))), with_bias)


def assert_least_squares(layer: MuMoE, with_bias: bool) -> None:
    kind, experts, size = layer.spec.factorization, layer.spec.experts, layer.spec.in_features
    for level in range(len(experts)):
        before = weights(layer)
        others = experts[:level] + experts[level + 1 :]
        target = np.random.default_rng(100 + level).standard_normal((*others, size + 1, 5))
        rows = slice(None) if with_bias else slice(0, size)
        want = jacobian_fit(layer, level, 1, target, rows)
        given_bias = torch.tensor(target[..., size, :]) if with_bias else None
        with restored(layer):
            error = replace_expert(
                layer, 1, torch.tensor(target[..., :size, :]), given_bias, level=level
            )
            after = weights(layer)
            again = jacobian_fit(layer, level, 1, target, rows)
        off = np.linalg.norm(pick(after, level, 1)[..., rows, :] - target[..., rows, :])
        if kind.name in SEVERAL:
            # better than one array alone, and then no array alone is any better
            assert off < (1.0 - 1e-6) * np.linalg.norm(want - target[..., rows, :])
            assert off < (1.0 + 1e-6) * np.linalg.norm(again - target[..., rows, :])
        else:
            assert_near(pick(after, level, 1)[..., rows, :], want, 1e-9)
        assert error == pytest.approx(
            off / np.linalg.norm(target[..., rows, :]), rel=1e-9, abs=1e-14
        )
        assert_near(put(after, level, 1, pick(before, level, 1)), before, 0.0)
        if kind == Dense():
            assert error < 1e-15
            assert with_bias or np.array_equal(after[..., 6, :], before[..., 6, :])
        else:
            # a base may be farther from an expert than nothing is
            assert 0.1 < error < (1.0 if len(layer.spec.network.terms) == 1 else 1.6)


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_the_factors_span_is_reached(kind: Any, experts: tuple[int, ...]) -> None:
    """An expert scaled down and shifted towards another one is still within the span."""
    layer = build(LayerSpec(6, 5, experts, kind))
    level = len(experts) - 1
    before = weights(layer)
    shares = (0.3, -2.0)
    if kind.name in ("low_rank", "shared_basis"):
        # other experts mix the basis otherwise, or have none in common
        shares = (0.3, 0.0)
    elif kind.name == "base_delta":
        # what is not the base's spans an expert's own space
        shares = (1.0, 0.0)
    elif kind.name == "shared_delta":
        # the base is in all of them once
        shares = (3.0, -2.0)
    target = shares[0] * pick(before, level, 0) + shares[1] * pick(before, level, 1)
    rows = torch.tensor(target)
    error = replace_expert(layer, 0, rows[..., :6, :], rows[..., 6, :], level=level)
    assert error < 1e-13
    assert_near(weights(layer), put(before, level, 0, target))


def test_of_equally_close_slices_the_nearest_is_taken() -> None:
    layer = build(LayerSpec(2, 2, 3, CP(30), bias=False))
    slices = layer.factors["expert_0"].detach().clone()
    with restored(layer):
        assert replace_expert(layer, 1, layer.expert(1)[0].detach()) < 1e-14
        torch.testing.assert_close(layer.factors["expert_0"].detach(), slices)
    assert replace_expert(layer, 1, normal(2, 2)) < 1e-13
    moved = layer.factors["expert_0"].detach()[1] - slices[1]
    products = layer.factors["input"][:, None] * layer.factors["output"]
    rows = products.detach().reshape(4, 30)
    # the change has no part in what makes no difference
    torch.testing.assert_close(torch.linalg.pinv(rows) @ (rows @ moved), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_layers_report_what_they_store(dtype: torch.dtype) -> None:
    layer = build(LayerSpec(6, 5, 4, TensorRing((2, 2, 30))), dtype=dtype)
    target = layer.expert(0)[0].double().detach() * 3.0
    error = replace_expert(layer, 2, target)
    stored = torch.tensor(weights(layer)[2, :6])
    assert error == pytest.approx(float((stored - target).norm() / target.norm()), rel=1e-6)
    assert 0.0 < error < 4.0 * torch.finfo(dtype).eps
    assert layer.factors["expert_0"].dtype == dtype


@pytest.mark.parametrize("sizes", [(6, 5), (5, 6)], ids=str)
def test_deltas_become_the_truncated_svd_of_what_the_base_lacks(sizes: tuple[int, int]) -> None:
    layer = build(LayerSpec(*sizes, 4, BaseDelta(2)))
    before = weights(layer)
    target = np.random.default_rng(50).standard_normal((sizes[0] + 1, sizes[1]))
    base = factors_of(layer)["base"]
    lacking = target - np.vstack([base, factors_of(layer)["bias"]])
    left, values, right = np.linalg.svd(lacking)
    want = target - lacking + (left[:, :2] * values[:2]) @ right[:2]
    given = torch.tensor(target)
    error = replace_expert(layer, 2, given[:-1], given[-1])
    assert error == pytest.approx(np.linalg.norm(values[2:]) / np.linalg.norm(target), rel=1e-6)
    assert_near(weights(layer), put(before, 0, 2, want), 1e-3)
    assert np.array_equal(factors_of(layer)["base"], base)


@pytest.mark.parametrize("kind", [BaseDelta(3), SharedDelta(3)], ids=str)
def test_the_nearest_to_a_zero_expert_cancels_the_base(kind: Any) -> None:
    layer = build(LayerSpec(6, 5, 4, kind))
    before = weights(layer)
    arrays = factors_of(layer)
    base = np.vstack([arrays["base"], arrays["bias"]])
    if kind.name == "base_delta":
        left, values, right = np.linalg.svd(base)
        want = base - (left[:, :3] * values[:3]) @ right[:3]
    else:
        # what the shared side reads is taken away
        read = np.vstack([arrays["input"], arrays["bias_1"]])
        want = base - read @ np.linalg.pinv(read) @ base
    distance = replace_expert(layer, 2, torch.zeros(6, 5), torch.zeros(5))
    assert_near(weights(layer), put(before, 0, 2, want), 1e-3)
    # there is nothing to be relative to
    assert distance == pytest.approx(np.linalg.norm(want), rel=1e-6)
    assert 0.0 < distance < np.linalg.norm(before[2])


def test_a_zero_expert_can_be_given() -> None:
    layer = build(LayerSpec(6, 5, 4, Tucker(3)))
    assert replace_expert(layer, 2, torch.zeros(6, 5)) == 0.0
    assert np.array_equal(weights(layer)[2], np.zeros((7, 5)))
    dense = build(LayerSpec(6, 5, 4, Dense()))
    biases = weights(dense)[:, 6]
    assert replace_expert(dense, 2, torch.zeros(6, 5)) == 0.0
    assert np.array_equal(weights(dense)[2, :6], np.zeros((6, 5)))
    assert np.array_equal(weights(dense)[:, 6], biases)

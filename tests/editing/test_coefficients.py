"""Coefficients steered, and thresholds moved by the experts of a subgroup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import TopK
from tensormoe.editing import (
    oversampled_indices,
    steer_experts,
    subgroup_coefficients,
    threshold_blindly,
    threshold_experts,
)
from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe.routing import Routes

RNG = np.random.default_rng(0)
COEFFICIENTS = RNG.dirichlet([0.3] * 5, (4, 6))
LOGITS = RNG.standard_normal((4, 6, 3))
MEMBERS = RNG.random((4, 6)) < 0.4


def test_every_library_computes_what_plain_loops_do(libraries: dict[str, Any]) -> None:
    mean = np.zeros(5)
    for place in np.ndindex(4, 6):
        mean += COEFFICIENTS[place] * MEMBERS[place] / MEMBERS.sum()
    moved, steered = LOGITS.copy(), COEFFICIENTS.copy()
    for place in np.ndindex(4, 6):
        moved[(*place, 2)] += 1.5 * sum(mean[n] * COEFFICIENTS[(*place, n)] for n in range(5))
        steered[(*place, 3)] += 0.25
        steered[(*place, 0)] -= 0.5
    blind = LOGITS + np.array([0.0, -2.0, 0.0])
    for library, (put, get) in libraries.items():
        logits, given = put(LOGITS.astype("float32")), put(COEFFICIENTS.astype("float32"))
        members = put(MEMBERS)
        subgroup = subgroup_coefficients(given, members)
        for found, wanted in (
            (subgroup, mean),
            (subgroup_coefficients([given], MEMBERS.reshape(-1).tolist()), mean),
            (threshold_experts(logits, given, subgroup, 1.5, target=2), moved),
            (threshold_blindly(logits, -2, target=1), blind),
            (steer_experts(given, {3: 0.25, np.int64(0): -0.5}), steered),
        ):
            assert type(found) is type(logits), library
            np.testing.assert_allclose(get(found), wanted, rtol=0, atol=1e-6, err_msg=library)
        np.testing.assert_array_equal(get(logits), LOGITS.astype("float32"))
        np.testing.assert_array_equal(get(given), COEFFICIENTS.astype("float32"))


@given(data=st.data())
def test_coefficients_by_index_count_as_the_dense_ones(data: st.DataObject) -> None:
    rows, k = data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(1, 4), "k")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    index = np.stack([rng.permutation(4)[:k] for _ in range(rows)])
    values = rng.random((rows, k))
    dense = np.zeros((rows, 4))
    np.put_along_axis(dense, index, values, axis=1)
    routes = Routes(index, values, rng.random((rows, 4)), rng.random((rows, 4)))
    members = [True, *(rng.random(rows - 1) < 0.5)]
    logits, mean = rng.random((rows, 2)), rng.random(4)
    for given_, experts in ((TopK(index, values), 4), (routes, None)):
        for function in (
            lambda each, n: steer_experts(each, {1: 0.5}, experts=n),
            lambda each, n: subgroup_coefficients(each, members, experts=n),
            lambda each, n: threshold_experts(logits, each, mean, 2.0, target=0, experts=n),
        ):
            np.testing.assert_allclose(function(given_, experts), function(dense, None), atol=1e-12)


def test_empty_batches_and_single_inputs() -> None:
    mean = COEFFICIENTS[0, 0]
    assert threshold_experts(np.zeros((0, 2)), np.zeros((0, 5)), mean, 1.0, target=0).shape == (
        0,
        2,
    )
    assert steer_experts(np.zeros((2, 0, 5)), {0: 1.0}).shape == (2, 0, 5)
    one = threshold_experts(np.zeros(2), mean, mean, 3.0, target=1)
    np.testing.assert_allclose(one, [0.0, 3.0 * mean @ mean])
    np.testing.assert_array_equal(subgroup_coefficients(mean, [True]), mean)


def test_half_precision_is_summed_in_float32_and_kept() -> None:
    given_ = torch.tensor(COEFFICIENTS).to(torch.bfloat16)
    logits = torch.tensor(LOGITS).to(torch.bfloat16)
    mean = subgroup_coefficients(given_, torch.tensor(MEMBERS))
    assert mean.dtype == torch.float32
    found = threshold_experts(logits, given_, mean, 2.0, target=1)
    wanted = logits.float()
    wanted[..., 1] += 2.0 * (given_.float() * mean).sum(-1)
    assert found.dtype == steer_experts(given_, {0: 1.0}).dtype == torch.bfloat16
    assert torch.equal(found, wanted.to(torch.bfloat16))


def test_other_classes_stay_as_they_are_bit_for_bit() -> None:
    logits = np.array([[np.inf, 0.1, -np.inf], [np.nan, 0.2, 1e300]])
    found = threshold_experts(logits, np.eye(2), np.array([1.0, 0.0]), 2.0, target=1)
    np.testing.assert_array_equal(found[:, [0, 2]], logits[:, [0, 2]])
    assert found[:, 1].tolist() == [2.1, 0.2]


def test_compiled_and_differentiated() -> None:
    def total(logits: Any, given_: Any, mean: Any, weights: Any) -> Any:
        steered = steer_experts(given_, {1: 0.5})
        return (threshold_experts(logits, steered, mean, 2.0, target=1) * weights).sum()

    weights = RNG.standard_normal(LOGITS.shape)
    mean = COEFFICIENTS.mean((0, 1))
    along = 2.0 * weights[..., 1:2]
    steered = COEFFICIENTS + np.eye(5)[1] * 0.5
    wanted = weights, along * mean, (along * steered).sum((0, 1))
    arrays = [jnp.asarray(each) for each in (LOGITS, COEFFICIENTS, mean, weights)]
    for found, each in zip(jax.jit(jax.grad(total, (0, 1, 2)))(*arrays), wanted, strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-5)
    tensors = [torch.tensor(each) for each in (LOGITS, COEFFICIENTS, mean, weights)]
    for each in tensors[:3]:
        each.requires_grad_()
    torch.compile(total, backend="aot_eager", fullgraph=True)(*tensors).backward()
    for tensor, each in zip(tensors[:3], wanted, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), each, atol=1e-12)
    # the mean is differentiable too, and compiles where the members are known
    sums = jax.jit(jax.grad(lambda each: subgroup_coefficients(each, [True, False, True])[1]))
    np.testing.assert_allclose(sums(jnp.ones((3, 2))), [[0, 0.5], [0, 0], [0, 0.5]])


@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    seed=st.integers(0, 9),
)
def test_oversampled_groups_are_equally_many(groups: list[int], seed: int) -> None:
    found = oversampled_indices(groups, seed=seed)
    drawn = np.array(groups)[found]
    largest = max(groups.count(each) for each in groups)
    assert {each: (drawn == each).sum() for each in groups} == dict.fromkeys(groups, largest)
    assert set(found.tolist()) == set(range(len(groups)))
    assert (np.diff(found) >= 0).all()
    np.testing.assert_array_equal(found, oversampled_indices(np.array(groups), seed=seed))
    np.testing.assert_array_equal(found, oversampled_indices([*map(str, groups)], seed=seed))


def test_draws_of_oversampling_depend_on_the_seed() -> None:
    groups = [0] * 50 + [1] * 20
    assert (oversampled_indices(groups, seed=0) != oversampled_indices(groups, seed=1)).any()


MEAN = COEFFICIENTS[0, 0]


def threshold(**changed: Any) -> Any:
    usual: dict[str, Any] = {"logits": LOGITS, "coefficients": COEFFICIENTS, "subgroup": MEAN}
    return threshold_experts(**{**usual, "scale": 1.0, "target": 0, **changed})


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: threshold(coefficients=[COEFFICIENTS] * 2), ShapeError, r"got 2 levels. Pass coeff"),
    (lambda: threshold(coefficients=[]), ShapeError, "got 0 levels"),
    (lambda: threshold(coefficients=COEFFICIENTS[0]), ShapeError, r"got \(4, 6, 3\) and \(6, 5\)"),
    (lambda: threshold(coefficients=COEFFICIENTS > 0), ShapeError, "real floating point; got bool"),
    (lambda: threshold(coefficients=3.0), BackendError, "float"),
    (lambda: threshold(experts=4), ShapeError, r"axis of 4 experts; got shape \(4, 6, 5\)"),
    (lambda: threshold(logits=LOGITS[..., 0]), ShapeError, "must be those of the same inputs"),
    (lambda: threshold(logits=LOGITS[:2]), ShapeError, r"got \(2, 6, 3\) and \(4, 6, 5\)"),
    (
        lambda: threshold(logits=LOGITS.astype(int)),
        ShapeError,
        "logits must be real floating point",
    ),
    (
        lambda: threshold(logits=jnp.ones((4, 6, 3))),
        BackendError,
        "logits must be an array of nump",
    ),
    (lambda: threshold(logits=np.ones(())), ShapeError, "got float64 of shape"),
    (
        lambda: threshold(subgroup=MEAN[:4]),
        ShapeError,
        r"of the 5 experts, \(5,\); got \(4,\). sub",
    ),
    (lambda: threshold(subgroup=[0.2] * 5), BackendError, "subgroup must be an array of numpy"),
    (lambda: threshold(scale=np.inf), SpecError, "scale must be a finite number; got inf"),
    (lambda: threshold(scale=float("nan")), SpecError, "finite number; got nan"),
    (lambda: threshold(scale="1"), SpecError, "finite number; got '1'"),
    (lambda: threshold(scale=True), SpecError, "finite number; got True"),
    (lambda: threshold(target=3), ShapeError, r"target must lie in \[0, 3\), the classes; got 3"),
    (lambda: threshold(target=-1), ShapeError, "got -1"),
    (lambda: threshold(target=True), ShapeError, "got True"),
    (lambda: threshold_blindly(LOGITS, np.nan, target=0), SpecError, "finite number; got nan"),
    (lambda: threshold_blindly(LOGITS, 1.0, target=5), ShapeError, "got 5"),
    (lambda: threshold_blindly([1.0], 1.0, target=0), BackendError, "list"),  # type: ignore[arg-type]
    (
        lambda: subgroup_coefficients(COEFFICIENTS, MEMBERS & False),
        ShapeError,
        "of the 24 inputs; got none",
    ),
    (lambda: subgroup_coefficients(COEFFICIENTS, [False] * 24), ShapeError, "one of the 24 inputs"),
    (lambda: subgroup_coefficients(jnp.ones((2, 3)), jnp.zeros(2, bool)), ShapeError, "got none"),
    (lambda: subgroup_coefficients(np.ones((0, 3)), []), ShapeError, "of the 0 inputs"),
    (
        lambda: subgroup_coefficients(COEFFICIENTS, MEMBERS[0]),
        ShapeError,
        r"\(4, 6\); got shape \(6,",
    ),
    (lambda: subgroup_coefficients(COEFFICIENTS, MEMBERS.T), ShapeError, r"got shape \(6, 4\)"),
    (lambda: subgroup_coefficients(COEFFICIENTS, [True]), ShapeError, r"got shape \(1,\)"),
    (
        lambda: subgroup_coefficients(MEAN[None], [1]),
        ShapeError,
        "must be booleans; got 1. Compare",
    ),
    (
        lambda: subgroup_coefficients(MEAN[None], np.array([1])),
        ShapeError,
        "got int64. Compare lab",
    ),
    (lambda: subgroup_coefficients(MEAN[None], 1), BackendError, "int"),
    (lambda: subgroup_coefficients([MEAN, MEAN], [True]), ShapeError, "got 2 levels"),
    (
        lambda: jax.jit(lambda each: subgroup_coefficients(jnp.ones((2, 3)), each))(
            np.ones(2, bool)
        ),
        BackendError,
        "members must have known values; got an array that is traced",
    ),
    (
        lambda: steer_experts(TopK(np.array([[0]]), np.array([[1.0]])), {0: 1.0}),
        ShapeError,
        "got a TopK alone. Pass experts=N",
    ),
    (
        lambda: steer_experts(MEAN, {5: 1.0}),
        ShapeError,
        r"expert index must lie in \[0, 5\); got 5",
    ),
    (lambda: steer_experts(MEAN, {-1: 1.0}), ShapeError, "got -1"),
    (lambda: steer_experts(MEAN, {True: 1.0}), ShapeError, "got True"),
    (lambda: steer_experts(MEAN, {0.0: 1.0}), ShapeError, "got 0.0"),  # type: ignore[dict-item]
    (lambda: steer_experts(MEAN, {0: np.inf}), SpecError, "finite number; got inf for expert 0"),
    (lambda: steer_experts(MEAN, {0: None}), SpecError, "got None for expert 0"),  # type: ignore[dict-item]
    (lambda: steer_experts(MEAN, [1.0]), TypeError, "additions must map experts' indices to numb"),  # type: ignore[arg-type]
    (lambda: oversampled_indices([]), ShapeError, "of one input at least"),
    (lambda: oversampled_indices([[0, 1]]), ShapeError, r"shape \(1, 2\)"),
    (lambda: oversampled_indices([0.5]), ShapeError, "whole numbers or text"),
    (lambda: oversampled_indices([[0], [0, 1]]), ShapeError, "one per input"),
    (lambda: oversampled_indices([0], seed=-1), SpecError, "seed must be a non-negative integer"),
]


@pytest.mark.parametrize(("edit", "error", "message"), BAD)
def test_what_cannot_be_is_refused(
    edit: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        edit()

"""Experts merged into their mean, and put in another order: against weights built explicitly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import CP, BaseDelta, Gate, LayerSpec, SharedBasis
from tensormoe.editing import merge_experts, permute_experts, replace_expert
from tensormoe.errors import BackendError, MissingDependencyError, ShapeError, SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.testing import specs
from tensormoe_numpy import MuMoE, MuMoEMLP
from tests._kinds import KINDS

Arrays = dict[str, np.ndarray]
FITTED = ("low_rank", "shared_basis", "base_delta")


def values_of(config: LayerConfig | BlockConfig, seed: int = 0, dtype: str = "float64") -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    drawn = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return {name: abs(a) + 0.5 if "variance" in name else a for name, a in drawn.items()}


def experts_of(config: LayerConfig, arrays: Arrays, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases with the experts of a level first."""
    weight, bias = MuMoE.restore(config, arrays).materialize()
    empty = np.zeros((*weight.shape[:-2], 0))
    return np.moveaxis(weight, level, 0), np.moveaxis(empty if bias is None else bias, level, 0)


@given(data=st.data())
def test_merged_experts_are_the_mean_and_no_other_changes(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    level = data.draw(st.integers(0, spec.levels - 1), "level")
    count = spec.experts[level]
    if count < 2:
        return
    members = data.draw(
        st.lists(st.integers(0, count - 1), min_size=2, unique=True).map(tuple), "members"
    )
    weights = data.draw(st.none() | st.just([1.0 + 2 * n for n in range(len(members))]), "weights")
    config = LayerConfig(spec, None)
    arrays = values_of(config, data.draw(st.integers(0, 9), "seed"))
    kept = {name: array.copy() for name, array in arrays.items()}
    found, error = merge_experts(config, arrays, members, weights, level)
    assert all(np.array_equal(arrays[name], kept[name]) for name in kept)
    shares = np.ones(len(members)) if weights is None else np.array(weights)
    difference, length = 0.0, 0.0
    for before, after in zip(
        experts_of(config, arrays, level), experts_of(config, found, level), strict=True
    ):
        mean = np.average(before[list(members)], axis=0, weights=shares)
        for expert in range(count):
            if expert not in members:
                np.testing.assert_allclose(after[expert], before[expert], rtol=0, atol=1e-12)
            elif spec.factorization.name not in FITTED:
                scale = 1e-12 * (1 + abs(before).max(initial=0))
                np.testing.assert_allclose(after[expert], mean, rtol=0, atol=scale)
            assert expert not in members or np.array_equal(after[expert], after[members[0]])
        difference += ((after[members[0]] - mean) ** 2).sum()
        length += (mean**2).sum()
    if spec.factorization.name in FITTED:
        assert error == pytest.approx((difference / length) ** 0.5, rel=1e-6, abs=1e-9)
    else:
        assert error == 0.0


@pytest.mark.parametrize("kind", [SharedBasis((2, 3)), BaseDelta(2)], ids=lambda kind: kind.name)
def test_a_fitted_mean_is_no_worse_than_replacing_by_the_mean(kind: Any) -> None:
    config = LayerConfig(LayerSpec(6, 5, 4, kind), None)
    arrays = values_of(config)
    weight, bias = experts_of(config, arrays, 0)
    mean = [np.average(each[[0, 3]], axis=0, weights=[1, 3]) for each in (weight, bias)]
    _, error = merge_experts(config, arrays, [0, 3], [1, 3])
    _, wanted = replace_expert(config, arrays, 3, *mean)
    assert 0.0 < error == pytest.approx(wanted, rel=1e-9)


@given(data=st.data())
def test_permuted_layers_are_the_same_functions(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    gate = data.draw(
        st.sampled_from(
            [
                Gate(),
                Gate(normalization="batch", bias=True),
                Gate("relu_top_k", k=1, bias=True),
                Gate("top_k", k=1, balance=0.1),
            ]
        ),
        "gate",
    )
    level = data.draw(st.integers(0, spec.levels - 1), "level")
    order = data.draw(st.permutations(range(spec.experts[level])), "order")
    config = LayerConfig(spec, gate)
    arrays = values_of(config, data.draw(st.integers(0, 9), "seed"))
    layer = MuMoE.restore(config, arrays)
    layer.training = False
    found = permute_experts(config, arrays, order, level)
    turned = MuMoE.restore(config, found)
    turned.training = False
    for before, after in zip(
        experts_of(config, arrays, level), experts_of(config, found, level), strict=True
    ):
        np.testing.assert_allclose(
            after, before[order], rtol=0, atol=1e-12 * (1 + abs(after).max(initial=0))
        )
    x = np.random.default_rng(1).standard_normal((7, spec.in_features))
    for e, (old, new) in enumerate(zip(layer.coefficients(x), turned.coefficients(x), strict=True)):
        np.testing.assert_allclose(new, old[:, order] if e == level else old, rtol=0, atol=1e-12)
    wanted = layer(x)
    np.testing.assert_allclose(turned(x), wanted, rtol=0, atol=1e-11 * (1 + abs(wanted).max()))
    back = permute_experts(config, found, np.argsort(order), level)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    alone = permute_experts(config, arrays, order, level, gate=False)
    for name in arrays:
        same = arrays[name] if name.startswith("gate.") else found[name]
        assert np.array_equal(alone[name], same), name


def test_blocks_are_permuted_in_both_layers_and_stay_the_same() -> None:
    gate = Gate(normalization="batch", bias=True)
    block = MuMoEMLP(4, 6, 3, experts=(4, 3), rank=2, gate=gate, dtype="float64")
    arrays = values_of(block.config)
    block = MuMoEMLP.restore(block.config, arrays)
    block.training = False
    x = np.random.default_rng(1).standard_normal((5, 4))
    for level, order in ((0, [3, 1, 0, 2]), (1, [1, 2, 0])):
        found = permute_experts(block.config, arrays, order, level)
        changed = {name for name in arrays if not np.array_equal(found[name], arrays[name])}
        assert changed == {name for name in arrays if name.endswith(f"_{level}")}
        assert {name.partition(".")[0] for name in changed} == {"first", "second", "gate"}
        turned = MuMoEMLP.restore(block.config, found)
        turned.training = False
        np.testing.assert_allclose(turned(x), block(x), rtol=0, atol=1e-12)
        merged, error = merge_experts(block.config, arrays, [0, 2], level=level)
        assert error == 0.0
        both = {name for name in arrays if not np.array_equal(merged[name], arrays[name])}
        assert both == {f"{each}.factors.expert_{level}" for each in ("first", "second")}


def test_means_of_half_precision_are_taken_in_float32() -> None:
    config = LayerConfig(LayerSpec(4, 3, 3, CP(2)), None)
    arrays = {name: jnp.asarray(a, jnp.bfloat16) for name, a in values_of(config).items()}
    found, _ = merge_experts(config, arrays, [0, 1], [1, 2])
    old = arrays["factors.expert_0"].astype(jnp.float32)
    mean = (old[0] * (1 / 3) + old[1] * (2 / 3)).astype(jnp.bfloat16)
    assert found["factors.expert_0"].dtype == jnp.bfloat16
    assert (found["factors.expert_0"][1] == mean).all()


def test_merges_and_permutations_are_traced_and_differentiated() -> None:
    config = LayerConfig(LayerSpec(4, 3, 3, CP(2)), Gate())
    arrays = {name: jnp.asarray(a) for name, a in values_of(config, dtype="float32").items()}

    @jax.jit
    def first(given: Any) -> Any:
        merged, _ = merge_experts(config, given, [0, 2], [3, 1])
        return permute_experts(config, merged, [1, 2, 0])["factors.expert_0"][1:2].sum()

    gradient = jax.grad(first)(arrays)["factors.expert_0"]
    assert gradient.tolist() == [[0.75] * 2, [0.0] * 2, [0.25] * 2]
    fitted = LayerConfig(LayerSpec(4, 3, 3, BaseDelta(2)), None)
    with pytest.raises(BackendError, match="traced"):
        jax.jit(lambda each: merge_experts(fitted, each, [0, 1])[0])(
            {name: jnp.asarray(a) for name, a in values_of(fitted, dtype="float32").items()}
        )


def test_factors_that_are_not_finite_are_refused_where_they_are_fitted() -> None:
    config = LayerConfig(LayerSpec(4, 3, 3, BaseDelta(2)), None)
    arrays = values_of(config)
    arrays["factors.output"][0, 0] = np.inf
    with pytest.raises(ShapeError, match="must be finite"):
        merge_experts(config, arrays, [0, 1])


def test_only_fitted_means_need_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tensormoe.editing._merge.missing", lambda *_: MissingDependencyError("no numpy")
    )
    for kind in KINDS:
        config = LayerConfig(LayerSpec(4, 3, 3, kind), None)
        if kind.name in FITTED:
            with pytest.raises(MissingDependencyError):
                merge_experts(config, values_of(config), [0, 1])
        else:
            assert merge_experts(config, values_of(config), [0, 1])[1] == 0.0


CONFIG = LayerConfig(LayerSpec(6, 5, (4, 3), CP(2)), Gate(normalization="batch"))
ARRAYS = values_of(CONFIG)
PARAMETERS = {name: ARRAYS[name] for name in CONFIG.parameter_shapes()}
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: merge_experts(CONFIG, ARRAYS, [1]),
        SpecError,
        "two experts at least, each once; got 1",
    ),
    (lambda: merge_experts(CONFIG, ARRAYS, []), SpecError, "got 0"),
    (lambda: merge_experts(CONFIG, ARRAYS, [1, 2, 1]), SpecError, "got expert 1 twice"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 4]), ShapeError, r"in \[0, 4\) at level 0; got 4"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], level=2), ShapeError, r"level must lie in"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], [1.0]), SpecError, "one per expert, 2; got 1"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], [1, -1]), SpecError, "negative; got -1 for exp"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], [1, np.nan]), SpecError, "got nan for expert 1"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], [0, 0.0]), SpecError, "not zero; got 0.0"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], [1e308, 1e308]), SpecError, "finite.*got inf"),
    (lambda: merge_experts(CONFIG, ARRAYS, [0, 1], 3), SpecError, "sequence of numbers; got 3"),  # type: ignore[arg-type]
    (lambda: merge_experts(CONFIG, {}, [0, 1]), ShapeError, "arrays must hold 'factors.expert_0'"),
    (lambda: permute_experts(CONFIG, ARRAYS, [0, 1, 2]), SpecError, "each of the 4 experts at lev"),
    (lambda: permute_experts(CONFIG, ARRAYS, [0, 1, 2, 2]), SpecError, r"got \[0, 1, 2, 2\]"),
    (lambda: permute_experts(CONFIG, ARRAYS, [0, 1, 2, 4]), ShapeError, r"in \[0, 4\)"),
    (lambda: permute_experts(CONFIG, ARRAYS, [0, 1, 2, 3], gate=1), SpecError, "gate must be True"),  # type: ignore[arg-type]
    (
        lambda: permute_experts(LayerConfig(CONFIG.spec, None), ARRAYS, [3, 1, 2, 0]),
        SpecError,
        "has no gate that could be permuted.*gate=False, and permute the coefficients",
    ),
    (
        lambda: permute_experts(CONFIG, PARAMETERS, [3, 1, 2, 0]),
        ShapeError,
        r"hold 'gate.running_mean_0' of shape \(4,\).*all parameters and buffers of the layer, or",
    ),
    (
        lambda: permute_experts(CONFIG, {**ARRAYS, "gate.projection_1": np.ones(3)}, [2, 1, 0], 1),
        ShapeError,
        r"gate.projection_1 must have shape \(6, 3\); got \(3,\)",
    ),
    (
        lambda: permute_experts(
            CONFIG, {**ARRAYS, "gate.projection_1": jnp.ones((6, 3))}, [2, 1, 0], 1
        ),
        BackendError,
        "gate.projection_1 must be an array of numpy",
    ),
]


@pytest.mark.parametrize(("edit", "error", "message"), BAD)
def test_what_cannot_be_is_refused(
    edit: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        edit()

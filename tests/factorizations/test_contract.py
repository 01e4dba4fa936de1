"""The factorizations keep the contract, and their own formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.testing import (
    FactorizationContract,
    factors,
    reconstruct,
    reconstruct_by_einsum,
    specs,
)


class TestCP(FactorizationContract):
    factorization = CP(1)


class TestTensorRing(FactorizationContract):
    factorization = TensorRing(1)


class TestTensorTrain(FactorizationContract):
    factorization = TensorTrain(1)


class TestTucker(FactorizationContract):
    factorization = Tucker(1)


class TestSharedBasis(FactorizationContract):
    factorization = SharedBasis(1)


class TestBaseDelta(FactorizationContract):
    factorization = BaseDelta(1)


class TestSharedDelta(FactorizationContract):
    factorization = SharedDelta(1)


class TestHadamard(FactorizationContract):
    factorization = Hadamard()


class TestDense(FactorizationContract):
    factorization = Dense()


@given(data=st.data())
def test_two_oracles_agree(data: st.DataObject) -> None:
    spec = data.draw(specs(), "spec")
    stored = data.draw(factors(spec))
    by_tensorly = reconstruct(spec.factorization, stored)
    by_einsum = reconstruct_by_einsum(spec.factorization, stored)
    assert by_einsum.shape == (*spec.experts, spec.in_features + spec.bias, spec.out_features)
    np.testing.assert_allclose(by_tensorly, by_einsum, rtol=0, atol=1e-10 * np.abs(by_einsum).max())


SIZES = {"in_features": 7, "out_features": 5}
N, I, O = 11, 7, 5  # noqa: E741


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("factorization", "experts", "parameters"),
    [
        # one level: section 1.8's table, I + 1 rows where there is a bias
        (CP(3), (N,), lambda rows: 3 * (N + rows + O)),
        (TensorRing((2, 3, 4)), (N,), lambda rows: 2 * N * 3 + 3 * rows * 4 + 4 * O * 2),
        (TensorTrain((3, 4)), (N,), lambda rows: N * 3 + 3 * rows * 4 + 4 * O),
        (Tucker((2, 3, 4)), (N,), lambda rows: 2 * 3 * 4 + N * 2 + rows * 3 + O * 4),
        (SharedBasis((2, 3)), (N,), lambda rows: N * 2 + 3 * (2 * rows + N * O)),
        (BaseDelta(3), (N,), lambda rows: rows * O + 3 * N * (rows + O)),
        (SharedDelta(3), (N,), lambda rows: rows * O + 3 * (rows + N * O)),
        (Hadamard(), (N,), lambda rows: O * (N + rows)),
        (Dense(), (N,), lambda rows: N * rows * O),
        # several levels
        (CP(3), (4, 2, 3), lambda rows: 3 * (4 + 2 + 3 + rows + O)),
        (
            TensorRing((2, 3, 4, 6)),
            (4, 2),
            lambda rows: 2 * 4 * 3 + 3 * 2 * 4 + 4 * rows * 6 + 6 * O * 2,
        ),
        (TensorTrain((2, 3, 4)), (4, 2), lambda rows: 4 * 2 + 2 * 2 * 3 + 3 * rows * 4 + 4 * O),
        (SharedBasis((2, 3)), (4, 2), lambda rows: 8 * 2 + 3 * (2 * rows + 8 * O)),
        (BaseDelta(3), (4, 2), lambda rows: rows * O + 3 * 8 * (rows + O)),
        (Hadamard(), (4, 2, 3), lambda rows: O * (4 + 2 + 3 + rows)),
        (Dense(), (4, 2, 3), lambda rows: 4 * 2 * 3 * rows * O),
    ],
    ids=lambda value: "formula" if callable(value) else str(value),
)
def test_parameters_are_the_closed_form(factorization, experts, parameters, bias) -> None:
    spec = LayerSpec(**SIZES, experts=experts, factorization=factorization, bias=bias)
    assert spec.num_parameters == parameters(I + bias)


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    rank=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
)
def test_capacity_of_one_level_is_the_closed_form(
    size: tuple[int, int, int], rank: tuple[int, int, int]
) -> None:
    n, i, o = size
    r1, r2, r3 = rank

    def capacity(factorization: object) -> tuple[int, int]:
        spec = LayerSpec(i, o, n, factorization)
        return spec.expert_rank, spec.expert_span

    assert capacity(CP(r1)) == (min(r1, i, o), min(n, r1, i * o))
    ring = capacity(TensorRing((r1, r2, r3)))
    # papers: rank r₃·min(r₁, r₂), span r₁r₂; the modes and other cuts bound both
    assert ring[0] == min(r3 * min(r1, r2), i, o)
    assert ring[1] == min(n, r1 * r2, i * o, r2 * r3 * o, i * r1 * r3)
    assert capacity(TensorTrain((r1, r2))) == (min(r2, i, o), min(n, r1, i * min(r2, o)))
    assert capacity(Hadamard()) == (min(i, o), min(n, o))
    assert capacity(Dense()) == (min(i, o), min(n, i * o))
    narrow = min(i, o)
    assert capacity(SharedBasis((r1, r2))) == (min(r2, narrow), min(n, i * o, r1 * r2 * narrow))
    assert capacity(BaseDelta(r1)) == (narrow, min(n, i * o))
    assert capacity(SharedDelta(r1)) == (narrow, min(n, i * o, 1 + r1 * narrow))
    assert capacity(Tucker((r1, r2, r3)))[0] == min(r2, r3, i, o)


class TestPaperScheme:
    """Oldfield et al. 2024, appendix F.2, distribution by distribution."""

    def moments(self, factorization: object, experts: tuple[int, ...]) -> dict[str, np.ndarray]:
        from tensormoe.factorizations import draw_factor
        from tensormoe_numpy import BACKEND

        spec = LayerSpec(16, 9, experts, factorization)
        rng = np.random.default_rng(0)
        return {
            name: np.stack(
                [
                    draw_factor(
                        start,
                        spec.shapes[name],
                        BACKEND,
                        rng.standard_normal,
                        lambda shape: rng.uniform(-1, 1, shape),
                    )
                    for _ in range(4000)
                ]
            )
            for name, start in spec.initializers("paper").items()
        }

    def assert_uniform(self, draws: np.ndarray, bound: float) -> None:
        assert np.abs(draws).max() <= bound
        assert np.abs(draws).max() >= 0.999 * bound
        assert abs(draws.std() - bound / np.sqrt(3)) < 0.01 * bound
        assert abs(draws.mean()) < 0.01 * bound

    def test_cp(self) -> None:
        drawn = self.moments(CP(5), (3, 2))
        first = drawn["expert_0"]
        np.testing.assert_allclose(first.mean(0), 1.0, atol=0.1)
        np.testing.assert_allclose(first.std(0), 1.0, atol=0.1)
        assert np.all(drawn["expert_1"] == 1.0)
        for name in ("input", "bias"):
            self.assert_uniform(drawn[name], 1 / np.sqrt(16))
        self.assert_uniform(drawn["output"], 1 / np.sqrt(5))

    def test_tensor_ring(self) -> None:
        drawn = self.moments(TensorRing((2, 3, 4, 5)), (3, 2))
        eye = np.eye(2, 3, dtype=bool)
        first = drawn["expert_0"]
        assert np.all(first[..., ~eye] == 0.0)
        np.testing.assert_allclose(first[..., eye].mean(0), 1.0, atol=0.1)
        np.testing.assert_allclose(first[..., eye].std(0), 1.0, atol=0.1)
        assert np.all(drawn["expert_1"] == np.eye(3, 4))
        self.assert_uniform(drawn["input"], 1 / np.sqrt(16))
        # its two bond ranks: r₄ and r₁
        self.assert_uniform(drawn["output"], 1 / np.sqrt(5 * 2))


def test_experts_of_the_paper_scheme_differ_only_by_noise() -> None:
    """Further levels are identities: experts of one first-level group are the same matrix."""
    from tensormoe_numpy import MuMoE

    layer = MuMoE(6, 5, (3, 4), TensorRing(3), init="paper", dtype="float64", seed=0)
    weights, _ = layer.materialize()
    assert np.all(weights == weights[:, :1])
    assert not np.allclose(weights[0], weights[1])


@pytest.mark.parametrize(
    "kind",
    [
        CP(3),
        TensorRing((2, 3, 4)),
        Tucker(2),
        SharedBasis((2, 3)),
        BaseDelta(2),
        SharedDelta(2),
        Hadamard(),
        Dense(),
    ],
)
def test_specs_round_trip_through_plain_values(kind: object) -> None:
    spec = LayerSpec(4, 3, 5, kind, bias=False)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert hash(LayerSpec.from_dict(spec.to_dict())) == hash(spec)


def test_a_weighted_cp_decomposition_keeps_its_weights() -> None:
    """TensorLy normalizes factors and puts their lengths into the weights."""
    from tensormoe import from_tensorly

    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 2)) for n in (3, 5, 4)]
    weights = np.array([2.0, -3.0])
    found = from_tensorly(CP(2), (weights, parts), bias=False)
    want = np.einsum("r,nr,ir,or->nio", weights, *parts)
    np.testing.assert_allclose(reconstruct(CP(2), found), want)
    free = rng.standard_normal((4, 4))
    with pytest.raises(ValueError, match="identity"):
        from_tensorly(Hadamard(), (None, [rng.standard_normal((3, 4)), free, free]), bias=False)

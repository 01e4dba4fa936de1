"""Products of matrices as they are stored: right for any turn, and without copies of weights."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensormoe.backend import StoredProducts
from tensormoe.functional import Options
from tensormoe_jax import BACKEND, apply, initialize

SHAPES = [(1, 5, 7), (4, 5, 1), (1, 5, 1), (3, 5, 7), (3, 1, 7), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [*itertools.product((False, True), repeat=2)])
def test_products_of_any_turn(shape: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    left = rng.standard_normal((rows, inner)).astype("float32")
    right = rng.standard_normal((inner, columns)).astype("float32")
    stored = [
        jnp.asarray(each.T if turn else each)
        for each, turn in zip((left, right), turned, strict=True)
    ]
    found = BACKEND.matmul_stored(stored[0], stored[1], turned)
    np.testing.assert_allclose(found, left @ right, rtol=1e-5, atol=1e-6)


def test_products_of_many_matrices() -> None:
    rng = np.random.default_rng(0)
    many = rng.standard_normal((6, 3, 5)).astype("float32")
    one = rng.standard_normal((7, 5)).astype("float32")
    found = BACKEND.matmul_stored(jnp.asarray(many), jnp.asarray(one), (False, True))
    np.testing.assert_allclose(found, many @ one.T, rtol=1e-5, atol=1e-6)


def test_the_adapter_has_them() -> None:
    assert isinstance(BACKEND, StoredProducts)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA on the CPU")
def test_one_row_copies_no_weights() -> None:
    # output (o, r) of a wide rank is used transposed
    config = Options(4, "cp", rank=4096, bias=False, gate=None).layer(64, 256)
    parameters = initialize(config, jax.random.key(0))
    x, coefficients = jnp.ones((1, 64)), jnp.full((1, 4), 0.25)
    compiled = (
        jax.jit(lambda p, x, a: apply(config, p, x, a)).lower(parameters, x, coefficients).compile()
    )
    found = compiled.memory_analysis()
    assert found is not None
    assert found.temp_size_in_bytes < parameters["factors.output"].nbytes / 8


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA on the CPU")
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_all_experts_meet_copy_no_weights(rows: int) -> None:
    config = Options(24, "dense", bias=False, gate=None).layer(64, 128)
    parameters = initialize(config, jax.random.key(0))
    x, coefficients = jnp.ones((rows, 64)), jnp.full((rows, 24), 1 / 24)
    run = jax.jit(lambda p, x, a: apply(config, p, x, a))
    found = run.lower(parameters, x, coefficients).compile().memory_analysis()
    assert found is not None
    assert found.temp_size_in_bytes < parameters["factors.weight"].nbytes / 4
    want = jnp.einsum("bi,nio->bo", x, parameters["factors.weight"]) / 24
    np.testing.assert_allclose(run(parameters, x, coefficients), want, rtol=1e-5, atol=1e-6)

"""Sources of random numbers and of statistics that the JAX layers cannot use, or miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensormoe_jax
from tensormoe import Gate
from tensormoe.errors import GateError, SpecError
from tensormoe_jax import equinox as in_equinox
from tensormoe_jax import nnx as in_nnx
from tests._jax_helpers import build

X = np.ones((2, 5), "float32")


@pytest.mark.parametrize(
    "rngs", [None, "a", 1.5, True, jnp.ones(3), np.random.default_rng(0)], ids=str
)
def test_sources_that_are_no_rngs(rngs: Any) -> None:
    with pytest.raises(SpecError, match=r"rngs must be an nnx.Rngs, a seed, or a key .*; got "):
        build("nnx", rngs=rngs)
    with pytest.raises(SpecError, match=r"Pass nnx.Rngs\(0\), for instance"):
        build("nnx", "MuMoEMLP", rngs=rngs)


def test_sources_that_are_rngs() -> None:
    for rngs in (3, np.int64(3), jax.random.key(3), nnx.Rngs(3), nnx.Rngs(params=3)):
        want = build("nnx", rngs=nnx.Rngs(3)).parameters
        if not isinstance(rngs, nnx.Rngs) or "default" in [*rngs]:
            np.testing.assert_array_equal(
                build("nnx", rngs=rngs).factors["input"][...], want["factors.input"]
            )
        assert build("nnx", rngs=rngs).parameters.keys() == want.keys()
    with pytest.raises(
        SpecError, match=r"a stream named 'params', or a default one; got \['dropout'\]"
    ):
        build("nnx", rngs=nnx.Rngs(dropout=0))


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (0, "0"),
        (None, "None"),
        ("a", "'a'"),
        (jnp.ones(2), r"an array of float32 and shape \(2,\)"),
        (nnx.Rngs(0), "a Rngs"),
    ],
    ids=str,
)
def test_keys_that_are_none(key: Any, found: str) -> None:
    for name in ("MuMoE", "MuMoEMLP"):
        with pytest.raises(SpecError, match=f"one key of jax.random; got {found}. Pass jax.random"):
            build("equinox", name, key=key)


def test_several_keys_and_raw_ones() -> None:
    with pytest.raises(SpecError, match=r"one key of jax.random; got .* shape \(3,\)"):
        build("equinox", key=jax.random.split(jax.random.key(0), 3))
    raw, new = (build("equinox", key=key) for key in (jax.random.PRNGKey(1), jax.random.key(1)))
    assert eqx.tree_equal(raw, new)


def test_sources_that_are_missing() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'rngs'"):
        in_nnx.MuMoE(5, 4, 3, rank=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'key'"):
        in_equinox.MuMoE(5, 4, 3, rank=2)  # type: ignore[call-arg]


def test_dropping_without_keys(tmp_path: Path) -> None:
    block = build("equinox", "MuMoEMLP", drop=0.5)
    with pytest.raises(RuntimeError, match="requires a key"):
        block(jnp.asarray(X))
    with pytest.raises(SpecError, match=r"key must be one key of jax.random; got 3"):
        block(jnp.asarray(X), key=3)
    with pytest.raises(SpecError, match="a block that drops entries needs a key; got None"):
        tensormoe_jax.train(block.config, block.parameters, jnp.asarray(X))
    block.save(tmp_path / "block")
    with pytest.raises(ValueError, match="no `rngs` argument was provided"):
        in_nnx.MuMoEMLP.load(tmp_path / "block")(jnp.asarray(X))


def test_batch_norm_without_a_state(tmp_path: Path) -> None:
    layer, state = eqx.nn.make_with_state(build)("equinox", gate=Gate(normalization="batch"))
    with pytest.raises(GateError, match=r"an equinox.nn.State; got none. Make .*make_with_state"):
        layer(jnp.asarray(X))
    with pytest.raises(GateError, match=r"an equinox.nn.State; got none. Pass state=…"):
        layer.save(tmp_path / "layer")
    assert not (tmp_path / "layer").exists()
    layer(jnp.asarray(X), state=state)


class PlainInNnx(in_nnx.MuMoE):
    """A class of a user's, with the library's constructor."""


class PlainInEquinox(in_equinox.MuMoE):
    """A class of a user's, with the library's constructor."""


class SquareInNnx(in_nnx.MuMoE):
    def __init__(self, size: int, *, rngs: int) -> None:
        super().__init__(size, size, 3, rank=2, rngs=rngs)


class SquareInEquinox(in_equinox.MuMoE):
    def __init__(self, size: int, *, key: jax.Array) -> None:
        super().__init__(size, size, 3, rank=2, key=key)


@pytest.mark.parametrize("plain", [PlainInNnx, PlainInEquinox])
def test_derived_classes_are_restored_as_themselves(plain: Any) -> None:
    source = {"rngs": 0} if plain is PlainInNnx else {"key": jax.random.key(0)}
    layer = plain(5, 4, 3, rank=2, **source)
    again = plain.restore(layer.config, layer.parameters)
    assert type(again) is plain
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    assert repr(again) == repr(layer)
    assert all(again.parameters[name] is array for name, array in layer.parameters.items())


@pytest.mark.parametrize("square", [SquareInNnx, SquareInEquinox])
def test_constructors_that_restore_would_leave_out(square: Any) -> None:
    layer = build("nnx" if square is SquareInNnx else "equinox")
    with pytest.raises(TypeError, match="must have the constructor of MuMoE; got Square"):
        square.restore(layer.config, layer.parameters)

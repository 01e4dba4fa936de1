"""What no sparse mixture can be built, called or opened with: rule, value, remedy, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import (
    BackendError,
    CheckpointError,
    GateError,
    RankError,
    ShapeError,
    SpecError,
    TensormoeError,
)
from tensormoe.mixtures import SparseConfig, experts_config, sparse_config
from tensormoe.routing import Router
from tests.mixtures._forms import drawn, tokens, torch_layer

SMALL: dict[str, Any] = {"experts": 4, "top_k": 2}
MAKERS: dict[str, Callable[..., Any]] = {
    "NumPy": lambda *sizes, **options: tensormoe_numpy.SparseMoE(*sizes, **options, seed=0),
    "PyTorch": tensormoe_torch.SparseMoE,
    "Flax NNX": lambda *sizes, **options: tensormoe_jax.nnx.SparseMoE(*sizes, **options, rngs=0),
    "Equinox": lambda *sizes, **options: tensormoe_jax.equinox.SparseMoE(
        *sizes, **options, key=jax.random.key(0)
    ),
}
LINEAR = {"kind": "linear"}

Case = tuple[tuple[Any, ...], dict[str, Any], type[TensormoeError], str]
OPTIONS: dict[str, Case] = {
    "k above N": ((6, 7), {"top_k": 5}, SpecError, "top_k must be at most the 4 experts; got 5. L"),
    "k = 0": ((6, 7), {"top_k": 0}, SpecError, "top_k must be a positive integer; got 0"),
    "k of another type": ((6, 7), {"top_k": 2.0}, SpecError, "top_k must be .* got 2.0"),
    "no experts": ((6, 7), {"experts": 0}, SpecError, "experts must be a positive integer; got 0"),
    "levels": ((6, 7), {"experts": (2, 2)}, SpecError, r"experts must be .* got \(2, 2\)"),
    "kind": ((6, 7), {"kind": "glu"}, SpecError, "kind must be .*'linear'; got 'glu'"),
    "a hidden layer of linear experts": (
        (6, 7),
        LINEAR,
        SpecError,
        "hidden_features must be None for linear experts; got 7. Leave it out, or use kind='mlp'",
    ),
    "a shared expert beside linear ones": (
        (6,),
        LINEAR | {"shared_features": 3},
        SpecError,
        "shared_features must be None for linear experts; got 3. Add a linear layer beside",
    ),
    "no hidden layer": ((6,), {}, SpecError, "hidden_features must be given for swiglu experts"),
    "activation": ((6, 7), {"act_layer": "swish"}, SpecError, "act_layer must be .* got 'swish'"),
    "activation of linear experts": (
        (6,),
        LINEAR | {"act_layer": "silu"},
        SpecError,
        "act_layer must be None for linear experts; got 'silu'",
    ),
    "sizes": ((0, 7), {}, SpecError, "in_features must be a positive integer; got 0"),
    "outputs": ((6, 7, -1), {}, SpecError, "out_features must be a positive integer; got -1"),
    "weights of no shared expert": (
        (6, 7),
        {"mix_shared": True},
        SpecError,
        "mix_shared must be False without a shared expert; got True. Give it a size",
    ),
    "width of the shared expert": (
        (6, 7),
        {"shared_features": 0},
        SpecError,
        "shared_features must be a positive integer; got 0",
    ),
    "factorization": ((6, 7), {"factorization": "cpd"}, SpecError, "must be one of .* got 'cpd'"),
    "three layers": (
        (6, 7),
        {"factorization": (CP(1), CP(1), CP(1))},
        SpecError,
        "factorization must be one, or one per layer; got 3",
    ),
    "rank": ((6, 7), {"factorization": "cp", "rank": 0}, RankError, "rank .* got 0"),
    "rank of dense experts": (
        (6, 7),
        {"rank": 3},
        RankError,
        r"rank must be None for dense, which has none; got \(3,\)",
    ),
    "a second rank": (
        (6, 7),
        {"factorization": CP(3), "rank": 4},
        RankError,
        r"rank must be given once; got rank=4 beside CP\(rank=3\). Drop one",
    ),
    "a pair for one layer": (
        (6,),
        LINEAR | {"factorization": ("cp", "dense")},
        SpecError,
        r"factorization must be one for linear experts; got \('cp', 'dense'\)",
    ),
    "router": ((6, 7), {"router": 3}, GateError, "router must be a Router or .* got 3. Write"),
    "scores": ((6, 7), {"router": "top_k"}, GateError, "scores must be .* got 'top_k'"),
    "init": ((6, 7), {"init": "kaiming"}, SpecError, "init must be .* got 'kaiming'"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("library", MAKERS)
def test_constructors(library: str, name: str) -> None:
    sizes, options, error, message = OPTIONS[name]
    with pytest.raises(error, match=message):
        MAKERS[library](*sizes, **SMALL | options)


def test_of_a_pair_one_layer_may_take_the_rank() -> None:
    for pair in (("dense", "cp"), ("cp", "dense")):
        experts = experts_config(6, 7, 5, 4, factorization=pair, rank=3)
        assert experts.up is not None
        kinds = (experts.up.factorization, experts.down.factorization)
        assert kinds == tuple(Dense() if kind == "dense" else CP(3) for kind in pair)


def test_configurations_whose_parts_do_not_fit() -> None:
    experts = experts_config(6, 7, 5, 4)
    for shared, found in (
        (experts_config(6, 7, 4, 1), "1 of 6 → 4"),
        (experts_config(5, 7, 5, 1), "1 of 5 → 5"),
        (experts_config(6, 7, 5, 2), "2 of 6 → 5"),
    ):
        with pytest.raises(SpecError, match=f"shared must be one expert 6 → 5, .* got {found}"):
            SparseConfig(experts, 2, Router(), shared)
    values = sparse_config(6, 7, 5, **SMALL, shared_features=3).to_dict()
    wrong = values["shared"] | {"down": values["shared"]["down"] | {"out_features": 4}}
    with pytest.raises(SpecError, match=r"shared must be one expert 6 → 5, .* got 1 of 6 → 4"):
        SparseConfig.from_dict(values | {"shared": wrong})
    for broken in ({"top_k": 9}, {"top_k": None}, {"experts": None}, {"router": None}):
        with pytest.raises(TensormoeError):
            SparseConfig.from_dict(values | broken)


CONFIG = sparse_config(6, 7, 5, **SMALL)
BALANCED = sparse_config(6, 7, 5, **SMALL, router=Router("sigmoid", balance=0.1))


def test_inputs() -> None:
    arrays = drawn(CONFIG)
    ours, theirs = tensormoe_numpy.SparseMoE.restore(CONFIG, arrays), torch_layer(CONFIG, arrays)
    for x, error, message in (
        (np.ones((2, 5)), ShapeError, r"6.*got .*\(2, 5\)"),
        (np.ones((2, 6), "float32"), ShapeError, "dtype float64; got float32"),
        (np.ones(()), ShapeError, r"got .*\(\)"),
        ([[1.0] * 6], BackendError, r"got builtins\.list"),
    ):
        with pytest.raises(error, match=message):
            ours(x)
        given = torch.tensor(x) if isinstance(x, np.ndarray) else x
        for call in (theirs, theirs.route, theirs.router):
            with pytest.raises((BackendError, ShapeError)):
                call(given)
    with pytest.raises(BackendError):
        theirs(np.ones((2, 6)))


def test_nan_tokens() -> None:
    arrays, x = drawn(CONFIG), tokens(CONFIG, (5,))
    x[3, 2] = np.nan
    with pytest.raises(GateError, match="logits must not be NaN; got some"):
        tensormoe_numpy.SparseMoE.restore(CONFIG, arrays)(x)
    clean = [0, 1, 2, 4]
    found = torch_layer(CONFIG, arrays)(torch.tensor(x)).detach()
    assert torch.isnan(found[3]).all()
    wanted = tensormoe_numpy.SparseMoE.restore(CONFIG, arrays)(x[clean])
    np.testing.assert_allclose(found[clean], wanted, rtol=1e-10)
    given = {name: jnp.asarray(each, "float32") for name, each in arrays.items()}
    made = jax.jit(lambda x: tensormoe_jax.nnx.SparseMoE.restore(CONFIG, given)(x))(
        jnp.asarray(x, "float32")
    )
    assert np.isnan(made[3]).all()
    np.testing.assert_allclose(made[np.array(clean)], wanted, rtol=2e-4, atol=1e-5)


def test_tokens_that_may_go_nowhere() -> None:
    """A bias of -inf masks an expert; a token whose experts are all masked is NaN, or an error."""
    config = sparse_config(6, 7, 5, **SMALL, router=Router(bias=True))
    arrays, x = drawn(config), tokens(config, (5,))
    masked = arrays | {"router.bias": np.array([-np.inf, 0.0, 0.0, -np.inf])}
    layer = tensormoe_numpy.SparseMoE.restore(config, masked)
    assert {*layer.route(x).top_k_index.ravel().tolist()} == {1, 2}
    assert np.isfinite(layer(x)).all()
    nowhere = arrays | {"router.bias": np.full(4, -np.inf)}
    with pytest.raises(GateError, match=r"at least one expert; got none in row 0, .* -inf\. Leave"):
        tensormoe_numpy.SparseMoE.restore(config, nowhere)(x)
    found = torch_layer(config, nowhere)(torch.tensor(x))
    assert torch.isnan(found).all()


def test_calls_of_the_experts() -> None:
    layer, x = torch_layer(CONFIG, drawn(CONFIG)), torch.tensor(tokens(CONFIG, (5,)))
    index, weights = torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    for pair in ((index[:4], weights[:4]), (index, weights[:, :1])):
        with pytest.raises(ShapeError, match=r"top_k_index and top_k_weights must both have shape"):
            layer.experts(x, *pair)
    with pytest.raises(IndexError, match=r"expert must be in \[0, 4\); got 4"):
        layer.experts[4]


def test_states_keys_and_streams() -> None:
    x = jnp.ones((2, 6))
    tree = tensormoe_jax.equinox.SparseMoE.restore(
        BALANCED, {name: jnp.asarray(each, "float32") for name, each in drawn(BALANCED).items()}
    )
    with pytest.raises(GateError, match=r"equinox\.nn\.State; got none\. Make the layer by"):
        tree(x)
    noisy = sparse_config(6, 7, 5, **SMALL, router=Router(noise=1.0))
    given = {name: jnp.asarray(each, "float32") for name, each in drawn(noisy).items()}
    with pytest.raises(SpecError, match="a router with noise needs a key in training"):
        tensormoe_jax.equinox.SparseMoE.restore(noisy, given)(x)
    with pytest.raises(GateError, match=r"needs random numbers in training; got none\. Pass rngs="):
        tensormoe_jax.nnx.SparseMoE.restore(noisy, given)(x)


def test_files(tmp_path: Path) -> None:
    layer = tensormoe_numpy.SparseMoE(6, 7, 5, **SMALL, seed=0)
    values, arrays = layer.config.to_dict(), layer.arrays
    for broken in (
        {**values, "top_k": 5},
        {key: each for key, each in values.items() if key != "router"},
        {**values, "router": {**values["router"], "scores": "argmax"}},
    ):
        save_checkpoint(tmp_path / "file", "SparseMoE", broken, arrays)
        for package in (tensormoe_numpy, tensormoe_torch, tensormoe_jax.nnx):
            with pytest.raises(CheckpointError, match="the file does not describe a SparseMoE: "):
                package.SparseMoE.load(tmp_path / "file")
    missing = {name: each for name, each in arrays.items() if name != "router.projection"}
    save_checkpoint(tmp_path / "file", "SparseMoE", values, missing)
    with pytest.raises(CheckpointError, match=r"router\.projection"):
        tensormoe_torch.SparseMoE.load(tmp_path / "file")
    tensormoe_numpy.MuMoE(6, 5, 4, Dense(), seed=0).save(tmp_path / "file")
    with pytest.raises(CheckpointError, match="must hold a SparseMoE; got a MuMoE"):
        tensormoe_torch.SparseMoE.load(tmp_path / "file")
    with pytest.raises(SpecError, match="config must be that of a SparseMoE; got that of a MuMoE"):
        tensormoe_torch.SparseMoE.restore(tensormoe_numpy.MuMoE(6, 5, 4, Dense()).config, {})

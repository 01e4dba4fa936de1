"""Bad input at the doors of the JAX layers: one clear error each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensormoe_jax
import tensormoe_numpy
from tensormoe import CP, Gate, LayerSpec, TopK
from tensormoe.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    GateError,
    MissingDependencyError,
    PlanError,
    RankError,
    ShapeError,
    SpecError,
)
from tensormoe.functional import LayerConfig
from tensormoe_jax import equinox as in_equinox
from tensormoe_jax import nnx as in_nnx
from tests._jax_helpers import build

X = np.ones((2, 5), "float32")
MADE = np.full((2, 3), 0.25, "float32")


def traced(call: Callable[[Any], Any], value: Any) -> None:
    """``call`` with a value that is known when the compiled function runs."""
    jax.jit(call)(value)


Case = tuple[Callable[[str], Any], type[Exception], str]

CALLS: dict[str, Case] = {
    "an input of NumPy": (lambda f: build(f)(X), BackendError, "array of jax.*got numpy.ndarray"),
    "an input of PyTorch": (
        lambda f: build(f)(torch.ones(2, 5)),
        BackendError,
        "x must be an array of jax.*got torch.Tensor. Convert it yourself",
    ),
    "an input of NumPy while traced": (
        lambda f: traced(lambda x: build(f)(X) + x, 1.0),
        BackendError,
        "got numpy.ndarray",
    ),
    "a list": (lambda f: build(f)([[1.0] * 5]), BackendError, "got builtins.list"),
    "a wrong size": (
        lambda f: build(f)(jnp.ones((2, 6))),
        ShapeError,
        r"x must end in an axis of 5 features; got shape \(2, 6\)",
    ),
    "a number": (lambda f: build(f)(jnp.float32(1)), ShapeError, r"got shape \(\)"),
    "another dtype": (
        lambda f: build(f)(jnp.ones((2, 5), "bfloat16")),
        ShapeError,
        "must have the layer's dtype float32; got bfloat16. Cast the input",
    ),
    "integers": (lambda f: build(f)(jnp.ones((2, 5), "int32")), ShapeError, "got int32"),
    "coefficients of NumPy": (
        lambda f: build(f)(jnp.asarray(X), MADE),
        BackendError,
        "coefficients of level 0 must be an array of jax.*got numpy.ndarray",
    ),
    "indices of NumPy": (
        lambda f: build(f)(jnp.asarray(X), TopK(np.array([[0], [1]]), jnp.ones((2, 1)))),
        BackendError,
        "coefficients of level 0 must be an array of jax",
    ),
    "coefficients of another shape": (
        lambda f: build(f)(jnp.asarray(X), jnp.ones((2, 4))),
        ShapeError,
        r"coefficients of level 0 must have shape \(2, 3\); got \(2, 4\)",
    ),
    "coefficients of no layer": (
        lambda f: build(f)(jnp.asarray(X), [jnp.asarray(MADE)] * 2),
        ShapeError,
        "one array a level, 1; got 2",
    ),
    "an expert that is not there": (
        lambda f: build(f)(jnp.asarray(X), TopK(jnp.array([[3], [0]]), jnp.ones((2, 1)))),
        ShapeError,
        r"indices of coefficients must lie in \[0, 3\); got 3",
    ),
    "no coefficients": (
        lambda f: build(f, gate=None)(jnp.asarray(X)),
        ShapeError,
        "this layer has no gate; got no coefficients",
    ),
    "no coefficients to make": (
        lambda f: build(f, gate=None).coefficients(jnp.asarray(X)),
        ShapeError,
        "this layer has no gate; got no coefficients",
    ),
    "a block without a gate": (
        lambda f: build(f, "MuMoEMLP", gate=None)(jnp.asarray(X)),
        ShapeError,
        "this block has no gate",
    ),
    "expert 3 of 3": (lambda f: build(f).expert(3), ShapeError, r"in \[0, 3\) at level 0; got 3"),
    "a traced expert": (
        lambda f: traced(lambda k: build(f).expert(k)[0], 1),
        ShapeError,
        r"expert index must lie in \[0, 3\) at level 0; got .*Tracer",
    ),
    "a traced batch": (
        lambda f: traced(lambda k: build(f).plan(k).batch, 1),
        PlanError,
        "batch must be a non-negative integer; got .*Tracer",
    ),
    "the cost of a traced batch": (
        lambda f: traced(lambda k: build(f).cost(k).flops, 1),
        PlanError,
        "batch must be a non-negative integer; got .*Tracer",
    ),
    "an id out of range": (
        lambda f: build(f, "MuMoEEmbedding", 9, 4)(jnp.array([9, 0]), jnp.asarray(MADE)),
        ShapeError,
        r"ids must lie in \[0, 9\); got 9",
    ),
    "a negative id": (
        lambda f: build(f, "MuMoEEmbedding", 9, 4)(jnp.array([0, -1]), jnp.asarray(MADE)),
        ShapeError,
        r"ids must lie in \[0, 9\); got -1",
    ),
    "ids of NumPy": (
        lambda f: build(f, "MuMoEEmbedding", 9, 4)(np.array([0, 1]), jnp.asarray(MADE)),
        BackendError,
        "ids must be an array of jax",
    ),
    "ids that are no integers": (
        lambda f: build(f, "MuMoEEmbedding", 9, 4)(jnp.ones(2), jnp.asarray(MADE)),
        ShapeError,
        "ids must be integers; got float32",
    ),
}

OPTIONS: dict[str, Case] = {
    "a traced size": (
        lambda f: traced(lambda k: build(f, "MuMoE", k, 4)(jnp.asarray(X)), 5),
        SpecError,
        "in_features must be a positive integer; got .*Tracer",
    ),
    "traced experts": (
        lambda f: traced(lambda k: build(f, experts=k).dtype, 5),
        SpecError,
        "experts must be positive integers; got .*Tracer.* for level 0. Give one size per level",
    ),
    "traced experts of a level": (
        lambda f: traced(lambda k: build(f, experts=(3, k)).dtype, 5),
        SpecError,
        "experts must be positive integers; got .*Tracer.* for level 1",
    ),
    "traced experts and no rank": (
        lambda f: traced(lambda k: build(f, experts=k, rank=None).dtype, 5),
        SpecError,
        "experts must be positive integers; got .*Tracer",
    ),
    "a traced rank": (
        lambda f: traced(lambda k: build(f, rank=k).dtype, 5),
        RankError,
        "rank must be positive integers; got .*Tracer.* for bond 0",
    ),
    "a traced budget": (
        lambda f: traced(lambda k: build(f, rank=None, budget=k).dtype, 5),
        BudgetError,
        "got .*Tracer",
    ),
    "a traced share to drop": (
        lambda f: traced(lambda k: build(f, "MuMoEMLP", drop=k).dtype, 0.5),
        SpecError,
        r"drop must be in \[0, 1\); got .*Tracer",
    ),
    "a traced option of a gate": (
        lambda f: traced(lambda k: build(f, gate=Gate(alpha=k)).dtype, 1.5),
        GateError,
        "alpha must be a number; got .*Tracer",
    ),
    "an array for a dtype": (
        lambda f: build(f, dtype=jnp.ones(2)),
        SpecError,
        "dtype must be one of float16, bfloat16, float32, float64; got Array",
    ),
    "integers": (lambda f: build(f, dtype=int), SpecError, "dtype must be one of float16"),
    "float64 while that is off": (
        lambda f: build(f, dtype="float64"),
        SpecError,
        "dtype float64 needs JAX's 64-bit mode, which is off. Switch it on with jax.config.update",
    ),
    "an unknown scheme": (lambda f: build(f, init="zeros"), SpecError, "init must be one of"),
    "an unknown activation": (
        lambda f: build(f, "MuMoEMLP", act_layer="mish"),
        SpecError,
        "act_layer must be one of 'gelu', .*; got 'mish'",
    ),
    "a class for an activation": (
        lambda f: build(f, "MuMoEMLP", act_layer=int),
        SpecError,
        "act_layer must be one of .*; got <class 'int'>. Or give a function",
    ),
    "gated by a number": (
        lambda f: build(f, "MuMoEMLP", gated=1),
        SpecError,
        "gated must be True or False; got 1",
    ),
}


@pytest.mark.parametrize("form", ["nnx", "equinox"])
@pytest.mark.parametrize("case", [*CALLS.values(), *OPTIONS.values()], ids=[*CALLS, *OPTIONS])
def test_bad_input(case: Case, form: str) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call(form)


class TestIndicesThatNobodyLooksAt:
    """Under transformations, an index out of range gives NaN; constants are looked at there too."""

    @pytest.mark.parametrize("kind", ["int32", "int8"])
    def test_ids(self, kind: str) -> None:
        table = build("equinox", "MuMoEEmbedding", 9, 4)
        run = jax.jit(lambda ids: table(ids, jnp.full((4, 3), 0.25)))
        found = np.isnan(run(jnp.array([0, 9, -1, 8], kind))).all(axis=-1)
        assert found.tolist() == [False, True, True, False]
        assert not np.isnan(run(jnp.array([0, 1, 2, 8], kind))).any()

    def test_experts(self) -> None:
        layer = build("nnx", gate=None)
        run = jax.jit(lambda k: layer(jnp.asarray(X), TopK(k, jnp.ones((2, 1)))))
        assert np.isnan(run(jnp.array([[3], [0]]))).all(axis=-1).tolist() == [True, False]

    def test_constants(self) -> None:
        table, ids = build("equinox", "MuMoEEmbedding", 9, 4), jnp.array([0, -1])
        for transform in (jax.jit, jax.grad):
            with pytest.raises(ShapeError, match=r"ids must lie in \[0, 9\); got -1"):
                transform(lambda made: table(ids, made).sum())(jnp.asarray(MADE))


class TestFunctionalForm:
    config = LayerConfig(LayerSpec(5, 4, 3, CP(2)), Gate())

    def parameters(self) -> dict[str, Any]:
        return tensormoe_jax.initialize(self.config, jax.random.key(0))

    def test_parameters_that_are_missing(self) -> None:
        with pytest.raises(ShapeError, match=r"must hold 'gate.projection_0' of shape \(5, 3\)"):
            tensormoe_jax.apply(self.config, {}, jnp.asarray(X))

    def test_parameters_of_numpy(self) -> None:
        mixed = self.parameters()
        mixed["factors.input"] = np.asarray(mixed["factors.input"])
        with pytest.raises(BackendError, match=r"factors.input must be an array of jax"):
            tensormoe_jax.apply(self.config, mixed, jnp.asarray(X))

    def test_a_module(self) -> None:
        with pytest.raises(BackendError, match="by canonical name, a dictionary; got a MuMoE"):
            tensormoe_jax.apply(self.config, build("equinox"), jnp.asarray(X))

    def test_stacked_parameters(self) -> None:
        stacked = jax.tree.map(lambda each: jnp.stack([each] * 2), self.parameters())
        with pytest.raises(ShapeError, match=r"shape \(5, 3\); got \(2, 5, 3\). Stacked layers"):
            tensormoe_jax.apply(self.config, stacked, jnp.asarray(X))

    def test_wide_parameters(self) -> None:
        with pytest.raises(SpecError, match="needs JAX's 64-bit mode"):
            tensormoe_jax.initialize(self.config, jax.random.key(0), dtype="float64")


@pytest.mark.parametrize("form", [in_nnx, in_equinox], ids=["nnx", "equinox"])
class TestArraysThatDoNotFit:
    def test_a_wide_checkpoint(self, form: Any, tmp_path: Path) -> None:
        path = tmp_path / "layer"
        tensormoe_numpy.MuMoE(5, 4, 3, rank=2, dtype="float64").save(path)
        with pytest.raises(CheckpointError, match="float64 needs JAX's 64-bit mode, which is off"):
            form.MuMoE.load(path)
        with jax.enable_x64(True):
            assert form.MuMoE.load(path).dtype == np.dtype("float64")

    def test_another_block(self, form: Any, tmp_path: Path) -> None:
        tensormoe_numpy.MuMoE(5, 4, 3, rank=2).save(tmp_path / "layer")
        with pytest.raises(
            CheckpointError, match=r"must hold a MuMoEMLP; got a MuMoE. Open it with"
        ):
            form.MuMoEMLP.load(tmp_path / "layer")

    def test_restored(self, form: Any) -> None:
        config = TestFunctionalForm.config
        arrays = tensormoe_jax.initialize(config, jax.random.key(0))
        with pytest.raises(BackendError, match=r"factors.expert_0 must be an array of jax"):
            form.MuMoE.restore(config, {name: np.asarray(each) for name, each in arrays.items()})
        with pytest.raises(CheckpointError, match=r"'factors.input' \(5, 2\) is missing"):
            form.MuMoE.restore(config, {"factors.bias": arrays["factors.bias"]})
        mixed = arrays | {"factors.input": arrays["factors.input"].astype("bfloat16")}
        with pytest.raises(ShapeError, match=r"one dtype of .*; got bfloat16 for 'factors.input'"):
            form.MuMoE.restore(config, mixed)


@pytest.mark.parametrize(("module", "library"), [("nnx", "flax"), ("equinox", "equinox")])
def test_a_missing_library(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"tensormoe_jax.{module}"
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        MissingDependencyError,
        match=rf"{name} needs {library}.*pip install 'tensormoe\[{library}\]'",
    ):
        importlib.import_module(name)

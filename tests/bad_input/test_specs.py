"""Sizes, options, dtypes and ranks that no layer has: error class, rule, value, remedy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tensormoe import CP, LayerSpec, TensorRing, TensorTrain, Tucker
from tensormoe.errors import PlanError, RankError, ShapeError, SpecError
from tensormoe_numpy import MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._bad_input import Case, X, assert_refused, layer, spec

# drawing from one would end the process
MATRIX = np.ones((1, 2), int).view(np.matrix)

CASES: dict[str, Case] = {
    # sizes
    "no inputs": (
        lambda: MuMoE(0, 4, 3, CP(2)),
        SpecError,
        "in_features must be a positive integer; got 0",
    ),
    "negative inputs": (
        lambda: LayerSpec(-8, 4, 3, CP(2)),
        SpecError,
        "in_features must be a positive integer; got -8",
    ),
    "half an output": (
        lambda: LayerSpec(8, 4.5, 3, CP(2)),
        SpecError,
        r"out_features must be a positive integer; got 4\.5",
    ),
    "a boolean size": (
        lambda: LayerSpec(True, 4, 3, CP(2)),
        SpecError,
        "in_features must be a positive integer; got True",
    ),
    "no experts": (lambda: LayerSpec(8, 4, (), CP(2)), SpecError, r"experts must hold.*got \(\)"),
    "a negative level": (
        lambda: LayerSpec(8, 4, (3, -2), CP(2)),
        SpecError,
        "experts must be positive integers; got -2 for level 1. Give one size per level",
    ),
    "experts in letters": (
        lambda: LayerSpec(8, 4, "3", CP(2)),
        SpecError,
        "experts must be positive integers; got '3' for level 0",
    ),
    "no hidden features": (
        lambda: MuMoEMLP(8, 0, experts=3, rank=2),
        SpecError,
        "features must be a positive integer; got 0",
    ),
    "no vocabulary": (
        lambda: MuMoEEmbedding(0, 4, 3, rank=2),
        SpecError,
        "must be a positive integer; got 0",
    ),
    # names and options
    "unknown factorization": (
        lambda: MuMoE(8, 4, 3, "cpd", rank=2),
        SpecError,
        "factorization must be one of 'cp', 'tensor_ring', .*'dense'; got 'cpd'",
    ),
    "a class of something else": (
        lambda: MuMoE(8, 4, 3, dict, rank=2),
        SpecError,
        "must be a subclass of tensormoe.Factorization; got <class 'dict'>",
    ),
    "unknown initialization": (
        lambda: layer(init="xavier"),
        SpecError,
        "init must be one of 'variance', 'paper'; got 'xavier'",
    ),
    "bias in words": (
        lambda: layer(bias="yes"),
        SpecError,
        "bias must be True or False; got 'yes'",
    ),
    "unknown activation": (
        lambda: MuMoEMLP(8, experts=3, rank=2, act_layer="mish"),
        SpecError,
        "act_layer must be one of 'gelu', .*; got 'mish'",
    ),
    "a function without its derivative": (
        lambda: MuMoEMLP(8, experts=3, rank=2, act_layer=abs),  # type: ignore[arg-type]
        SpecError,
        "act_layer must be one of 'gelu', .* its derivative is needed. PyTorch's and JAX's blocks",
    ),
    "gated by a number": (
        lambda: MuMoEMLP(8, experts=3, rank=2, gated=1),  # type: ignore[arg-type]
        SpecError,
        "gated must be True or False; got 1",
    ),
    "everything dropped": (
        lambda: MuMoEMLP(8, experts=3, rank=2, drop=1.0),
        SpecError,
        r"drop must be in \[0, 1\); got 1\.0. Give the share",
    ),
    "three layers in a block": (
        lambda: MuMoEMLP(8, experts=3, factorization=(CP(1), CP(2), CP(3))),
        SpecError,
        "factorization must be one, or one per layer; got 3",
    ),
    "a spec with a field too few": (
        lambda: LayerSpec.from_dict({"in_features": 8}),
        SpecError,
        r"must have exactly \[.*'rank'\]; got \['in_features'\]",
    ),
    "a seed in letters": (
        lambda: MuMoE(8, 4, 3, CP(2), seed="a"),
        SpecError,
        "seed must be a non-negative integer or a NumPy generator; got 'a'",
    ),
    # dtypes
    "integers to train": (
        lambda: layer(dtype="int32"),
        SpecError,
        "dtype must be one of float16, float32, float64; got 'int32'",
    ),
    "no such dtype": (
        lambda: layer(dtype="float31"),
        SpecError,
        "dtype must be one of float16, float32, float64; got 'float31'",
    ),
    "another dtype": (
        lambda: layer()(X.astype("float64")),
        ShapeError,
        "x must have the layer's dtype float32; got float64. Cast the input",
    ),
    "integers as input": (
        lambda: layer()(X.astype(int)),
        ShapeError,
        "x must have the layer's dtype float32; got int64. Cast",
    ),
    "no dtype": (
        lambda: MuMoE(8, 4, 3, CP(2), dtype=None),
        SpecError,
        "dtype must be one of float16, float32, float64; got None",
    ),
    # ranks
    "rank zero": (
        lambda: CP(0),
        RankError,
        "rank must be positive integers; got 0 for bond 0. Give one size per bond",
    ),
    "negative rank": (lambda: layer(rank=-3), RankError, "got -3 for bond 0"),
    "fractional rank": (lambda: CP(2.5), RankError, r"got 2\.5 for bond 0"),
    "a rank in letters": (lambda: Tucker("8"), RankError, "got '8' for bond 0"),
    "two ranks for CP": (
        lambda: CP((2, 3)),
        RankError,
        r"rank must be one positive integer; got \(2, 3\)",
    ),
    "a zero bond": (
        lambda: TensorRing((2, 3, 0)),
        RankError,
        "rank must be positive integers; got 0 for bond 2",
    ),
    "bonds of another depth": (
        lambda: LayerSpec(8, 4, (3, 2), TensorRing((2, 3, 4))),
        RankError,
        r"rank must have 4 bonds, one a mode of 2 expert level.*got 3: \(2, 3, 4\). Give one",
    ),
    "bonds of another train": (
        lambda: LayerSpec(8, 4, 3, TensorTrain((2, 3, 4))),
        RankError,
        "rank must have 2 bonds, one after each.*got 3",
    ),
    "a rank where none belongs": (
        lambda: MuMoE(8, 4, 3, "hadamard", rank=3),
        RankError,
        r"rank must be None for hadamard.*got \(3,\)",
    ),
    "two ranks": (
        lambda: MuMoE(8, 4, 3, CP(2), rank=3),
        RankError,
        r"rank must be given once; got rank=3 beside CP\(rank=2\). Drop one",
    ),
    "levels without end": (
        lambda: LayerSpec(8, 4, itertools.count(2), CP(2)),  # type: ignore[arg-type]
        SpecError,
        "experts must be at most 64 integers; got more. Give one size per level",
    ),
    "levels without order": (
        lambda: LayerSpec(8, 4, {3, 2}, CP(2)),  # type: ignore[arg-type]
        SpecError,
        r"experts must be positive integers; got \{2, 3\} for level 0",
    ),
    "plans of no integer": (
        lambda: [spec().plan(1), spec().plan(True)],
        PlanError,
        "batch must be a non-negative integer; got True",
    ),
    "plans of a fraction": (
        lambda: [spec().plan(1), spec().plan(1.0)],  # type: ignore[arg-type]
        PlanError,
        "batch must be a non-negative integer; got 1.0",
    ),
    "prepared plans of no truth": (
        lambda: spec().plan(4, prepared=np.ones(2)),  # type: ignore[arg-type]
        PlanError,
        "prepared must be True or False; got array",
    ),
    "costs of neither way": (
        lambda: spec().cost(4, training=np.ones(2)),  # type: ignore[arg-type]
        PlanError,
        "training must be True or False; got array",
    ),
    "costs of a block of neither way": (
        lambda: MuMoEMLP(8, experts=3, rank=2).cost(4, training=np.ones(2)),  # type: ignore[arg-type]
        PlanError,
        "training must be True or False; got array",
    ),
    # seeds
    **{
        f"seed {seed!r}": (
            lambda seed=seed: layer(seed=seed),
            SpecError,
            "seed must be a non-negative integer or a NumPy generator; got",
        )
        for seed in (True, -1, 1.5, "a", (1, 2), np.ones(2), MATRIX)
    },
    # layers of arrays that exist
    "restored from no config": (
        lambda: MuMoE.restore("cp", {}),  # type: ignore[arg-type]
        SpecError,
        "config must be that of a MuMoE; got 'cp'. Pass the config of another layer",
    ),
    "restored from no arrays": (
        lambda: MuMoE.restore(layer().config, None),  # type: ignore[arg-type]
        SpecError,
        "arrays must be a mapping from names to arrays; got None, a NoneType",
    ),
    "a layer restored from a block": (
        lambda: MuMoE.restore(MuMoEMLP(8, experts=3, rank=2).config, {}),  # type: ignore[arg-type]
        SpecError,
        "config must be that of a MuMoE; got that of a MuMoEMLP",
    ),
    "a layer restored from an embedding": (
        lambda: MuMoE.restore(MuMoEEmbedding(8, 4, 3, rank=2).config, {}),
        SpecError,
        "config must be that of a MuMoE; got that of a MuMoEEmbedding",
    ),
    "a size beyond all arrays": (
        lambda: LayerSpec(2**63, 4, 3, CP(2)),
        SpecError,
        "in_features must be below 2\\*\\*63; got 9223372036854775808",
    ),
    "rank and budget": (
        lambda: layer(budget=100),
        RankError,
        "rank and budget exclude one another; got rank=2 and budget=100. Drop one",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    assert_refused(*CASES[name])

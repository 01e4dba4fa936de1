"""Every bad input that the public door knows: the class of its error, its rule, value, remedy."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

import tensormoe
from tensormoe import (
    CP,
    Budget,
    Gate,
    LayerSpec,
    TensorRing,
    TensorTrain,
    TopK,
    Tucker,
    backend_of,
    entmax,
    get_backend,
    rank_front,
    select_rank,
    to_tensorly,
)
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
    TensormoeError,
)
from tensormoe.gates import Statistics, activate
from tensormoe_numpy import Adam, MuMoE, MuMoEEmbedding, MuMoEMLP

X = np.ones((3, 8), "float32")
IDS = np.array([0, 4, 8])


def layer(**options: Any) -> MuMoE:
    return MuMoE(8, 4, 3, **({"factorization": "cp", "rank": 2} | options))


def tree(**options: Any) -> MuMoE:
    return MuMoE(8, 4, (3, 2), **({"factorization": "cp", "rank": 2} | options))


def table() -> MuMoEEmbedding:
    return MuMoEEmbedding(9, 4, 3, rank=2)


def spec() -> LayerSpec:
    return LayerSpec(8, 4, 3, CP(2))


def shares(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


def with_nan(row: int) -> np.ndarray:
    x = X.copy()
    x[row, 2] = np.nan
    return x


def pull_back(cotangent: Any) -> Any:
    return layer().vjp(X)[1](cotangent)


def loading(folder: Path, change: Callable[[bytes], bytes]) -> Any:
    """A layer's checkpoint, changed."""
    path = folder / "layer.safetensors"
    layer().save(path)
    path.write_bytes(change(path.read_bytes()))
    return MuMoE.load(path)


def with_config(content: bytes, **changes: Any) -> bytes:
    """A checkpoint whose description says something else."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    config["spec"] |= changes
    header["__metadata__"]["config"] = json.dumps(config)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def as_block(folder: Path) -> Any:
    path = folder / "layer.safetensors"
    layer().save(path)
    return MuMoEMLP.load(path)


def with_endless_header(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    return (2**40).to_bytes(8, "little") + content[8 : 8 + length]


def without(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """An environment in which some libraries are not installed."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        real = importlib.util.find_spec

        def find(name: str, package: str | None = None) -> Any:
            return None if name in names else real(name, package)

        patch.setattr("tensormoe._registry.find_spec", find)
        get_backend.cache_clear()

    return prepare


# name -> (what is called, error, what its message says in this order)
CASES: dict[str, tuple[Callable[..., Any], type[TensormoeError], str]] = {
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
        "experts must be positive integers; got -2 for level 1. Give one size a level",
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
    "a class in place of a value": (
        lambda: MuMoE(8, 4, 3, CP, rank=2),
        SpecError,
        "factorization must be one of .*; got <class",
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
    "everything dropped": (
        lambda: MuMoEMLP(8, experts=3, rank=2, drop=1.0),
        SpecError,
        r"drop must be in \[0, 1\); got 1\.0. Give the share",
    ),
    "three layers in a block": (
        lambda: MuMoEMLP(8, experts=3, factorization=(CP(1), CP(2), CP(3))),
        SpecError,
        "factorization must be one, or one a layer; got 3",
    ),
    "a spec with a field too few": (
        lambda: LayerSpec.from_dict({"in_features": 8}),
        SpecError,
        r"must have exactly \[.*'rank'\]; got \['in_features'\]",
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
    # ranks
    "rank zero": (
        lambda: CP(0),
        RankError,
        "rank must be positive integers; got 0 for bond 0. Give one size a bond",
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
    "rank and budget": (
        lambda: layer(budget=100),
        RankError,
        "rank and budget exclude one another; got rank=2 and budget=100. Drop one",
    ),
    # budgets
    "no budget": (lambda: layer(rank=None, budget=0), BudgetError, "positive integer; got 0"),
    "negative budget": (lambda: Budget(parameters=-5), BudgetError, "positive integer; got -5"),
    "an empty budget": (
        lambda: Budget(),
        BudgetError,
        r"at least one of parameters, flops, memory and time; got none. Write Budget\(",
    ),
    "a budget in words": (
        lambda: layer(rank=None, budget="cheap"),
        BudgetError,
        "budget must be one of 'linear'; got 'cheap'",
    ),
    "a fraction of a parameter": (
        lambda: layer(rank=None, budget=1.5),
        BudgetError,
        r"budget must be a Budget.*; got 1\.5. Write Budget\(",
    ),
    "no time": (
        lambda: Budget(time=float("nan")),
        BudgetError,
        "time of a budget must be a positive number of seconds; got nan",
    ),
    "an unknown device": (
        lambda: Budget(time=1.0, roofline="abacus"),
        BudgetError,
        "roofline must be one of .*'h100'.*; got 'abacus'",
    ),
    "an impossible number of parameters": (
        lambda: select_rank("cp", 8, 4, 3, budget=15),
        BudgetError,
        "parameters must be at least 16 for cp.*; got 15. Raise the budget",
    ),
    "an impossible number of FLOPs": (
        lambda: select_rank("tensor_ring", 8, 4, 3, budget=Budget(flops=3, batch=1)),
        BudgetError,
        r"flops must be at least \d+ for tensor_ring.*; got 3. Raise",
    ),
    "an impossible memory": (
        lambda: select_rank("cp", 8, 4, 3, budget=Budget(memory=3)),
        BudgetError,
        r"memory must be at least \d+ for cp.*; got 3. Raise",
    ),
    "an impossible time": (
        lambda: select_rank("cp", 8, 4, 3, budget=Budget(time=1e-12)),
        BudgetError,
        r"time must be at least \S+ for cp.*; got 1e-12. Raise",
    ),
    "a budget below a factorization without rank": (
        lambda: MuMoE(8, 4, 3, "hadamard", budget=3),
        BudgetError,
        "parameters must be at least 48 for hadamard.*; got 3. Raise",
    ),
    "a front of an unknown factorization": (
        lambda: rank_front("cpd", 8, 4, 3, budget=100),
        SpecError,
        "factorization must be one of .*; got 'cpd'",
    ),
    # shapes of inputs
    "another number of features": (
        lambda: layer()(np.ones((3, 7), "float32")),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(3, 7\). Check the layer's in_features",
    ),
    "no features at all": (
        lambda: layer()(np.float32(1)),
        ShapeError,
        r"x must end in an axis of 8 features; got shape \(\)",
    ),
    "a list": (
        lambda: layer()([[1.0] * 8]),
        BackendError,
        "x must be an array of numpy.*; got builtins.list. Convert it yourself",
    ),
    "another library": (
        lambda: layer()(strict.ones((3, 8), dtype=strict.float32)),
        BackendError,
        "x must be an array of numpy.*; got array_api_strict.Array. Convert it yourself",
    ),
    "an input of the block": (
        lambda: MuMoEMLP(8, experts=3, rank=2)(np.ones((3, 7), "float32")),
        ShapeError,
        r"axis of 8 features; got shape \(3, 7\)",
    ),
    "a cotangent of another shape": (
        lambda: pull_back(shares(3, 5)),
        ShapeError,
        r"cotangent must have the output's shape \(3, 4\); got \(3, 5\)",
    ),
    "a cotangent of another dtype": (
        lambda: pull_back(np.ones((3, 4))),
        ShapeError,
        "cotangent must have the output's dtype float32; got float64. Cast it",
    ),
    "a cotangent of no array": (
        lambda: pull_back([1.0]),
        BackendError,
        "cotangent must be an array of numpy.*; got builtins.list",
    ),
    # coefficients
    "coefficients of other experts": (
        lambda: layer()(X, shares(3, 4)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(3, 4\). Their leading axes",
    ),
    "coefficients of other inputs": (
        lambda: layer()(X, shares(2, 3)),
        ShapeError,
        r"coefficients of level 0 must have shape \(3, 3\); got \(2, 3\)",
    ),
    "coefficients of other levels": (
        lambda: tree()(X, shares(3, 3)),
        ShapeError,
        "coefficients must have one array a level, 2; got 1",
    ),
    "coefficients of no array": (
        lambda: tree()(X, [shares(3, 3), [[1.0, 2.0]]]),
        BackendError,
        "coefficients of level 1 must be an array of numpy.*; got builtins.list",
    ),
    "a number for coefficients": (
        lambda: layer()(X, 3),
        BackendError,
        "coefficients of level 0 must be an array of numpy.*; got builtins.int",
    ),
    "no coefficients for a table": (
        lambda: table()(IDS, None),
        BackendError,
        "coefficients of level 0 must be an array of numpy.*; got builtins.NoneType",
    ),
    "dense and indexed coefficients": (
        lambda: tree()(X, [TopK(np.zeros((3, 1), int), shares(3, 1)), shares(3, 2)]),
        ShapeError,
        "all levels must be dense, or all indexed with one k; got a mixture",
    ),
    "an expert that is not there": (
        lambda: layer()(X, TopK(np.full((3, 1), 3), shares(3, 1))),
        ShapeError,
        r"must lie in \[0, 3\); got 3",
    ),
    "an expert before the first": (
        lambda: layer()(X, TopK(np.full((3, 1), -1), shares(3, 1))),
        ShapeError,
        r"must lie in \[0, 3\); got -1",
    ),
    "half an expert": (
        lambda: layer()(X, TopK(np.zeros((3, 1)), shares(3, 1))),
        ShapeError,
        r"must be integers; got float64. Cast them",
    ),
    "indices without values": (
        lambda: layer()(X, TopK(np.zeros((3, 2), int), shares(3, 1))),
        ShapeError,
        "coefficients of level 0 must have shape",
    ),
    "coefficients from nowhere": (
        lambda: layer(gate=None)(X),
        ShapeError,
        "this layer has no gate; got no coefficients. Call it with coefficients",
    ),
    "indexed coefficients for a prepared layer": (
        lambda: layer().prepare()(X, TopK(np.zeros((3, 1), int), shares(3, 1))),
        ShapeError,
        "prepared layer takes dense coefficients; got indexed ones. Call the layer",
    ),
    # ids
    "ids that are no integers": (
        lambda: table()(np.ones(3), shares(3, 3)),
        ShapeError,
        "ids must be integers; got float64. Cast them",
    ),
    "an id beyond the vocabulary": (
        lambda: table()(np.array([1, 9]), shares(2, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got 9. Check the size they index",
    ),
    "a negative id": (
        lambda: table()(np.array([-1]), shares(1, 3)),
        ShapeError,
        r"ids must lie in \[0, 9\); got -1",
    ),
    # single experts
    "an expert beyond the last": (
        lambda: layer().expert(3),
        ShapeError,
        r"expert index must lie in \[0, 3\) at level 0; got 3",
    ),
    "a negative expert": (
        lambda: tree().expert(0, -1),
        ShapeError,
        r"expert index must lie in \[0, 2\) at level 1; got -1",
    ),
    "an expert of another depth": (
        lambda: layer().expert(0, 0),
        ShapeError,
        r"an expert has one index a level, 1; got \(0, 0\)",
    ),
    "an expert by name": (
        lambda: layer().expert("first"),
        ShapeError,
        "expert index must lie in .* at level 0; got 'first'",
    ),
    # gates
    "unknown gate": (
        lambda: layer(gate="relu"),
        GateError,
        "activation must be one of entmax, .*; got 'relu'. Compute other coefficients yourself",
    ),
    "no gate at all": (
        lambda: layer(gate=3),
        GateError,
        r"gate must be a Gate or the name of an activation; got 3. Write Gate\(",
    ),
    "unknown normalization": (
        lambda: Gate(normalization="group"),
        GateError,
        "normalization must be 'layer', 'batch' or None; got 'group'. Use 'layer'",
    ),
    "α below one": (
        lambda: Gate(alpha=0.5),
        GateError,
        r"alpha must be finite and at least 1; got 0\.5. Use 1 for softmax",
    ),
    "top-k without k": (
        lambda: Gate("top_k"),
        GateError,
        r"got k=None. Write Gate\('top_k', k=2\)",
    ),
    "more kept than there are": (
        lambda: tree(gate=Gate("top_k", k=3)),
        SpecError,
        "k of a top-k gate must be at most.*; got 3 for level 1 of 2. Lower k",
    ),
    "NaN in the input": (
        lambda: layer()(with_nan(1)),
        GateError,
        "logits must not be NaN; got NaN in row 1, expert 0. Look for an overflow",
    ),
    "NaN logits": (
        lambda: entmax(np.array([[0.0, 1.0], [0.5, np.nan]])),
        GateError,
        "logits must not be NaN; got NaN in row 1, expert 1",
    ),
    "integer logits": (
        lambda: entmax(np.array([1, 2])),
        GateError,
        "logits must be real floating point; got dtype int64. Convert them first",
    ),
    "a token without experts": (
        lambda: entmax(np.full((2, 3), -np.inf)),
        GateError,
        "every token must have at least one expert; got none in row 0",
    ),
    "batch norm of one token": (
        lambda: layer(gate=Gate(normalization="batch")).vjp(X[:1]),
        GateError,
        "must train on at least 2 tokens; got 1. Use larger batches",
    ),
    "statistics of other experts": (
        lambda: activate(
            Gate(normalization="batch"), np.ones((4, 3)), statistics=Statistics(X[0], X[0])
        ),
        GateError,
        r"statistics.mean must have one entry an expert, shape \(3,\); got \(8,\)",
    ),
    # plans
    "a negative batch": (
        lambda: spec().plan(-1),
        PlanError,
        "batch must be a positive integer; got -1",
    ),
    "half a batch": (lambda: spec().cost(1.5), PlanError, r"positive integer; got 1\.5"),
    "more kept than planned for": (
        lambda: spec().plan(4, top_k=9),
        PlanError,
        "top_k must be at most the experts of each level; got 9 for level 0 of 3. Lower k",
    ),
    "none kept": (lambda: spec().plan(4, top_k=0), PlanError, "positive integer; got 0"),
    "no memory": (
        lambda: layer()(X, memory_limit=0),
        PlanError,
        "memory_limit must be a positive integer; got 0",
    ),
    "too little memory": (
        lambda: layer()(X, memory_limit=10),
        PlanError,
        r"memory_limit must be at least \d+ bytes for 3 inputs of .*; got 10. Raise the limit",
    ),
    "a seed in letters": (
        lambda: MuMoE(8, 4, 3, CP(2), seed="a"),
        SpecError,
        "seed must be a non-negative integer or a NumPy generator; got 'a'",
    ),
    "no dtype": (
        lambda: MuMoE(8, 4, 3, CP(2), dtype=None),
        SpecError,
        "dtype must be one of float16, float32, float64; got None",
    ),
    "whole coefficients": (
        lambda: layer()(X, np.ones((3, 3), dtype=np.int64)),
        ShapeError,
        "coefficients of level 0 must be real floating point; got int64. Cast them",
    ),
    "entries of no size": (
        lambda: LayerSpec(8, 4, 3, CP(2)).cost(16, itemsize=0),
        PlanError,
        "itemsize must be a positive integer; got 0",
    ),
    # the optimizer
    "a learning rate below zero": (
        lambda: Adam({}, lr=-1.0),
        SpecError,
        r"lr must be a number of at least 0; got -1\.0",
    ),
    "a learning rate in letters": (lambda: Adam({}, lr="1"), SpecError, "lr must be.*; got '1'"),
    "one β": (lambda: Adam({}, betas=0.9), SpecError, r"betas must be two numbers.*; got 0\.9"),
    "β of one": (
        lambda: Adam({}, betas=(0.9, 1.0)),
        SpecError,
        r"betas must be two numbers in \[0, 1\); got \(0\.9, 1\.0\)",
    ),
    "a gradient that is missing": (
        lambda: Adam({"w": np.ones(2)}).step({}),
        ShapeError,
        r"gradient of w must have shape \(2,\); got none",
    ),
    "a gradient of another shape": (
        lambda: Adam({"w": np.ones(2)}).step({"w": np.ones(3)}),
        ShapeError,
        r"gradient of w must have shape \(2,\); got \(3,\)",
    ),
    # libraries
    "unknown backend": (
        lambda: get_backend("mlx"),
        BackendError,
        "backend must be one of .*numpy.*; got 'mlx'. Another library joins through an entry point",
    ),
    "mixed libraries": (
        lambda: backend_of(np.ones(2), strict.ones(2)),
        BackendError,
        r"one library; got numpy\.ndarray at 0, array_api_strict\.Array at 1. Convert them",
    ),
    "no factors": (lambda: to_tensorly(CP(2), {}), BackendError, "one library; got no arrays"),
    # checkpoints, in a folder of their own
    "no file": (
        lambda folder: MuMoE.load(folder / "none"),
        CheckpointError,
        "path must name an existing checkpoint; there is none at '.*none'",
    ),
    "a folder that is missing": (
        lambda folder: layer().save(folder / "none" / "layer"),
        CheckpointError,
        "none",
    ),
    "an empty file": (
        lambda folder: loading(folder, lambda content: b""),
        CheckpointError,
        "damaged or no safetensors file: restore it",
    ),
    "a truncated file": (
        lambda folder: loading(folder, lambda content: content[:-5]),
        CheckpointError,
        "damaged or no safetensors file: restore it",
    ),
    "a truncated header": (
        lambda folder: loading(folder, lambda content: content[:40]),
        CheckpointError,
        "damaged or no safetensors file: restore it",
    ),
    "a header of a terabyte": (
        lambda folder: loading(folder, with_endless_header),
        CheckpointError,
        "header",
    ),
    "a pickle": (
        lambda folder: loading(folder, lambda content: b"\x80\x04\x95\x10" + content),
        CheckpointError,
        "damaged or no safetensors file|header",
    ),
    "another block": (
        as_block,
        CheckpointError,
        r"the file must hold a MuMoEMLP; got a MuMoE. Open it with MuMoE\.load",
    ),
    "a config of other shapes": (
        lambda folder: loading(folder, lambda content: with_config(content, in_features=9)),
        CheckpointError,
        r"factors\.input.*\(8, 2\)",
    ),
    "a hostile config": (
        lambda folder: loading(folder, lambda content: with_config(content, experts=[10**30])),
        CheckpointError,
        "config must hold plain values",
    ),
    "a config of an unknown kind": (
        lambda folder: loading(
            folder, lambda content: with_config(content, factorization="os.system")
        ),
        CheckpointError,
        "describes no MuMoE: factorization must be one of .*; got 'os.system'",
    ),
    "a config with a negative size": (
        lambda folder: loading(folder, lambda content: with_config(content, out_features=-4)),
        CheckpointError,
        "describes no MuMoE: out_features must be a positive integer; got -4",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path) -> None:
    call, error, message = CASES[name]
    takes_folder = call.__code__.co_argcount if hasattr(call, "__code__") else 0
    with pytest.raises(error, match=message) as caught:
        call(tmp_path) if takes_folder else call()
    assert type(caught.value) is error
    # the message stands alone: it is a sentence, and not a traceback of a framework
    assert str(caught.value).rstrip().endswith((".", "'", ")"))


@pytest.mark.parametrize("error", tensormoe.errors.__all__)
def test_errors_are_what_callers_would_catch_anyway(error: str) -> None:
    kind = getattr(tensormoe.errors, error)
    assert issubclass(kind, TensormoeError)
    builtin = {
        "BackendError": TypeError,
        "LayoutError": NotImplementedError,
        "MissingDependencyError": ImportError,
    }
    if kind is not TensormoeError:
        assert issubclass(kind, builtin.get(error, ValueError))


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without("numpy")(monkeypatch)
    try:
        with pytest.raises(MissingDependencyError, match=r"needs numpy.*'tensormoe\[numpy\]'"):
            get_backend("numpy")
    finally:
        get_backend.cache_clear()


@pytest.mark.parametrize("name", ["hypothesis", "tensorly", "pytest"])
def test_missing_extras_of_the_test_suite(name: str) -> None:
    code = f"""
import sys
sys.modules[{name!r}] = None
try:
    import tensormoe.testing
except ImportError as error:
    print(type(error).__name__, error)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{root / 'backends'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("MissingDependencyError")
    assert name in done.stdout
    assert "pip install 'tensormoe[testing]'" in done.stdout

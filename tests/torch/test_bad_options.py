"""What PyTorch layers cannot be built or loaded from: class of the error, rule, value, remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, Gate
from tensormoe.checkpoint import read_checkpoint, save_checkpoint
from tensormoe.errors import (
    BudgetError,
    CheckpointError,
    GateError,
    RankError,
    SpecError,
    TensormoeError,
)
from tensormoe_torch import BACKEND, MuMoE, MuMoEEmbedding, MuMoEMLP


def layer(**options: Any) -> MuMoE:
    return MuMoE(8, 4, 3, **({"factorization": "cp", "rank": 2} | options))


def tree(**options: Any) -> MuMoE:
    return MuMoE(8, 4, (3, 2), **({"factorization": "cp", "rank": 2} | options))


def table(**options: Any) -> MuMoEEmbedding:
    return MuMoEEmbedding(9, 4, 3, **({"rank": 2} | options))


def block(**options: Any) -> MuMoEMLP:
    return MuMoEMLP(8, **({"experts": 3, "rank": 2} | options))


def saved(folder: Path, made: Any, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """A checkpoint of a layer, its arrays changed."""
    path = folder / "layer.safetensors"
    made.save(path)
    if change is not None:
        found = read_checkpoint(path, BACKEND)
        arrays = dict(found.arrays)
        change(arrays)
        save_checkpoint(path, found.block, found.config, arrays)
    return path


# name -> (what is called, error, what its message says in this order)
CASES: dict[str, tuple[Callable[..., Any], type[TensormoeError], str]] = {
    # construction
    "no inputs": (
        lambda: MuMoE(0, 4, 3, CP(2)),
        SpecError,
        "in_features must be a positive integer; got 0",
    ),
    "integers to train": (
        lambda: layer(dtype=torch.int32),
        SpecError,
        r"dtype must be one of torch\.float16, .*torch\.float64; got torch\.int32",
    ),
    "a dtype by name": (lambda: layer(dtype="float32"), SpecError, "dtype must.*; got 'float32'"),
    "a dtype of NumPy's": (lambda: table(dtype=np.float32), SpecError, "dtype must.*; got <class"),
    "a dtype of a block": (
        lambda: block(dtype=torch.complex64),
        SpecError,
        r"dtype must be one of torch\.float16, .*; got torch\.complex64",
    ),
    "no such device": (
        lambda: layer(device="gpu"),
        SpecError,
        r"device must be a torch\.device or its name, such as 'cpu' or .*; got 'gpu'",
    ),
    "a device that is none": (lambda: table(device=3.5), SpecError, r"device must.*; got 3\.5"),
    "no such device for a block": (lambda: block(device="gpu"), SpecError, "device.*got 'gpu'"),
    "unknown activation": (
        lambda: block(act_layer="mish"),
        SpecError,
        "act_layer must be one of 'gelu', .*; got 'mish'",
    ),
    "a class that needs arguments": (
        lambda: block(act_layer=torch.nn.Threshold),
        SpecError,
        "act_layer must be a class that needs no arguments, or an instance; Threshold",
    ),
    "a class of no modules": (
        lambda: block(act_layer=int),
        SpecError,
        "act_layer must be one of 'gelu', .*; got <class 'int'>",
    ),
    "a function of something else": (
        lambda: block(act_layer=lambda: 0),
        SpecError,
        "act_layer must be called with one tensor; .*takes 0 positional",
    ),
    "a function to something else": (
        lambda: block(act_layer=len),
        SpecError,
        "act_layer must give a tensor; .* gave int",
    ),
    "gated by a number": (
        lambda: block(gated=1),
        SpecError,
        "gated must be True or False; got 1",
    ),
    "everything dropped": (
        lambda: block(drop=1.0),
        SpecError,
        r"drop must be in \[0, 1\); got 1\.0. Give the share",
    ),
    "less than nothing dropped": (lambda: block(drop=-0.1), SpecError, r"drop must.*got -0\.1"),
    "NaN dropped": (lambda: block(drop=float("nan")), SpecError, "drop must be in.*got nan"),
    "a top-k gate of too few experts": (
        lambda: tree(gate=Gate("top_k", k=3)),
        SpecError,
        "k of a top-k gate must be at most.*; got 3 for level 1 of 2. Lower k",
    ),
    "rank and budget": (
        lambda: layer(budget=100),
        RankError,
        "rank and budget exclude one another; got rank=2 and budget=100. Drop one",
    ),
    "two ranks": (
        lambda: layer(factorization=CP(2)),
        RankError,
        r"rank must be given once; got rank=2 beside CP\(rank=2\). Drop one",
    ),
    "an impossible budget": (
        lambda: layer(rank=None, budget=3),
        BudgetError,
        "must be at least .* for cp.*; got 3. Raise",
    ),
    "unknown factorization": (
        lambda: layer(factorization="cpd"),
        SpecError,
        "factorization must be one of 'cp', .*; got 'cpd'",
    ),
    "unknown initialization": (
        lambda: layer(init="xavier"),
        SpecError,
        "init must be one of 'variance', 'paper'; got 'xavier'",
    ),
    "unknown initialization of a block": (
        lambda: block(init="xavier"),
        SpecError,
        "init must be one of 'variance', 'paper'; got 'xavier'",
    ),
    "unknown gate": (
        lambda: layer(gate="relu"),
        GateError,
        "activation must be one of entmax, .*; got 'relu'",
    ),
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
    "a layer for a block": (
        lambda folder: MuMoEMLP.load(saved(folder, layer())),
        CheckpointError,
        r"the file must hold a MuMoEMLP; got a MuMoE. Open it with MuMoE\.load",
    ),
    "a block for a layer": (
        lambda folder: MuMoE.load(saved(folder, block())),
        CheckpointError,
        r"the file must hold a MuMoE; got a MuMoEMLP. Open it with MuMoEMLP\.load",
    ),
    "a table for a layer": (
        lambda folder: MuMoE.load(saved(folder, table())),
        CheckpointError,
        r"the file must hold a MuMoE; got a MuMoEEmbedding",
    ),
    "arrays of other sizes": (
        lambda folder: MuMoE.load(
            saved(folder, layer(), lambda arrays: arrays.update(layer(rank=3).state_dict()))
        ),
        CheckpointError,
        r"(?s)factors\.bias.*must have the shape \(2,\); got \(3,\)",
    ),
    "an array that is missing": (
        lambda folder: MuMoEMLP.load(
            saved(folder, block(), lambda arrays: arrays.pop("second.factors.input"))
        ),
        CheckpointError,
        r"second\.factors\.input.* is missing",
    ),
    "no such device to load to": (
        lambda folder: MuMoE.load(saved(folder, layer()), device="gpu"),
        SpecError,
        "device must be a .*; got 'gpu'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_options(name: str, tmp_path: Path) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message) as caught:
        call(tmp_path) if call.__code__.co_argcount else call()
    assert type(caught.value) is error
    # the message stands alone: it is a sentence, and not a traceback of a framework
    assert str(caught.value).rstrip().endswith((".", "'", ")", "is missing"))


def test_a_failed_load_leaves_no_layer_and_a_failed_save_no_file(tmp_path: Path) -> None:
    made = layer()
    with pytest.raises(CheckpointError):
        made.save(tmp_path / "none" / "layer")
    assert list(tmp_path.iterdir()) == []
    path = saved(tmp_path, made)
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        MuMoE.load(path)

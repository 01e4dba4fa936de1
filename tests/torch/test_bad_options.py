"""What PyTorch layers cannot be built or loaded from: class of the error, rule, value, remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensormoe.checkpoint import read_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError, SpecError, TensormoeError
from tensormoe_torch import BACKEND, MuMoE, MuMoEMLP
from tests.torch._helpers import block, layer, table


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
    "a class that needs arguments": (
        lambda: block(act_layer=torch.nn.Threshold),
        SpecError,
        "act_layer must be a class that needs no arguments, or an instance; Threshold",
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
    # checkpoints, in a folder of their own
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

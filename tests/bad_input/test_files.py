"""Checkpoints that hold no layer: error class, rule, value, remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensormoe.errors import CheckpointError
from tensormoe_numpy import MuMoE, MuMoEMLP
from tests.bad_input._cases import Case, assert_refused, layer


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


CASES: dict[str, Case] = {
    "an empty file": (
        lambda folder: loading(folder, lambda content: b""),
        CheckpointError,
        "damaged or not a safetensors file: restore it",
    ),
    "a truncated file": (
        lambda folder: loading(folder, lambda content: content[:-5]),
        CheckpointError,
        "damaged or not a safetensors file: restore it",
    ),
    "a truncated header": (
        lambda folder: loading(folder, lambda content: content[:40]),
        CheckpointError,
        "damaged or not a safetensors file: restore it",
    ),
    "a header of a terabyte": (
        lambda folder: loading(folder, with_endless_header),
        CheckpointError,
        "header",
    ),
    "a pickle": (
        lambda folder: loading(folder, lambda content: b"\x80\x04\x95\x10" + content),
        CheckpointError,
        "damaged or not a safetensors file|header",
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
        "does not describe a MuMoE: factorization must be one of .*; got 'os.system'",
    ),
    "a config with a negative size": (
        lambda folder: loading(folder, lambda content: with_config(content, out_features=-4)),
        CheckpointError,
        "does not describe a MuMoE: out_features must be a positive integer; got -4",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path) -> None:
    call, error, message = CASES[name]
    assert_refused(lambda: call(tmp_path), error, message)

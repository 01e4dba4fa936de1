"""Files of layers whose factors are rounded: every framework opens them, damaged ones nobody."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, LayerSpec, LowRank, TensorRing, Tucker
from tensormoe.checkpoint import _format, peek_checkpoint, read_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError
from tensormoe_numpy import BACKEND
from tensormoe_torch import MuMoE, MuMoEEmbedding, MuMoEMLP
from tests._everywhere import FRAMEWORKS
from tests._frameworks import Framework, everywhere
from tests._rounded import decoded

BITS = pytest.mark.parametrize("bits", [8, 4])


def layer(bits: int, kind: Any = None, **options: Any) -> MuMoE:
    torch.manual_seed(0)
    kind = TensorRing((2, 3, 5)) if kind is None else kind
    return MuMoE(13, 7, 3, kind, **options).quantize(bits)


@BITS
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
def test_every_framework_opens_them(framework: Framework, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    made = layer(bits)
    made.save(path)
    with everywhere():
        opened = framework.load("MuMoE", path)
        found = framework.arrays(opened)
        assert opened.config == made.config
    for name, shape in made.config.parameter_shapes().items():
        if not name.startswith("factors."):
            np.testing.assert_array_equal(found[name], made.state_dict()[name])
            continue
        codes, scales = (made.state_dict()[f"{name}.{part}"] for part in ("codes", "scales"))
        wanted = decoded(codes, scales, shape, bits).astype("float32")
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], wanted)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [CP(3), Tucker((2, 3, 4)), LowRank(2), "dense"])
def test_a_layer_that_was_opened_is_the_layer_of_its_values(
    kind: Any, dtype: torch.dtype, bits: int, tmp_path: Path
) -> None:
    path = tmp_path / "layer.safetensors"
    made = layer(bits, kind, dtype=dtype, gate=None)
    made.save(path)
    opened = MuMoE.load(path)
    assert (opened.bits, opened.dtype) == (None, dtype)
    x, given = torch.randn(4, 13, dtype=dtype), torch.rand(4, 3)
    assert torch.equal(opened(x, given), made(x, given))
    assert all(each.requires_grad for each in opened.parameters())
    # and has the same codes again
    for name, each in opened.quantize(bits).state_dict().items():
        assert torch.equal(each, made.state_dict()[name])


@BITS
def test_headers_say_how_many_bits_and_bytes_are_fewer(bits: int, tmp_path: Path) -> None:
    made = MuMoE(64, 64, 8, LowRank(16), gate=None, bias=False)
    made.save(tmp_path / "plain.safetensors")
    made.quantize(bits).save(tmp_path / "rounded.safetensors")
    plain = peek_checkpoint(tmp_path / "plain.safetensors")
    header = peek_checkpoint(tmp_path / "rounded.safetensors")
    assert (plain.version, plain.bits, header.version, header.bits) == (1, None, 2, bits)
    assert header.config == plain.config
    assert set(header.arrays) == {
        f"factors.{name}.{part}" for name in ("input", "output") for part in ("codes", "scales")
    }
    size = sum(each.nbytes for each in header.arrays.values())
    assert size == made.factor_bytes
    assert size == sum(each.nbytes for each in plain.arrays.values()) * (bits + 0.5) / 32
    assert read_checkpoint(tmp_path / "rounded.safetensors", BACKEND).bits == bits


@BITS
def test_embeddings_and_blocks(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = MuMoEEmbedding(9, 6, experts=3, rank=4).quantize(bits)
    table.save(tmp_path / "table.safetensors")
    ids, given = torch.tensor([[1, 8, 0]]), torch.rand(1, 3, 3)
    found = MuMoEEmbedding.load(tmp_path / "table.safetensors")(ids, given)
    assert torch.equal(found, table(ids, given))
    block = MuMoEMLP(6, 8, 6, experts=3, rank=4)
    plain = copy.deepcopy(block)
    block.first.quantize(bits)
    block.save(tmp_path / "block.safetensors")
    opened, x = MuMoEMLP.load(tmp_path / "block.safetensors"), torch.randn(5, 6)
    assert torch.equal(opened(x), block(x))
    assert not torch.equal(opened(x), plain(x))
    block.second.quantize(12 - bits)
    with pytest.raises(CheckpointError, match="as many bits each; got some of 8 and some of 4"):
        block.save(tmp_path / "mixed.safetensors")
    assert not (tmp_path / "mixed.safetensors").exists()


def test_earlier_releases_say_that_they_are_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layer.safetensors"
    layer(8).save(path)
    monkeypatch.setattr(_format, "SCHEMA_VERSION", 1)
    with pytest.raises(CheckpointError, match=r"at most 1; got 2.*update"):
        MuMoE.load(path)
    MuMoE(3, 4, 2, "cp", rank=2).save(path)
    assert MuMoE.load(path).bits is None


def spoiled(arrays: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {key: each for key, each in {**arrays, name: value}.items() if each is not None}


@BITS
@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("factors.input.codes", lambda each: each.float(), "codes of . bits must be"),
        ("factors.input.codes", lambda each: each.to(torch.int16), "codes of . bits must be"),
        ("factors.input.scales", lambda each: each.to(torch.int32), "floating-point"),
        ("factors.input.scales", lambda each: each[:-1], "must have the shape"),
        ("factors.input.codes", lambda each: each[:-1], "must have the shape"),
        ("factors.input.codes", lambda each: None, "is missing"),
        ("factors.input.scales", lambda each: None, "is missing"),
        ("factors.input", lambda each: torch.ones(13, 3, 5), "is unexpected"),
    ],
)
def test_damaged_files_are_refused(
    name: str, change: Any, rule: str, bits: int, tmp_path: Path
) -> None:
    path = tmp_path / "layer.safetensors"
    made = layer(bits)
    arrays = dict(made.state_dict())
    value = change(arrays.get(name))
    changed = spoiled(arrays, name, value)
    save_checkpoint(path, "MuMoE", made.config.to_dict(), changed, bits)
    with pytest.raises(CheckpointError, match=rule):
        MuMoE.load(path)


def test_codes_of_other_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    made = layer(8)
    save_checkpoint(path, "MuMoE", made.config.to_dict(), made.state_dict(), 4)
    with pytest.raises(CheckpointError, match="shape"):
        MuMoE.load(path)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"bits": "3"}, "bits must be 4 or 8.*got '3'"),
        ({"bits": ""}, "bits must be 4 or 8"),
        ({"version": "1"}, "in a file of version 2 or later"),
    ],
)
def test_headers_that_cannot_be(changes: dict[str, str], rule: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "layer.safetensors"
    layer(8).save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    assert metadata["bits"] == "8"
    save_file(load_file(path), path, {**metadata, **changes})
    with pytest.raises(CheckpointError, match=rule):
        peek_checkpoint(path)


def test_values_are_not_those_of_the_spec_alone() -> None:
    """A spec has no bits: the same layer in all of them."""
    assert layer(8).config.spec == LayerSpec(13, 7, 3, TensorRing((2, 3, 5)))

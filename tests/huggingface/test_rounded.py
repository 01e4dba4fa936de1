"""Models of transformers whose experts have 8 or 4 bits: folders, loaded and saved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.errors import CheckpointError, SpecError
from tensormoe_torch import MuMoE, replace
from tensormoe_torch.adapters import add_adapters
from tests._compress_models import logits, save_family
from tests.huggingface._models import compressed, gpt2, load

BITS = pytest.mark.parametrize("bits", [8, 4])


def made(folder: Path, bits: int, dtype: torch.dtype, **options: Any) -> Path:
    model = folder / "model"
    if not model.exists():
        save_family("mixtral", model, dtype)
    output = folder / f"out-{len(list(folder.iterdir()))}"
    settings = Compression("low_rank", budget=0.4, bits=bits, compare=False, **options)
    compress_checkpoint(model, output, settings)
    return output


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_opened_as_it_is_stored(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = made(tmp_path, bits, dtype)
    model = load(folder)
    held = {}
    for path in (folder / "experts").glob("*.safetensors"):
        held |= load_file(path)
    codes = torch.int8 if bits == 8 else torch.uint8
    for number in range(2):
        experts = model.model.layers[number].mlp.experts
        assert (experts.bits, experts.down_proj.dtype) == (bits, dtype)
        for key, each in experts.state_dict().items():
            name = f"model.layers.{number}.block_sparse_moe.experts.{key}"
            assert torch.equal(each, held.pop(name))
            assert each.dtype == (codes if key.endswith("codes") else dtype)
    assert not held
    assert described(folder)["version"] == 2
    if dtype == torch.bfloat16:
        # rounding changes a router's choices
        return
    # what the model with the rebuilt matrices computes
    dense = load(made(tmp_path, bits, dtype, dense=True))
    dense.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@BITS
def test_saved_again_and_in_another_dtype(bits: int, tmp_path: Path) -> None:
    folder = made(tmp_path, bits, torch.bfloat16)
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert described(tmp_path / "again")["version"] == 2
    first = next(iter(described(tmp_path / "again")["modules"].values()))
    assert first["bits"] == dict.fromkeys(("gate_proj", "up_proj", "down_proj"), bits)
    wide = load(folder, dtype=torch.float32)
    experts = wide.model.layers[1].mlp.experts
    assert (experts.bits, experts.down_proj.dtype) == (bits, torch.float32)
    for name, each in experts.down_proj.factors.items():
        found = model.model.layers[1].mlp.experts.down_proj.factors[name]
        torch.testing.assert_close(each, found.float(), rtol=2**-8, atol=0)


@BITS
def test_compressed_in_place_and_dequantized(bits: int, tmp_path: Path) -> None:
    model = compressed("mixtral", bits=bits)
    model.save_pretrained(tmp_path / "rounded")
    opened = load(tmp_path / "rounded")
    assert torch.equal(logits(opened), logits(model))
    # what is opened is rounded, until it says otherwise
    for layer in opened.model.layers:
        layer.mlp.experts.dequantize()
    # numbers share work that integers do not
    torch.testing.assert_close(logits(opened), logits(model))
    opened.save_pretrained(tmp_path / "floats")
    assert described(tmp_path / "floats")["version"] == 1
    plain = load(tmp_path / "floats")
    assert plain.model.layers[0].mlp.experts.bits is None
    assert torch.equal(logits(plain), logits(opened))
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("rounded", "floats")
    ]
    assert sizes[0] < sizes[1]


def test_projections_of_different_bits(tmp_path: Path) -> None:
    model = compressed("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.up_proj.quantize(8)
    experts.down_proj.quantize(4)
    assert experts.bits is None
    model.save_pretrained(tmp_path)
    opened = load(tmp_path)
    found = opened.model.layers[0].mlp.experts.projections
    assert {r: each.bits for r, each in found.items()} == {
        "gate_proj": None,
        "up_proj": 8,
        "down_proj": 4,
    }
    assert torch.equal(logits(opened), logits(model))


def test_with_adapters(tmp_path: Path) -> None:
    model = compressed("mixtral", bits=8)
    add_adapters(model, rank=2)
    for name, each in model.named_parameters():
        if each.requires_grad and name.endswith("output"):
            torch.nn.init.normal_(each)
    model.save_pretrained(tmp_path)
    opened = load(tmp_path)
    assert opened.model.layers[0].mlp.experts.bits == 8
    assert torch.equal(logits(opened), logits(model))


def test_other_layers_are_refused(tmp_path: Path) -> None:
    model = gpt2()
    replace(model, "transformer.h.0.mlp.c_fc", experts=3, factorization="cp", rank=2)
    layers = [each for each in model.modules() if isinstance(each, MuMoE)]
    layers[0].quantize(8)
    with pytest.raises(SpecError, match=r"must be floating-point.*8 bits.*dequantize\(\)"):
        model.save_pretrained(tmp_path)


def changed(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for each in config["quantization_config"]["modules"].values():
        change(each)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ({"down_proj": 5}, "bits must be 4 or 8"),
        ({"down_proj": True}, "bits must be 4 or 8"),
        ({"other": 8}, "bits must be 4 or 8, of the projections"),
        (8, "bits must be 4 or 8"),
    ],
)
def test_descriptions_that_cannot_be(value: Any, rule: str, tmp_path: Path) -> None:
    folder = made(tmp_path, 8, torch.float32)
    changed(folder, lambda each: each.update(bits=value))
    with pytest.raises(SpecError, match=rule):
        load(folder)


def test_files_that_do_not_fit_their_description(tmp_path: Path) -> None:
    folder = made(tmp_path, 8, torch.float32)
    changed(folder, lambda each: each.pop("bits"))
    with pytest.raises(CheckpointError, match="factors; the files of the model hold"):
        load(folder)
    folder = made(tmp_path, 8, torch.float32)
    changed(folder, lambda each: each["bits"].update(down_proj=4))
    with pytest.raises((CheckpointError, RuntimeError)):
        load(folder)
    folder = made(tmp_path, 4, torch.float32)
    path = next((folder / "experts").glob("*.safetensors"))
    arrays = load_file(path)
    gone = next(key for key in arrays if key.endswith("codes"))
    del arrays[gone]
    save_file(arrays, path, {"format": "pt"})
    with pytest.raises(CheckpointError):
        load(folder)

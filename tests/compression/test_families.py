"""Checkpoints that transformers wrote, compressed, and given back to its loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe import functional
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.testing import reconstruct
from tensormoe_torch import MuMoE
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import FAMILIES, content, fused, logits, save, save_family

NAMES = ("tensor_ring", "cp", "tucker", "tensor_train")


def rebuilt(output: Path) -> dict[str, np.ndarray]:
    """Every group's tensor (experts, in, out), from its factors, by code that is not ours."""
    manifest = json.loads((output / "tensormoe.json").read_text())
    found = {}
    for group in manifest["groups"]:
        path = output / group["file"]
        with safe_open(path, "pt") as file:
            spec = json.loads(file.metadata()["config"])["spec"]
        kind = functional.LayerConfig.from_dict(
            {"spec": spec, "gate": None, "indexed_input": False}
        ).spec.factorization
        factors = {
            name.rpartition("factors.")[2]: array.double().numpy()
            for name, array in load_file(path).items()
        }
        found[group["name"]] = reconstruct(kind, factors)
    return found


def replace(model: Any, tensors: dict[str, np.ndarray], transposed: bool) -> None:
    """Put matrices in the places of a model's experts."""

    def stored(name: str) -> torch.Tensor:
        array = torch.tensor(tensors[name])
        return array.transpose(1, 2) if transposed else array

    def put(target: torch.Tensor, value: torch.Tensor) -> None:
        assert target.shape == value.shape
        target.data.copy_(value)

    for layer in range(len(model.model.layers)):
        names = [name for name in tensors if f".layers.{layer}." in name]
        if not names:
            continue
        if len(names) == 2:
            first, second = sorted(names, key=lambda name: "down" in name or "output" in name)
            put(fused(model, layer).gate_up_proj, stored(first))
            put(fused(model, layer).down_proj, stored(second))
            continue
        ends = ("w1", "w3", "w2") if "w1" in str(names) else ("gate_proj", "up_proj", "down_proj")
        by_end = {name.split(".")[-2]: name for name in names}
        gate, up, down = (stored(by_end[end]) for end in ends)
        put(fused(model, layer).gate_up_proj, torch.cat([gate, up], dim=1))
        put(fused(model, layer).down_proj, down)


@pytest.mark.parametrize(("name", "place"), [(name, k) for k, name in enumerate(FAMILIES)])
def test_the_loader_takes_rebuilt_experts(name: str, place: int, tmp_path: Path) -> None:
    preset, _ = FAMILIES[name]
    model = save_family(name, tmp_path / "model")
    before = logits(model)
    wanted = {"factorization": NAMES[place % 4], "budget": 0.5, "preset": preset, "seed": place}
    result = compress_checkpoint(tmp_path / "model", tmp_path / "factors", Compression(**wanted))
    dense = Compression(**wanted, dense=True)
    compress_checkpoint(tmp_path / "model", tmp_path / "dense", dense)

    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not any(info.values()), info

    # the factorized folder opens too; saved again, it is bitwise equal
    opened, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "factors", output_loading_info=True
    )
    assert not any(info.values()), info
    assert any(isinstance(each, FactorizedExperts) for each in opened.modules())
    torch.testing.assert_close(logits(opened), logits(loaded.eval()), atol=2e-4, rtol=1e-3)
    opened.save_pretrained(tmp_path / "again", max_shard_size="12KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(opened))

    tensors = rebuilt(tmp_path / "factors")
    originals = [fused(model, k).down_proj.detach().clone() for k in _sparse(model)]
    replace(model, tensors, transposed=name != "gpt_oss")
    torch.testing.assert_close(logits(loaded.eval()), logits(model), atol=2e-4, rtol=1e-3)
    assert (logits(model) - before).abs().max() > 0.01

    # and the reported error is what the loaded model lacks
    for layer, original in zip(_sparse(model), originals, strict=True):
        lacking = fused(loaded, layer).down_proj.detach() - original
        (report,) = [
            each
            for each in result.groups
            if f".layers.{layer}." in each.name
            and any(end in each.name for end in ("down_proj", ".w2", "output_linear"))
        ]
        assert float(lacking.norm() / original.norm()) == pytest.approx(report.error, rel=1e-3)
        assert 0 < report.parameters <= report.dense_parameters / 2


def _sparse(model: Any) -> list[int]:
    """Layers that have experts."""
    return [
        place
        for place, layer in enumerate(model.model.layers)
        if any(
            hasattr(each, "gate_up_proj") and each.gate_up_proj.ndim == 3
            for each in layer.modules()
        )
    ]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_everything_else_stays_byte_for_byte(name: str, tmp_path: Path) -> None:
    save_family(name, tmp_path / "model", torch.bfloat16)
    wanted = {"factorization": "cp", "rank": 4, "preset": FAMILIES[name][0]}
    compress_checkpoint(tmp_path / "model", tmp_path / "factors", Compression(**wanted))
    compress_checkpoint(tmp_path / "model", tmp_path / "dense", Compression(**wanted, dense=True))
    old, new = content(tmp_path / "model"), content(tmp_path / "dense")
    assert set(new) == {*old, "tensormoe.json"}
    rest = content(tmp_path / "factors")
    index = json.loads(rest["model.safetensors.index.json"])["weight_map"]
    for file in old:
        if not file.endswith(".safetensors"):
            assert new[file] == old[file]
            if file not in ("config.json", "model.safetensors.index.json"):
                assert rest[file] == old[file]
            continue
        before, dense = load_file(tmp_path / "model" / file), load_file(tmp_path / "dense" / file)
        assert list(before) == list(dense)
        for key, array in before.items():
            assert dense[key].dtype == array.dtype == torch.bfloat16
            assert dense[key].shape == array.shape
            expert = ".experts." in key and "bias" not in key
            assert torch.equal(dense[key], array) != expert
            assert (key in index) != expert
        wanted_keys = [key for key in before if key in index]
        assert (file in rest) == bool(wanted_keys)
        if wanted_keys:
            kept = load_file(tmp_path / "factors" / file)
            assert list(kept) == wanted_keys
            assert all(torch.equal(kept[key], before[key]) for key in kept)
            assert {index[key] for key in kept} == {file}


def test_factors_are_layers_of_every_framework(tmp_path: Path) -> None:
    save_family("olmoe", tmp_path / "model", torch.bfloat16)
    wanted = Compression("tensor_ring", rank=(2, 2, 6), preset="olmoe")
    result = compress_checkpoint(tmp_path / "model", tmp_path / "out", wanted)
    tensors = rebuilt(tmp_path / "out")
    assert len(result.groups) == 6
    for report in result.groups:
        assert report.file is not None
        layer = MuMoE.load(tmp_path / "out" / report.file)
        assert next(layer.parameters()).dtype == torch.bfloat16
        assert layer.config.spec.factorization.rank == report.rank == (2, 2, 6)
        for number in range(report.experts):
            weight, _ = layer.float().expert(number)
            np.testing.assert_allclose(
                weight.detach().numpy(), tensors[report.name][number], atol=1e-5
            )


def test_models_saved_as_they_are_in_memory_are_stacks(tmp_path: Path) -> None:
    model = save_family("qwen3_moe", tmp_path / "model")
    (tmp_path / "fused").mkdir()
    save(tmp_path / "fused" / "model.safetensors", model.state_dict())
    (tmp_path / "fused" / "config.json").write_bytes(
        (tmp_path / "model" / "config.json").read_bytes()
    )
    wanted = Compression("cp", budget=0.5, preset="fused", dense=True)
    result = compress_checkpoint(tmp_path / "fused", tmp_path / "dense", wanted)
    assert [each.in_features for each in result.groups] == [12, 16, 12, 16]
    assert [each.out_features for each in result.groups] == [16, 24, 16, 24]
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not any(info.values()), info
    for report in result.groups:
        old, new = model.state_dict()[report.name], loaded.state_dict()[report.name]
        assert float((old - new).norm() / old.norm()) == pytest.approx(report.error, rel=1e-3)

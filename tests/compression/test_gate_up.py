"""Gate and up projection of models on disk as one tensor, as two, or as loses less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.compression import (
    Compression,
    compress_checkpoint,
    plan_compression,
)
from tensormoe.compression import _values as values_module
from tensormoe.compression._cluster import _task
from tensormoe.compression._shards import open_shards
from tensormoe.compression._values import read_stack
from tensormoe.errors import SpecError
from tests._compress_models import (
    content,
    logits,
    opened,
    save,
    tokens,
)
from tests._more_models import BOTH, RANK, TWO, experts_of, low_rank, roles
from tests._quantized_models import fp8, mxfp4

QUICK = {"compare": False}
# stacks in files, halves and in turns; a tensor per expert; blocks of tokens for each expert
FAMILIES = ["granitemoe", "gpt_oss", "llama4_text", "gemma4_text", "qwen3_moe", "phimoe"]


@pytest.mark.parametrize("gate_up", ["joined", "apart"])
@pytest.mark.parametrize("name", FAMILIES)
def test_either_way_computes_what_the_model_did(name: str, gate_up: str, tmp_path: Path) -> None:
    model = low_rank(name)
    before, said = logits(model), tokens(model)
    model.save_pretrained(tmp_path / "model")
    wanted = Compression("tucker", rank=RANK, gate_up=gate_up, **QUICK)
    result = compress_checkpoint(
        tmp_path / "model", tmp_path / "dense", replace(wanted, dense=True)
    )
    assert all(report.error < 1e-5 for report in result.groups)
    per_layer = 2 if gate_up == "joined" else 3
    assert len(result.groups) == per_layer * len(experts_of(model))
    plain = opened(tmp_path / "dense")
    torch.testing.assert_close(logits(plain), before, atol=1e-4, rtol=1e-3)
    old, new = content(tmp_path / "model"), content(tmp_path / "dense")
    assert set(new) == {*old, "tensormoe.json"}

    if name == "gpt_oss" and gate_up == "apart":
        with pytest.raises(SpecError, match=r"gate in a way of their own.*got gate_up='apart' for"):
            compress_checkpoint(tmp_path / "model", tmp_path / "factors", wanted)
        assert not (tmp_path / "factors").exists()
        return
    compress_checkpoint(tmp_path / "model", tmp_path / "factors", wanted)
    found = opened(tmp_path / "factors")
    assert roles(found) == {BOTH if gate_up == "joined" else TWO}
    torch.testing.assert_close(logits(found), before, atol=1e-4, rtol=1e-3)
    assert tokens(found) == said
    # and saved again
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(found))


@pytest.mark.parametrize("gate_up", ["joined", "apart"])
def test_matrices_are_those_of_the_factors(gate_up: str, tmp_path: Path) -> None:
    # of no rank in particular: what factors lose has to be lost by matrices as well
    for name in ("granitemoe", "qwen3_moe"):
        model = low_rank(name)
        with torch.no_grad():
            for each in experts_of(model):
                for parameter in each.parameters():
                    parameter += torch.randn(parameter.shape) / 8
        model.save_pretrained(tmp_path / name)
        wanted = Compression("tensor_ring", budget=0.4, gate_up=gate_up, **QUICK)
        found = {}
        for dense in (False, True):
            out = tmp_path / f"{name}-{dense}"
            compress_checkpoint(tmp_path / name, out, replace(wanted, dense=dense))
            found[dense] = logits(opened(out))
        torch.testing.assert_close(found[True], found[False], atol=2e-4, rtol=1e-3)
        assert (found[True] - logits(model)).abs().max() > 0.01


sizes = st.integers(1, 5)


@settings(max_examples=25, deadline=None)
@given(
    experts=sizes,
    rows=sizes,
    hidden=sizes,
    entries=st.sampled_from([1, 7, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["out_in", "in_out"]),
    kind=st.sampled_from(["apart", "halves", "turns"]),
)
def test_any_sizes_are_read_and_written_whole(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    rows: int,
    hidden: int,
    entries: int,
    dtype: torch.dtype,
    layout: str,
    kind: str,
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    gate, up = (torch.randn(experts, rows, hidden).to(dtype) for _ in range(2))
    down = torch.randn(experts, hidden, rows).to(dtype)

    def stored(array: torch.Tensor) -> torch.Tensor:
        return array if layout == "in_out" else array.transpose(-1, -2)

    stem = "model.layers.0.mlp.experts."
    if kind == "apart":
        tensors = {
            f"{stem}{n}.{role}.weight": stored(each[n])
            for role, each in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
            for n in range(experts)
        }
        way, preset = "joined", "qwen_moe"
        wanted = [down, torch.cat([gate, up], -1)]
    else:
        stacked = torch.cat([gate, up], -1)
        if kind == "turns":
            stacked = torch.stack([gate, up], -1).flatten(-2)
        tensors = {f"{stem}gate_up_proj": stored(stacked), f"{stem}down_proj": stored(down)}
        way, preset = "apart", "gpt_oss" if kind == "turns" else "fused"
        wanted = [down, gate, up]
    model = save(folder / "m.safetensors", tensors)
    # as they are: no factors of so few entries are smaller
    chosen = Compression(
        "dense", bits=8, preset=preset, layout=layout, gate_up=way, dense=True, **QUICK
    )
    before = values_module._ENTRIES
    values_module._ENTRIES = entries
    try:
        try:
            plan = plan_compression(model, chosen)
        except Exception as error:
            assert "fewer bytes" in str(error)  # noqa: PT017
            return
        for each, array in zip(plan.groups, wanted, strict=True):
            found = read_stack(plan.model, each.group)
            np.testing.assert_array_equal(found, array.to(torch.float64).numpy())
        result = compress_checkpoint(model, folder / "out", chosen)
    finally:
        values_module._ENTRIES = before
    written = load_file(folder / "out" / "m.safetensors")
    for key, each in tensors.items():
        assert written[key].shape == each.shape
        assert written[key].dtype == dtype
        # rounded, and each in its place
        torch.testing.assert_close(written[key], each.contiguous(), atol=0.1, rtol=0.02)
    assert all(report.error < 0.02 for report in result.groups)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_quantized_models_are_dequantized_on_the_way(name: str, tmp_path: Path) -> None:
    (mxfp4 if name == "gpt_oss" else fp8)(tmp_path)
    # experts are powers of two times one of them
    way, rank = ("apart", (1, 32, 32)) if name == "gpt_oss" else ("joined", (1, 16, 16))
    wanted = Compression("tucker", rank=rank, gate_up=way, dense=True, **QUICK)
    if name == "deepseek_v3":
        both = tuple(f"layers.*.mlp.experts.*.{role}_proj" for role in ("gate", "up"))
        wanted = replace(wanted, preset=None, experts=both)
    plan = plan_compression(tmp_path / "model", wanted)
    for each in plan.groups:
        # as a worker of a cluster gets it, which knows no other file
        task = _task(plan, each, str(tmp_path), "x", {})
        array = read_stack(open_shards(task.shards), task.group)
        np.testing.assert_array_equal(array, read_stack(plan.model, each.group))
    first = {"gpt_oss": "experts.gate_up_proj:gate", "deepseek_v3": "*.gate_proj+up_proj.weight"}
    assert any(each.group.name.endswith(first[name]) for each in plan.groups)
    compress_checkpoint(tmp_path / "model", tmp_path / "out", wanted)
    plain = tensors_of(tmp_path / "plain")
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(plain)
    for key, each in found.items():
        if ".experts." not in key or "bias" in key:
            assert torch.equal(each, plain[key])
        else:
            torch.testing.assert_close(each, plain[key], rtol=0.008, atol=1e-6)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: each
        for path in sorted(folder.rglob("*.safetensors"))
        for key, each in load_file(path).items()
    }

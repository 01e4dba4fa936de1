"""Quantized models: dequantized on the way, or refused by the name of their format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.cli import main
from tensormoe.compression import Compression, compress_checkpoint, plan_compression
from tensormoe.compression import _values as values_module
from tensormoe.compression._cluster import _task
from tensormoe.compression._low_precision import from_e2m1, from_e4m3, from_e8m0
from tensormoe.compression._shards import open_shards
from tensormoe.compression._values import read_stack
from tensormoe.errors import CheckpointError
from tensormoe_torch import compress
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import experts, logits, save, save_shards
from tests._quantized_models import fp8, mxfp4

BYTES = bytes(range(256))
ONE_EXPERT = {"gpt_oss": (1, 32, 32), "deepseek_v3": (1, 12, 12)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Models by family, with the folders of what is quantized."""
    root = tmp_path_factory.mktemp("quantized")
    made = {}
    for name, make in (("gpt_oss", mxfp4), ("deepseek_v3", fp8)):
        (root / name).mkdir()
        made[name] = make(root / name), root / name / "model"
    return made


def test_numbers_of_few_bits_are_those_of_pytorch_and_transformers() -> None:
    data = torch.frombuffer(bytearray(BYTES), dtype=torch.uint8)
    for found, kind in ((from_e4m3(BYTES), "float8_e4m3fn"), (from_e8m0(BYTES), "float8_e8m0fnu")):
        np.testing.assert_array_equal(found, data.view(getattr(torch, kind)).float().numpy())
    pairs = np.array([[FP4_VALUES[code & 15], FP4_VALUES[code >> 4]] for code in BYTES], "float32")
    np.testing.assert_array_equal(from_e2m1(BYTES), pairs.reshape(-1))
    assert np.signbit(from_e2m1(b"\x08")[0])


@pytest.mark.parametrize("entries", [2**20, 40])
def test_stacks_of_mxfp4_are_those_of_transformers(
    entries: int,
    models: dict[str, tuple[Any, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(values_module, "_ENTRIES", entries)
    _, folder = models["gpt_oss"]
    plan = plan_compression(folder, Compression("cp", rank=2))
    assert [each.group.dtype for each in plan.groups] == ["bfloat16"] * 4
    tensors = {
        key: each for path in folder.glob("*.safetensors") for key, each in load_file(path).items()
    }
    for each in plan.groups:
        name = each.group.name
        wanted = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        found = read_stack(plan.model, each.group)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.float().numpy())
        # as a worker of a cluster gets it, which knows no other file
        task = _task(plan, each, str(folder), "x", {})
        assert len(task.shards) == 2
        np.testing.assert_array_equal(read_stack(open_shards(task.shards), task.group), found)


@pytest.mark.parametrize("entries", [2**20, 40])
def test_stacks_of_fp8_are_those_of_transformers(
    entries: int,
    models: dict[str, tuple[Any, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(values_module, "_ENTRIES", entries)
    _, folder = models["deepseek_v3"]
    plan = plan_compression(folder, Compression("cp", rank=2))
    tensors = {
        key: each for path in folder.glob("*.safetensors") for key, each in load_file(path).items()
    }
    convert = Fp8Dequantize(None)._dequantize_one
    assert len(plan.groups) == 3
    for each in plan.groups:
        found = read_stack(plan.model, each.group)
        for number, key in enumerate(each.group.keys):
            values, scales = tensors[key], tensors[f"{key}_scale_inv"]
            # blocks that end with the matrix: transformers takes whole ones alone
            rows, columns = (8 * size for size in scales.shape)
            padded = torch.zeros(rows, columns)
            padded[: values.shape[0], : values.shape[1]] = values.float()
            wanted = convert(padded.to(values.dtype), scales, torch.float32)
            wanted = wanted[: values.shape[0], : values.shape[1]]
            np.testing.assert_array_equal(found[number].T, wanted.numpy())


def tokens(model: Any) -> list[int]:
    found = model.generate(
        torch.arange(3, 9)[None], max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return list(found[0].tolist())


def opened(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: each
        for path in sorted(folder.rglob("*.safetensors"))
        for key, each in load_file(path).items()
    }


@pytest.mark.parametrize("name", ONE_EXPERT)
def test_factors_and_matrices_of_quantized_models(
    name: str, models: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = models[name]
    wanted = Compression("tucker", rank=ONE_EXPERT[name], compare=False)
    result = compress_checkpoint(folder, tmp_path / "factors", wanted)
    assert all(report.dtype == "bfloat16" and report.error < 0.01 for report in result.groups)
    dense = Compression("tucker", rank=ONE_EXPERT[name], compare=False, dense=True)
    compress_checkpoint(folder, tmp_path / "dense", dense)

    # nothing is left of the format, and what is no expert has its values to the bit
    plain = stored(folder.parent / "plain")
    found = stored(tmp_path / "dense")
    assert set(found) == set(plain)
    for key, each in found.items():
        assert each.dtype == plain[key].dtype
        assert each.shape == plain[key].shape
        if ".experts." not in key or "bias" in key:
            assert torch.equal(each, plain[key])
        else:
            # MXFP4 values lose nothing in bfloat16; products with FP8's scales are rounded to it
            rtol = 0.0 if name == "gpt_oss" else 0.008
            torch.testing.assert_close(each, plain[key], atol=1e-6, rtol=rtol)
    rest = {key: each for key, each in stored(tmp_path / "factors").items() if key in plain}
    assert set(rest) == {key for key in plain if ".experts." not in key or "bias" in key}
    assert all(torch.equal(each, plain[key]) for key, each in rest.items())
    for output, method in (("factors", "tensormoe"), ("dense", None)):
        config = json.loads((tmp_path / output / "config.json").read_text())
        assert config.get("quantization_config", {}).get("quant_method") == method
        index = json.loads((tmp_path / output / "model.safetensors.index.json").read_text())
        held = stored(tmp_path / output)
        assert set(index["weight_map"]) == set(held)
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in held.values())

    # loaders need nothing of the format, and the models say the same
    wide = model.float()
    said = tokens(wide)
    for output in ("factors", "dense"):
        again = opened(tmp_path / output, dtype=torch.float32)
        # factors are rounded to 16 bits
        torch.testing.assert_close(logits(again), logits(wide), atol=0.1, rtol=0.05)
        assert tokens(again) == said
        kinds = [each for each in again.modules() if isinstance(each, FactorizedExperts)]
        assert bool(kinds) == (output == "factors")


def test_one_layer_in_factors_and_the_others_in_plain_numbers(
    models: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = models["gpt_oss"]
    patterns = tuple(f"layers.1.mlp.experts.{each}" for each in ("gate_up_proj", "down_proj"))
    wanted = Compression("tucker", rank=(1, 32, 32), experts=patterns, compare=False)
    compress_checkpoint(folder, tmp_path / "out", wanted)
    plain = stored(folder.parent / "plain")
    found = stored(tmp_path / "out")
    for each in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{each}"
        assert torch.equal(found[key], plain[key])
        assert f"model.layers.1.mlp.experts.{each}" not in found
    again = opened(tmp_path / "out", dtype=torch.float32)
    kinds = [type(layer.mlp.experts).__name__ for layer in again.model.layers]
    assert kinds == ["GptOssExperts", "FactorizedExperts"]
    torch.testing.assert_close(logits(again), logits(model.float()), atol=0.1, rtol=0.05)


ENDS = ("w1", "w2", "w3")
KEY = "model.layers.0.mlp.experts.{}.{}.{}"
ROLES = ("gate_proj", "up_proj", "down_proj")
_PACKED = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
FORMATS: dict[str, tuple[str, dict[str, torch.dtype]]] = {
    "gptq": (
        "GPTQ",
        {
            "qweight": torch.int32,
            "qzeros": torch.int32,
            "scales": torch.float16,
            "g_idx": torch.int32,
        },
    ),
    "awq": ("AWQ", {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}),
    "bitsandbytes": (
        "bitsandbytes",
        {
            "weight": torch.uint8,
            "weight.absmax": torch.float32,
            "weight.quant_map": torch.float32,
            "weight.quant_state.bitsandbytes__nf4": torch.uint8,
        },
    ),
    "bitsandbytes 8-bit": ("bitsandbytes", {"weight": torch.int8, "SCB": torch.float32}),
    "compressed-tensors": (
        "compressed-tensors",
        {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
    ),
    "modelopt": (
        "NVFP4",
        {
            "weight": torch.uint8,
            "weight_scale": torch.float8_e4m3fn,
            "weight_scale_2": torch.float32,
        },
    ),
    "int4": ("no known format", {"weight": torch.uint8}),
}


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("preset", ["auto", "qwen_moe"])
def test_other_formats_are_named(method: str, preset: str, tmp_path: Path) -> None:
    shown, parts = FORMATS[method]
    tensors = {
        KEY.format(number, role, part): torch.ones(8, 6).to(dtype)
        for number in range(4)
        for role in ROLES
        for part, dtype in parts.items()
    }
    folder = save_shards(tmp_path / "model", tensors)
    config = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    wanted = Compression("cp", rank=2, preset=preset)
    with pytest.raises(CheckpointError) as caught:
        compress_checkpoint(folder, tmp_path / "out", wanted)
    told = str(caught.value)
    assert shown in told
    assert method in told
    assert "layers.0.mlp.experts.0" in told
    assert "Dequantize the model first" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_formats_of_what_is_no_expert_are_left_alone(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    every = {
        key.replace("w1", end): each.clone() for key, each in experts(rng).items() for end in ENDS
    }
    tensors = every | {
        "model.layers.0.self_attn.q_proj.qweight": torch.ones(4, 4, dtype=torch.int32),
        "model.layers.0.self_attn.q_proj.scales": torch.ones(4, 4),
    }
    folder = save_shards(tmp_path / "model", tensors)
    config = {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    compress_checkpoint(folder, tmp_path / "out", Compression("cp", rank=2, preset="mixtral"))
    assert not (tmp_path / "out" / "config.json").exists()
    assert "the model is quantized as well" in (tmp_path / "out" / "README.md").read_text()


def refused(model: Path, rule: str, **options: Any) -> None:
    wanted = Compression("cp", rank=1, compare=False, **options)
    with pytest.raises(CheckpointError, match=rule):
        compress_checkpoint(model, model.parent / "out", wanted)
    assert not (model.parent / "out").exists()


def test_scales_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    pattern = {"experts": ("experts.*.w",)}
    name = tmp_path / "m.safetensors"
    weights = {
        f"experts.{k}.w.weight": torch.ones(256, 200).to(torch.float8_e4m3fn) for k in (0, 1)
    }
    refused(save(name, weights), "F8_E4M3 for 'experts.0.w.weight'", **pattern)
    scales = {f"{key}_scale_inv": torch.ones(2, 2) for key in weights}
    turned = {key: torch.ones(1, 4) for key in scales}
    refused(save(name, weights | turned), r"a scale per block of 128 × 128, \(2, 2\)", **pattern)
    codes = {key: torch.ones(2, 2, dtype=torch.int32) for key in scales}
    refused(save(name, weights | codes), "is F8_E4M3 .* with I32", **pattern)
    refused(save(name, scales), "scales must have weights", **pattern)
    broken = {**scales, "experts.1.w.weight_scale_inv": torch.full((2, 2), torch.nan)}
    refused(save(name, weights | broken), "must be finite.*experts.1.w.weight'", **pattern)
    plan = plan_compression(save(name, weights | scales), Compression("cp", rank=1, **pattern))
    assert plan.groups[0].group.dtype == "bfloat16"

    folder = save_shards(tmp_path / "model", weights)
    method = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    (folder / "config.json").write_text(json.dumps(method))
    refused(folder, "must have scales; 'experts.0.w.weight' has none", **pattern)
    save_shards(folder, weights, scales)
    (folder / "config.json").write_text(json.dumps(method))
    refused(folder, r"a scale per block of 64 × 64, \(4, 4\)", **pattern)
    method["quantization_config"]["weight_block_size"] = "128"
    (folder / "config.json").write_text(json.dumps(method))
    refused(folder, "weight_block_size must be two positive integers", **pattern)


def test_mxfp4_that_is_incomplete_or_not_finite(tmp_path: Path) -> None:
    name, options = tmp_path / "m.safetensors", {"experts": ("experts.w",), "layout": "in_out"}
    blocks = torch.full((2, 6, 1, 16), 0x22, dtype=torch.uint8)
    scales = torch.full((2, 6, 1), 127, dtype=torch.uint8)
    refused(save(name, {"experts.w_blocks": blocks}), "the scales are none", **options)
    wrong = {"experts.w_blocks": blocks, "experts.w_scales": scales[:, :5]}
    refused(save(name, wrong), r"the scales are U8 \(2, 5, 1\)", **options)
    bad = scales.clone()
    bad[1, 3, 0] = 255
    refused(
        save(name, {"experts.w_blocks": blocks, "experts.w_scales": bad}),
        "must be finite.*'experts.w_blocks', expert 1",
        **options,
    )
    bad[1, 3, 0] = 254
    blocks[1, 3] = 0x77
    refused(
        save(name, {"experts.w_blocks": blocks, "experts.w_scales": bad}),
        "must be finite",
        **options,
    )


def test_scales_of_other_kinds(tmp_path: Path) -> None:
    """One scale for all of a matrix, and exponents as bytes."""
    values = torch.tensor(np.arange(48).reshape(8, 6)).to(torch.float8_e4m3fn)
    keys = [f"experts.{k}.w.weight" for k in range(2)]
    whole = {key: torch.tensor(0.5) for key in keys}
    powers = {key: torch.tensor([[126]], dtype=torch.uint8) for key in keys}
    narrow = {key: torch.tensor([[0.5]], dtype=torch.bfloat16) for key in keys}
    for scales in (whole, powers, narrow):
        tensors = {key: values.clone() for key in keys}
        tensors |= {f"{key}_scale_inv": each for key, each in scales.items()}
        save_file(tensors, tmp_path / "m.safetensors")
        wanted = Compression("cp", rank=1, experts=("experts.*.w",))
        plan = plan_compression(tmp_path / "m.safetensors", wanted)
        found = read_stack(plan.model, plan.groups[0].group)
        np.testing.assert_array_equal(found[1].T, values.float().numpy() / 2)


@pytest.mark.parametrize("name", ONE_EXPERT)
def test_models_that_transformers_dequantizes_are_compressed_in_place(
    name: str, models: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    _, folder = models[name]
    model = opened(folder)
    # the way of running experts that takes these sizes in 16 bits
    model.set_experts_implementation("eager")
    before = logits(model)
    compress(model, "tucker", rank=ONE_EXPERT[name])
    torch.testing.assert_close(logits(model), before, atol=0.1, rtol=0.05)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(opened(tmp_path / "out")), logits(model))


def test_a_dry_run_says_when_nothing_is_saved(
    models: dict[str, tuple[Any, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, larger in ((40, True), (5, False)):
        words = ["compress", str(models["gpt_oss"][1]), "--factorization", "cp", "--dry-run"]
        assert main([*words, "--rank", str(rank)]) == 0
        assert ("The output is not smaller" in capsys.readouterr().out) == larger

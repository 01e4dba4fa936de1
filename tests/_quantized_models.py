"""Small quantized models on disk, in the formats of GPT-OSS (MXFP4) and DeepSeek-V3 (FP8).

Experts of a stack are powers of two times one of them, so that factors of rank 1 over the experts
lose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests._compress_models import COMMON, LATENT, save_shards
from tests._more_models import MORE

BLOCK = 8
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4(folder: Path) -> Any:
    """A GPT-OSS model and its folder, where the scales lie in other files than the values.

    Returns:
        The model with the values that the bytes stand for, in bfloat16.
    """
    torch.manual_seed(2)
    sizes = {**COMMON, **MORE["gpt_oss"][1], "hidden_size": 32, "intermediate_size": 32}
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    values: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for key, each in model.named_parameters():
        if key.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = each.shape
            blocks = torch.randint(0, 256, (1, rows, columns // 32, 16), dtype=torch.uint8)
            powers = torch.randint(121, 125, (1, rows, columns // 32))
            of_experts = torch.randint(-1, 2, (count, 1, 1))
            values[f"{key}_blocks"] = blocks.repeat(count, 1, 1, 1)
            scales[f"{key}_scales"] = (powers + of_experts).to(torch.uint8)
            with torch.no_grad():
                plain = from_mxfp4(values[f"{key}_blocks"], scales[f"{key}_scales"])
                each.copy_(plain)
                assert torch.equal(each.float(), plain)
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    _save(model, folder, values, scales, method)
    return model


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values (experts, in, out), number by number as the format has them."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).long()
    signs = 1.0 - 2.0 * (codes >> 3)
    values = (signs * E2M1[codes & 7]).flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
    return values.flatten(-2).transpose(1, 2)


def fp8(folder: Path) -> Any:
    """A DeepSeek-V3 model and its folder: every linear layer in FP8, in blocks of 8 × 8.

    Returns:
        The model with the values that the bytes stand for, in bfloat16.
    """
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model("deepseek_v3", **{**COMMON, **LATENT})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    values: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for key, each in tensors.items():
        if not key.endswith("_proj.weight") and "_proj_with" not in key and "_b_proj" not in key:
            continue
        first = ".experts." in key
        base = tensors[_expert(key, 0)] if first else each
        quantized, scale = to_fp8(base.float())
        if first:
            # powers of two leave the values as they are
            scale = scale * 2.0 ** (int(key.split(".experts.")[1].split(".")[0]) - 2)
        values[key], scales[f"{key}_scale_inv"] = quantized, scale
    plain = {key: from_fp8(values[key], scales[f"{key}_scale_inv"]) for key in values}
    for name in ("plain", "wide"):
        (folder / name).mkdir(exist_ok=True)
    save_shards(folder / "wide", {**tensors, **plain})
    config.save_pretrained(folder / "wide")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "wide", dtype=torch.bfloat16)
    method = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    _save(model, folder, values, scales, {**method, "activation_scheme": "dynamic"})
    return model.eval()


def _expert(key: str, number: int) -> str:
    before, _, after = key.partition(".experts.")
    return f"{before}.experts.{number}.{after.partition('.')[2]}"


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values and a float32 scale for each block, the last ones cut by the matrix's end."""
    rows, columns = weight.shape
    scales = torch.ones(-(-rows // BLOCK), -(-columns // BLOCK))
    values = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
            scales[i, j] = weight[place].abs().max() / 448
            values[place] = weight[place] / scales[i, j]
    return values.to(torch.float8_e4m3fn), scales


def from_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """Products in float32, rounded to bfloat16."""
    found = values.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
            found[place] *= scales[i, j]
    return found.to(torch.bfloat16)


def _save(
    model: Any,
    folder: Path,
    values: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    method: Mapping[str, Any],
) -> None:
    model.save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    stems = {key.removesuffix("_blocks") for key in values}
    rest = {key: each for key, each in tensors.items() if key not in stems}
    config = json.loads((folder / "plain" / "config.json").read_text())
    save_shards(folder / "model", {**rest, **values}, scales)
    (folder / "model" / "config.json").write_text(
        json.dumps({**config, "quantization_config": method})
    )

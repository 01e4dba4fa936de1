"""Small models on disk, as transformers writes them and by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

# preset, and whether the family's checkpoints hold a stack of all experts
FAMILIES = {
    "mixtral": ("mixtral", False),
    "qwen2_moe": ("qwen_moe", False),
    "qwen3_moe": ("qwen_moe", False),
    "olmoe": ("olmoe", False),
    "deepseek_v2": ("deepseek", False),
    "deepseek_v3": ("deepseek", False),
    "gpt_oss": ("fused", True),
    "granitemoe": ("fused", True),
}

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "qk_nope_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "qwen2_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 4,
    },
    "qwen3_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "head_dim": 8,
    },
    "olmoe": {"intermediate_size": 12, "num_experts": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 4},
}


def family(name: str, seed: int = 0) -> Any:
    """A random model of a family."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **_SIZES[name]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_family(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family, and its checkpoint in several shards."""
    model = family(name).to(dtype)
    model.save_pretrained(folder, max_shard_size="12KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def fused(model: Any, layer: int) -> Any:
    """The module that holds a layer's experts as two stacks."""
    (found,) = [
        each for each in model.model.layers[layer].modules() if hasattr(each, "gate_up_proj")
    ]
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits.float()


def tokens(model: Any) -> list[int]:
    """A few tokens that a model generates."""
    found = model.generate(
        torch.arange(3, 9)[None], max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return list(found[0].tolist())


def opened(folder: Path) -> Any:
    """A model, all of whose weights were in the folder, and no others."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def experts(
    rng: np.random.Generator, count: int = 4, rows: int = 6, columns: int = 8, layer: int = 0
) -> dict[str, torch.Tensor]:
    """Keys and matrices (out, in) as Mixtral has them, of one projection."""
    return {
        f"model.layers.{layer}.block_sparse_moe.experts.{number}.w1.weight": torch.tensor(
            rng.standard_normal((columns, rows)), dtype=torch.float32
        )
        for number in range(count)
    }


PATTERN = ("layers.*.experts.*.w1",)


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({key: each.contiguous() for key, each in tensors.items()}, path, {"format": "pt"})
    return path


def save_shards(folder: Path, *shards: Mapping[str, torch.Tensor]) -> Path:
    """A folder with an index."""
    folder.mkdir(exist_ok=True)
    places = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save(folder / name, tensors)
        places |= dict.fromkeys(tensors, name)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"model_type": "made up"}')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

"""Small models of families that keep their experts in other ways, with experts of low rank."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import COMMON, LATENT

_ALL = ["full_attention", "full_attention"]
_APART: dict[str, Any] = {"intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 4}
_STACKED: dict[str, Any] = {"intermediate_size": 24, "num_local_experts": 4}

# the preset that each has, and its sizes besides the usual ones
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": (
        "gpt_oss",
        {
            **_STACKED,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            # reached by some of the units
            "swiglu_limit": 1.0,
        },
    ),
    "llama4_text": (
        "llama4",
        {
            "intermediate_size": 12,
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        },
    ),
    "granitemoe": ("granite_moe", _STACKED),
    "granitemoeshared": ("granite_moe", {**_STACKED, "shared_intermediate_size": 12}),
    "glm4_moe": ("glm_moe", {**LATENT, "num_experts": 4, "head_dim": 8}),
    "jamba": (
        "jamba",
        {
            "intermediate_size": 12,
            "num_experts": 4,
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "qwen3_moe": ("qwen_moe", {**_APART, "head_dim": 8}),
    "qwen3_next": (
        "qwen_moe",
        {**_APART, "head_dim": 8, "shared_expert_intermediate_size": 12, "layer_types": _ALL},
    ),
    "phimoe": ("phi_moe", _STACKED),
    "minimax": ("minimax", {**_STACKED, "head_dim": 8, "layer_types": _ALL}),
    "minimax_m2": ("minimax", {**_STACKED, "head_dim": 8}),
    "ernie4_5_moe": (
        "ernie_moe",
        {
            "intermediate_size": 24,
            "moe_intermediate_size": 12,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "hunyuan_v1_moe": (
        "hunyuan_moe",
        {"intermediate_size": 12, "num_experts": 4, "moe_topk": 2, "head_dim": 8},
    ),
    "flex_olmo": ("olmoe", {"intermediate_size": 12, "num_experts": 4}),
    "dots1": ("deepseek", {**LATENT, "head_dim": 8}),
    "solar_open": ("glm_moe", {**LATENT, "head_dim": 8}),
    "lfm2_moe": ("lfm_moe", {**_APART, "num_dense_layers": 1, "layer_types": _ALL}),
    "nemotron_h": (
        "nemotron_h",
        {
            "intermediate_size": 24,
            "moe_intermediate_size": 12,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 12,
            "layers_block_type": ["attention", "moe"],
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
        },
    ),
    "gemma4_text": (
        "gemma",
        {
            **_APART,
            "top_k_experts": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
            "layer_types": _ALL,
        },
    ),
}

RANK = (2, 2, 2)


def low_rank(name: str) -> Any:
    """A random model of a family, each of whose stacks is of multilinear rank (2, 2, 2)."""
    torch.manual_seed(1)
    sizes = {**COMMON, **MORE[name][1]}
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for module in experts_of(model):
            for key, each in module.named_parameters():
                if each.ndim == 3:
                    modes = [torch.randn(size, 2) for size in each.shape]
                    core = torch.randn(RANK)
                    each.copy_(torch.einsum("abc,na,ib,oc->nio", core, *modes) / 4)
                elif key.endswith("bias"):
                    each.copy_(torch.randn(each.shape) / 4)
    return model


def experts_of(model: nn.Module) -> list[nn.Module]:
    """Modules that hold the stacks of experts."""
    return [
        each
        for each in model.modules()
        if getattr(each._parameters.get("down_proj"), "ndim", 0) == 3
    ]


def roles(model: Any) -> set[tuple[str, ...]]:
    """Projections of the factorized experts of each layer."""
    found = (each for each in model.modules() if isinstance(each, FactorizedExperts))
    return {tuple(each.projections) for each in found}


BOTH, TWO = ("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")

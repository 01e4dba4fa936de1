"""Layers of configurations are those of the models that transformers makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensormoe.selection import LayerSite, allocate
from tensormoe.selection._config_sites import FAMILIES, config_sites
from tensormoe_torch.allocation import model_sites

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
SPARSE = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    **DECODER,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2,
    "kv_lora_rank": 4,
    "q_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}
CONFIGS = {
    "gpt2": ("GPT2", "GPT2LMHeadModel", {**GPT2, "bos_token_id": 0, "eos_token_id": 1}),
    "vit": ("ViT", "ViTForImageClassification", SMALL),
    "llama": ("Llama", "LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", "MistralForCausalLM", {**DECODER, "head_dim": 8}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "mixtral": ("Mixtral", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "olmoe": ("Olmoe", "OlmoeForCausalLM", {**SPARSE, "attention_bias": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        "Qwen2MoeForCausalLM",
        {**SPARSE, "shared_expert_intermediate_size": 12, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {**SPARSE, "head_dim": 8, "decoder_sparse_step": 2},
    ),
    "deepseek_v2": ("DeepseekV2", "DeepseekV2ForCausalLM", LATENT),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3ForCausalLM", LATENT),
}
WITH_EXPERTS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def skeleton(family: str, kind: str | None = None) -> tuple[dict[str, Any], torch.nn.Module]:
    stem, default, sizes = CONFIGS[family]
    config = getattr(transformers, f"{stem}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, kind or default)(config)
    return {**config.to_dict(), "architectures": [kind or default]}, model


def parts_of(family: str) -> list[tuple[str, ...]]:
    own = ("experts",) if family in WITH_EXPERTS else ("mlp",)
    return [own, ("attention",), ("linear",), (*own, "attention")]


def test_every_family_is_compared() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
def test_sites(family: str) -> None:
    values, model = skeleton(family)
    for parts in parts_of(family):
        if parts == ("linear",) and family in ("mixtral", "olmoe"):
            # without dense MLPs, its linear layers are attention's
            assert config_sites(values, parts) == config_sites(values, ("attention",))
        found = model_sites(model, parts)
        assert found == config_sites(values, parts)
        assert found
    assert model_sites(model) == config_sites(values, None)


def test_models_without_a_head() -> None:
    for family, kind in (("gpt2", "GPT2Model"), ("llama", "LlamaModel")):
        values, model = skeleton(family, kind)
        found = config_sites(values, ("linear",))
        assert found == model_sites(model, "linear")
        assert not found[0].name.startswith(("model.", "transformer."))


def test_half_precision() -> None:
    values, _ = skeleton("llama")
    for dtype in ("bfloat16", "float16"):
        values["dtype"] = dtype
        assert {site.itemsize for site in config_sites(values, None)} == {2}
    stem, name, sizes = CONFIGS["llama"]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**sizes))
    assert {site.itemsize for site in model_sites(model.bfloat16())} == {2}


def test_configuration_objects_and_models_share_budgets_alike() -> None:
    stem, _, sizes = CONFIGS["mixtral"]
    config = getattr(transformers, f"{stem}Config")(**sizes)
    _, model = skeleton("mixtral")
    one, other = allocate(config, "30%"), allocate(model, "30%")
    assert one == other == allocate({**config.to_dict()}, 0.3)
    assert one.parameters <= 0.3 * one.parameters_before


def test_another_family_through_its_model() -> None:
    config = transformers.GPTNeoXConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=32,
    )
    with torch.device("meta"):
        model = transformers.GPTNeoXForCausalLM(config)
    found = allocate(model, "60%", what=("mlp", "attention"), experts=2)
    assert "gpt_neox.layers.1.mlp" in found.names
    assert "gpt_neox.layers.1.attention.query_key_value" in found.names
    assert found.parameters <= 0.6 * found.parameters_before


def test_lists_of_experts_and_routers() -> None:
    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
            self.w2 = torch.nn.Linear(8, 6)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(6, 4)
            self.experts = torch.nn.ModuleList(Expert() for _ in range(4))
            self.other = torch.nn.Linear(6, 6)

    model = torch.nn.ModuleDict({"block": Block()})
    wanted = LayerSite.of_experts("block.experts", 4, 6, 8, bias=True)
    assert model_sites(model) == (wanted,)
    assert [each.name for each in model_sites(model, "linear")] == ["block.other"]

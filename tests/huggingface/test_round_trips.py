"""Models that are saved, and come back from their folder alone, the same to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.gates import Gate
from tensormoe_torch import MuMoE, MuMoEMLP, compress, replace
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import family, logits
from tests._hugging_models import FACTORIZED, QUICK, compressed, gpt2, load, train

FLOATS = [(torch.float32, "1GB"), (torch.bfloat16, "4KB")]


@pytest.mark.parametrize(("dtype", "shard"), FLOATS, ids=["float32", "bfloat16 in shards"])
@pytest.mark.parametrize("name", FACTORIZED)
def test_compressed_experts_come_back(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    model = compressed(name, dtype)
    model.save_pretrained(tmp_path / "first", max_shard_size=shard)
    assert (len(list((tmp_path / "first").glob("*.safetensors"))) > 1) == (shard == "4KB")
    loaded = load(tmp_path / "first")
    assert loaded.dtype == dtype
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    assert torch.equal(logits(loaded), logits(model))

    # trained on, and saved again
    train(loaded)
    assert not torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "second", max_shard_size=shard)
    assert torch.equal(logits(load(tmp_path / "second")), logits(loaded))


def test_what_is_written_is_what_the_model_holds(tmp_path: Path) -> None:
    model = compressed("mixtral")
    model.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    found = {key: list(array.shape) for key, array in arrays.items()}
    # under the names that Mixtral's files have
    wanted = {
        key.replace(".mlp.", ".block_sparse_moe."): list(array.shape)
        for key, array in model.state_dict().items()
    }
    assert found == wanted


@pytest.mark.parametrize("select", [None, "model.layers.1.**.experts"], ids=["all", "one layer"])
@pytest.mark.parametrize("original", [True, False], ids=["original", "in memory"])
def test_models_from_files(select: str | None, original: bool, tmp_path: Path) -> None:
    family("qwen3_moe").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    compress(model, "cp", budget=0.5, search=QUICK, select=select)
    model.save_pretrained(tmp_path / "factors", save_original_format=original)
    loaded = load(tmp_path / "factors")
    assert torch.equal(logits(loaded), logits(model))
    count = sum(isinstance(each, FactorizedExperts) for each in loaded.modules())
    assert count == (2 if select is None else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["entmax", Gate("softmax", normalization="batch")], ids=str)
@pytest.mark.parametrize("select", ["mlp", "mlp.c_fc", "attn.c_attn"])
def test_surgery_comes_back(
    select: str, gate: str | Gate, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = gpt2(dtype)
    replace(model, f"transformer.h.*.{select}", experts=(2, 2), gate=gate)
    train(model)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    kind = MuMoEMLP if select == "mlp" else MuMoE
    assert type(loaded.get_submodule(f"transformer.h.1.{select}")) is kind
    # batch norm's statistics stay wide, as they were
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }


def test_surgery_on_a_compressed_model(tmp_path: Path) -> None:
    model = compressed("olmoe")
    model.save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    replace(model, "model.layers.*.self_attn.o_proj", experts=4)
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load(tmp_path / "second")), logits(model))


def test_bodies_and_heads(tmp_path: Path) -> None:
    model = gpt2()
    replace(model, "transformer.h.*.mlp", experts=4)
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(body.h[0].mlp, MuMoEMLP)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(logits(load(tmp_path / "body")), logits(model))


def test_only_the_body_is_compressed(tmp_path: Path) -> None:
    model = family("mixtral")
    compress(model.model, "cp", budget=0.5, search=QUICK)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_another_dtype(tmp_path: Path) -> None:
    model = compressed("olmoe")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(
        loaded.model.layers[0].mlp.experts.down_proj.factors.input,
        model.model.layers[0].mlp.experts.down_proj.factors.input.bfloat16(),
    )


def test_the_folder_that_it_was_loaded_from(tmp_path: Path) -> None:
    compressed("olmoe").save_pretrained(tmp_path)
    model = load(tmp_path)
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("name", FACTORIZATIONS)
def test_every_factorization(name: str, tmp_path: Path) -> None:
    model = gpt2()
    replace(model, "transformer.h.*.mlp.c_fc", experts=4, factorization=name, budget=5000)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_gated_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    replace(model, "model.layers.*.mlp", experts=4)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.model.layers[1].mlp.config.gated
    assert torch.equal(logits(loaded), logits(model))

"""Small models of transformers with factorized layers, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.decomposition import Search
from tensormoe_torch import compress
from tests._compress_models import family

QUICK = Search(sweeps=1, polish=0)
FACTORIZED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]


def compressed(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random sparse model with its experts as factors."""
    model = family(name)
    if dtype != torch.float32:
        # which keeps some parts of some models wide
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # the way of running experts that takes these sizes in 16 bits
    model.set_experts_implementation("eager")
    compress(model, "cp", budget=0.5, search=QUICK, **options)
    return model


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ids: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids, resid_pdrop=0.0)).eval().to(dtype)


def load(folder: Path, **options: Any) -> Any:
    """A model, all of whose weights were in the folder, and no others."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def train(model: Any) -> None:
    """A few steps, which change every weight that gets a gradient."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tokens = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

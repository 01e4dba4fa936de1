"""Peak memory of loading: the factorized model, never its dense experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tensormoe_torch import MuMoE
from tensormoe_torch.compression import FactorizedExperts
from tensormoe_torch.huggingface import attach
from tests._python import run_python

# the largest resident set since it was reset, pages of mapped files included, after every weight
# was read once; in units of the model's own size
MEASURE = """
import sys
import torch
import tensormoe_torch.huggingface
from transformers import AutoModelForCausalLM

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

warm, folder = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(warm)
before = kilobytes("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
model = AutoModelForCausalLM.from_pretrained(folder)
assert all(bool(torch.isfinite(each).all()) for each in model.parameters())
size = sum(each.numel() * each.element_size() for each in model.parameters())
print((kilobytes("VmHWM:") - before) * 1024 / size)
"""


def save(folder: Path, width: int, hidden: int, rank: int) -> float:
    """A model with factors of any values; its dense size in units of its own."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": hidden, "vocab_size": 64}
    more: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        config = MixtralConfig(**sizes, **more, num_local_experts=16, num_hidden_layers=2)
        model = MixtralForCausalLM(config)
    dense = sum(each.numel() for each in model.parameters())
    for layer in model.model.layers:
        layer.mlp.experts = FactorizedExperts(
            {
                role: MuMoE(i, o, 16, "tensor_ring", rank=(4, 4, rank), bias=False, gate=None)
                for role, i, o in (
                    ("gate_proj", width, hidden),
                    ("up_proj", width, hidden),
                    ("down_proj", hidden, width),
                )
            },
            torch.nn.functional.silu,
        )
    attach(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for each in model.parameters():
            each.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="8MB")
    return dense / sum(each.numel() for each in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures it")
def test_loading_takes_the_compressed_size(tmp_path: Path) -> None:
    save(tmp_path / "warm", 16, 16, 2)
    dense = save(tmp_path / "model", 512, 1024, 128)
    assert dense > 5
    run = run_python("-c", MEASURE, tmp_path / "warm", tmp_path / "model")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.3

"""Turn the MLPs of existing models into mixtures of experts: MLP-Mixer S/16, GPT-2, ViT.

    python examples/surgery_on_pretrained_code.py

Needs PyTorch and Hugging Face's transformers; nothing is downloaded, weights are random. Trained
weights have falling singular values and lose far less to a budget than random ones do.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from tensormoe_torch import MuMoEMLP, replace
from tensormoe_torch.surgery import Surgery


class MixerBlock(nn.Module):
    """Mixes tokens, then channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, dim: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = mlp(tokens, token_hidden)
        self.channels = mlp(dim, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        mixed: Tensor = x + self.channels(self.norm2(x))
        return mixed


def mlp(features: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))


class Mixer(nn.Module):
    """MLP-Mixer; the sizes are those of S/16 for images of 224 pixels."""

    def __init__(self, depth: int = 8, dim: int = 512, patch: int = 16, pixels: int = 224) -> None:
        super().__init__()
        tokens = (pixels // patch) ** 2
        self.stem = nn.Conv2d(3, dim, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, dim, 256, 2048) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images).flatten(2).mT)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


def mixer() -> None:
    """64 experts in every MLP, at its price; then at whatever it costs to lose nothing."""
    model = Mixer().eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = model(images)
    exact = copy.deepcopy(model)

    surgery = replace(
        model, ["blocks.*.tokens", "blocks.*.channels"], experts=64, example=images, roofline="a100"
    )
    print("MLP-Mixer S/16, CP, each layer with the parameters of the linear one, gates on top")
    show(surgery, 4)
    found = model.train()(images)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    surgery = replace(exact, "blocks.*.channels", experts=64, factorization="hadamard", noise=0.05)
    print("\nthe same with Hadamard in the channel MLPs, which holds any weights")
    show(surgery, 2)
    compare(exact, wanted, images)


def gpt2() -> None:
    """A bond of the full rank: the model computes what it did, and has experts to train."""
    sizes = {"n_layer": 3, "n_embd": 96, "n_head": 4, "vocab_size": 256, "n_positions": 64}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    ).eval()
    ids = torch.randint(0, 256, (4, 64))
    with torch.no_grad():
        wanted = model(ids).logits
    surgery = replace(
        model,
        "transformer.h.*.mlp",
        experts=(8, 8),
        factorization="tensor_ring",
        rank=(2, 2, 2, 49),
        example={"input_ids": ids},
    )
    print("\nGPT-2 of three blocks, tensor ring of full rank, 8 × 8 experts")
    show(surgery, 3)
    compare(model, wanted, ids)
    logits = model(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    block = model.transformer.h[0].mlp
    assert isinstance(block, MuMoEMLP)
    norms = [float(p.grad.norm()) for p in block.parameters() if p.grad is not None]
    print(f"loss {loss.item():.2f}; gradients reach all {len(norms)} arrays of a block")


def vit() -> None:
    """Attention's output layers as well: linear layers one by one."""
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=192, image_size=32, patch_size=8)
    model = ViTForImageClassification(config).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images).logits
    surgery = replace(
        model,
        ["vit.layers.*.mlp", "vit.layers.*.attention.o_proj"],
        experts=16,
        rank=97,
        example=images,
    )
    print("\nViT of two layers, CP of full rank, 16 experts")
    show(surgery, 4)
    compare(model, wanted, images)


def show(surgery: Surgery, rows: int) -> None:
    """The table without all but the first rows."""
    lines = str(surgery).splitlines()
    left = len(surgery.replacements) - rows
    skipped = [f"… and {left} more"] if left > 0 else []
    print("\n".join([*lines[: 2 + rows], *skipped, *lines[2 + len(surgery.replacements) :]]))


def compare(model: nn.Module, wanted: Tensor, inputs: Tensor) -> None:
    with torch.no_grad():
        found = model(inputs)
    found = getattr(found, "logits", found)
    difference = float((found - wanted).norm() / wanted.norm())
    print(f"outputs before and after differ by {difference:.1e}, relative")
    assert difference < 1e-4


if __name__ == "__main__":
    torch.manual_seed(0)
    mixer()
    gpt2()
    vit()

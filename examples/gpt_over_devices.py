"""A small GPT on real text, cut over devices and sharded over data, saved and opened elsewhere.

    torchrun --nproc-per-node 4 examples/gpt_over_devices.py --tensor 2
    torchrun --nproc-per-node 2 examples/gpt_over_devices.py --tensor 2 --resume
    python examples/gpt_over_devices.py --quick

Attention is PyTorch's: query, key and value are cut column by column, the output row by row. MLPs
are gated ``MuMoEMLP`` blocks, cut along their hidden features by ``MuMoEParallel`` in the same
plan. ``fully_shard`` then shards parameters and batches over the other dimension of the mesh. All
numbers of processes see the same batches, so that they print the same losses. The checkpoint in
``out/`` is PyTorch's, with the optimizer in it: ``--resume`` goes on from it on any number of
processes. The first block is also written as the library's own file, which every framework opens.

Needs PyTorch (``pip install 'tensormoe[torch]'``).
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from _comparison.text import batches, load_text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tensormoe_torch import MuMoEMLP
from tensormoe_torch.parallel import MuMoEParallel

CHANNELS, HEADS, CONTEXT, BATCH, DEPTH = 32, 4, 32, 16, 2
OUT = Path("out")


class Attention(nn.Module):
    """Every token looks at itself and those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(CHANNELS, CHANNELS) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        # a device has some of the heads
        query, key, value = (
            each(x).unflatten(-1, (-1, CHANNELS // HEADS)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Layer(nn.Module):
    """Attention, then experts, each behind a norm and around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_experts = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attention = Attention()
        self.experts = MuMoEMLP(
            CHANNELS, 2 * CHANNELS, act_layer="silu", gated=True, experts=16, rank=32
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        made: Tensor = x + self.experts(self.norm_experts(x))
        return made


class GPT(nn.Module):
    """Ids (batch, T) and those that follow → the mean loss."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, CHANNELS)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, CHANNELS))
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, symbols)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.symbols(ids) + self.places[: ids.shape[-1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def spread(model: GPT, mesh: DeviceMesh) -> None:
    """Cut layers over one dimension of the mesh, and shard everything over the other."""
    plan = {
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(),
        "experts": MuMoEParallel(),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], plan)
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def clip(model: nn.Module, limit: float) -> None:
    """Clip the norm of all gradients; PyTorch's function takes those of one mesh at a time."""
    groups: dict[DeviceMesh, list[nn.Parameter]] = {}
    for each in model.parameters():
        groups.setdefault(each.device_mesh, []).append(each)
    norms = [
        nn.utils.get_total_norm([each.grad for each in group]).full_tensor()
        for group in groups.values()
    ]
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, limit, torch.stack(norms).norm())


def train(
    model: GPT, optimizer: torch.optim.Optimizer, data: Iterator[tuple[Tensor, Tensor]], steps: int
) -> None:
    """Every process of the data dimension takes its rows of each batch."""
    mesh = model.layers[0].experts.first.factors["input"].device_mesh["data"]
    for step in range(steps):
        ids, targets = (each.chunk(mesh.size())[mesh.get_local_rank()] for each in next(data))
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        clip(model, 1.0)
        optimizer.step()
        total = loss.detach() / mesh.size()
        dist.all_reduce(total, group=mesh.get_group())
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1:4}: loss {total.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small GPT cut over devices.")
    parser.add_argument("--tensor", type=int, default=1, help="devices that a layer is cut over")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in out/")
    parser.add_argument("--quick", action="store_true", help="ten steps")
    words = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() % words.tensor:
        parser.error(f"--tensor must divide the {dist.get_world_size()} processes")
    shape = dist.get_world_size() // words.tensor, words.tensor
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))

    text = load_text()
    torch.manual_seed(0)
    model = GPT(len(text.symbols))
    spread(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoint = OUT / "gpt_over_devices"
    if words.resume:
        found = get_state_dict(model, optimizer)
        state = {"model": found[0], "optimizer": found[1]}
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    data = batches(text, CONTEXT, BATCH, seed=int(words.resume))
    train(model, optimizer, data, 10 if words.quick else words.steps)

    OUT.mkdir(exist_ok=True)
    found = get_state_dict(model, optimizer)
    if dist.get_rank() == 0:
        # what another number of processes has saved there are other files
        shutil.rmtree(checkpoint, ignore_errors=True)
    dist.barrier()
    dcp.save({"model": found[0], "optimizer": found[1]}, checkpoint_id=checkpoint)
    model.layers[0].experts.save(OUT / "first_block.safetensors")
    if dist.get_rank() == 0:
        again = MuMoEMLP.load(OUT / "first_block.safetensors")
        print(f"saved {checkpoint.name}/ and a block of {again.num_parameters:,} parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

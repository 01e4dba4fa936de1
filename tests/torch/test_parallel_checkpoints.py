"""Cut layers under fully_shard, and checkpoints that open on other numbers of processes."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tensormoe_torch import MuMoE, MuMoEMLP, SparseMoE, _sharded
from tensormoe_torch.parallel import parallelize
from tests.torch._cut import assert_near, whole
from tests.torch._helpers import normal
from tests.torch._ranks import Ranks


class Model(nn.Module):
    """One of each kind; all legs are multiples of 2, 3 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MuMoEMLP(12, 24, experts=4, rank=12, gate="softmax", gated=True)
        self.experts = SparseMoE(12, 12, experts=4, top_k=2)
        self.norm = nn.LayerNorm(12)
        self.head = MuMoE(12, 12, 4, rank=12, gate="softmax")

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.norm(x + self.experts(x + self.block(x))))
        return made


def built() -> Model:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.1 * torch.randn(each.shape))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x) - x.flip(-1)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def entries(state: Any) -> dict[str, Tensor]:
    """Whole tensors of a nested state, by path."""
    if isinstance(state, dict):
        return {
            f"{key}.{name}": each
            for key, value in state.items()
            for name, each in entries(value).items()
        }
    return {"": whole(state).detach().clone()} if isinstance(state, Tensor) else {}


def save_on_all(rank: int, folder: Path) -> list[float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize(built(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x = normal(8, 12, dtype=torch.float32)
    for _ in range(3):
        step(model, optimizer, x)
    held = state(model, optimizer)
    dcp.save(held, checkpoint_id=folder / "all")
    found = entries(held)
    if rank == 0:
        torch.save(found, folder / "entries")
    return [step(model, optimizer, x) for _ in range(3)]


def open_on_some(rank: int, folder: Path, count: int, wanted: list[float]) -> None:
    """A model on the first processes goes on where the one on all of them was."""
    group = dist.new_group([*range(count)])
    if rank >= count:
        return
    mesh = DeviceMesh.from_group(group, "cpu")
    model = parallelize(built(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    held = state(model, optimizer)
    dcp.load(held, checkpoint_id=folder / "all", process_group=group)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=held["model"],
        optim_state_dict=held["optimizer"],
    )
    saved = torch.load(folder / "entries")
    found = entries(state(model, optimizer))
    assert found.keys() == saved.keys()
    for name, each in saved.items():
        assert torch.equal(found[name], each), name
    x = normal(8, 12, dtype=torch.float32)
    losses = [step(model, optimizer, x) for _ in range(3)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    # and as the library's own files, which whole layers open
    for name in ("block", "experts", "head"):
        part: Any = getattr(model, name)
        part.save(folder / name)
        again = type(part).load(folder / name)
        assert_near(again(x), part(x), name, tolerance=2e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_other_numbers_of_processes(four: Ranks, tmp_path: Path, count: int) -> None:
    wanted = four(save_on_all, tmp_path)[0]
    four(open_on_some, tmp_path, count, wanted)


def shard_both(rank: int, folder: Path) -> None:
    """Two dimensions: data in halves, layers cut in each half."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plain, model = built(), parallelize(built(), mesh["tensor"])
    for part in (model.block, model.experts, model.head):
        fully_shard(part, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    curves = []
    x = normal(8, 12, dtype=torch.float32)
    for each, rows in ((plain, x), (model, x.chunk(2)[mesh.get_local_rank("data")])):
        optimizer = torch.optim.AdamW(each.parameters(), 1e-2)
        losses = []
        for _ in range(6):
            loss = step(each, optimizer, rows)
            if each is model:
                total = torch.tensor(loss)
                dist.all_reduce(total, group=mesh.get_group("data"))
                loss = total.item() / 2
            losses.append(loss)
        curves.append(losses)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    for name, each in plain.named_parameters():
        assert_near(model.get_parameter(name), each.detach(), name, tolerance=1e-4)
    # of a slice, every process of the other dimension has a part again
    array: Any = model.block.second.factors["input"]
    assert array.to_local().numel() * 4 == array.numel()
    model.head.save(folder / "head")
    again = MuMoE.load(folder / "head")
    assert_near(again(x), plain.head(x).detach(), tolerance=1e-3)
    model.block.save(folder / "block")
    assert MuMoEMLP.load(folder / "block").config == plain.block.config
    held = state(model, optimizer)
    dcp.save(held, checkpoint_id=folder / "both")
    line = init_device_mesh("cpu", (4,))
    other = parallelize(built(), line)
    dcp.load({"model": other.state_dict()}, checkpoint_id=folder / "both")
    for name, each in model.named_parameters():
        assert torch.equal(whole(other.get_parameter(name)), whole(each)), name


def test_under_fully_shard(four: Ranks, tmp_path: Path) -> None:
    four(shard_both, tmp_path)


def clip(rank: int) -> None:
    """Norms of gradients are those of the whole layer's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    made = MuMoEMLP(12, 24, experts=4, rank=12, gate="softmax", gated=True)
    cut = parallelize(MuMoEMLP.restore(made.config, made.state_dict()), mesh)
    norms = []
    for each in (made, cut):
        F.mse_loss(each(torch.ones(3, 12)), torch.zeros(3, 12)).backward()
        norms.append(float(whole(nn.utils.clip_grad_norm_(each.parameters(), 0.1))))
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


def test_clipping(devices: Ranks) -> None:
    devices(clip)


def gather_one_by_one(rank: int, folder: Path) -> int:
    """The largest number of gathered tensors that are there at once."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = parallelize(MuMoEMLP(12, 24, experts=4, rank=12, gated=True), mesh)
    made: list[Any] = []
    most = 0
    gathered = _sharded.gathered

    def watched(*arguments: Any) -> Tensor:
        nonlocal most
        found = gathered(*arguments)
        made.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in made))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sharded, "gathered", watched)
        cut.save(folder / "block")
    assert len(made) == len([*cut.parameters()])
    return most


def test_files_are_gathered_array_by_array(devices: Ranks, tmp_path: Path) -> None:
    assert set(devices(gather_one_by_one, tmp_path)) == {1}


def fail_to_write(rank: int, folder: Path) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = parallelize(MuMoEMLP(12, 24, experts=4, rank=12), mesh)
    try:
        cut.save(folder / "missing" / "block" if rank == 0 else folder / "block")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_a_file_that_cannot_be_written(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(fail_to_write, tmp_path)
    assert first == second
    assert first.startswith("CheckpointError: the folder of a checkpoint must exist")

"""Experts spread over devices that have tokens of their own: rows travel to them and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from tensormoe_torch import MuMoE, SparseMoE
from tensormoe_torch.compression import FactorizedExperts
from tensormoe_torch.parallel import parallelize_experts
from tests._kinds import KINDS
from tests.torch._cut import assert_near, mesh, scaled, sent, spread_pair
from tests.torch._helpers import normal
from tests.torch._ranks import Ranks

SIZES = {"gate_proj": (6, 8), "up_proj": (6, 8), "gate_up_proj": (6, 16), "down_proj": (8, 6)}
ROLES = ("gate_proj up_proj down_proj", "gate_up_proj down_proj", "up_proj down_proj")


def halves(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def experts_like(kind: Any, roles: str, count: int, biases: bool) -> FactorizedExperts:
    """Experts of a compressed model."""
    options: dict[str, Any] = {"gate": None, "bias": not biases, "dtype": torch.float64}
    layers = {
        role: MuMoE(*SIZES[role], count, factorization=kind, **options) for role in roles.split()
    }
    more = {role: torch.ones(count, SIZES[role][1]).double() for role in layers} if biases else None
    act = halves if "gate_up_proj" in roles else F.silu
    made: FactorizedExperts = scaled(FactorizedExperts(layers, act, more))
    return made


def assert_alike(module: Any, cut: Any, call: Any, rows: list[int], *inputs: Tensor) -> None:
    """Outputs and gradients are one device's on the batches of all processes.

    Args:
        module: the whole one.
        cut: the other.
        call: from a module and inputs to the output.
        rows: tokens of each process.
        inputs: of all processes.
    """
    start, stop = sum(rows[: dist.get_rank()]), sum(rows[: dist.get_rank() + 1])
    results = []
    for each, part in ((module, slice(None)), (cut, slice(start, stop))):
        given = [one[part].clone() for one in inputs]
        floats = [one.requires_grad_() for one in given if one.dtype.is_floating_point]
        output = call(each, *given)
        weights = torch.arange(1.0, len(inputs[0]) + 1)[part, None].sin().to(output.dtype)
        sources = [*floats, *each.parameters()]
        grads = torch.autograd.grad((output * weights).sum(), sources, allow_unused=True)
        results.append((output.detach(), grads))
    (wanted, wanted_grads), (found, found_grads) = results
    assert_near(found, wanted[start:stop], "output")
    names = [*range(len(floats)), *dict(module.named_parameters())]
    for name, grad, other in zip(names, wanted_grads, found_grads, strict=True):
        if isinstance(name, int):
            grad = grad[start:stop]
        elif not isinstance(other, DTensor):
            # as data-parallel training does
            dist.all_reduce(other)
        assert_near(other, grad, str(name))


def compare_experts(rank: int, kind: Any, roles: str, biases: bool, sort: Any, case: Any) -> None:
    count, rows, index = case
    made, cut = spread_pair(experts_like(kind, roles, count, biases))
    if sort is not None:
        made._sorts = cut._sorts = lambda *_: sort
    chosen = torch.tensor(index, dtype=torch.long).reshape(sum(rows), 2)
    weights = normal(sum(rows), 2, seed=1)
    x = normal(sum(rows), 6)
    assert_alike(made, cut, lambda each, *given: each(*given), rows, x, chosen, weights)


@st.composite
def cases(draw: Any, devices: int) -> Any:
    """Experts, tokens of each process, and what they choose: of some experts alone, often."""
    count = devices * draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(0, 5), min_size=devices, max_size=devices))
    last = draw(st.integers(0, count - 1))
    size = 2 * sum(rows)
    return count, rows, draw(st.lists(st.integers(0, last), min_size=size, max_size=size))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_load(devices: Ranks, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    roles, biases = data.draw(st.sampled_from(ROLES)), data.draw(st.booleans())
    sort = data.draw(st.sampled_from([None, False, True]))
    case = data.draw(cases(devices.count))
    devices(compare_experts, kind, roles, biases, sort, case)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_factorizations(ranks: Ranks, kind: Any) -> None:
    for rows, index in (
        ([3, 2], [0, 3, 2, 1, 3, 1, 0, 1, 1, 2]),
        ([0, 2], [0, 1, 1, 0]),
        ([0, 0], []),
    ):
        ranks(compare_experts, kind, ROLES[0], False, True, (4, rows, index))


def mixtures() -> dict[str, Any]:
    options: dict[str, Any] = {"experts": 4, "top_k": 2, "dtype": torch.float64}
    return {
        "dense": SparseMoE(6, 8, **options),
        "CP": SparseMoE(6, 8, factorization="cp", rank=3, **options),
        "ring": SparseMoE(6, 8, factorization="tensor_ring", rank=(2, 2, 3), **options),
        "MLPs": SparseMoE(6, 8, kind="mlp", bias=True, **options),
        "linear": SparseMoE(6, out_features=8, kind="linear", **options),
        "shared": SparseMoE(6, 8, shared_features=16, mix_shared=True, **options),
        "merged": SparseMoE(6, 8, groups=(0, 3, 1, 2, 2, 0), **options),
    }


def compare_mixture(rank: int, name: str, folder: Path) -> None:
    made, cut = spread_pair(scaled(mixtures()[name]))
    for rows in ([3, 4], [0, 5]):
        assert_alike(made, cut, lambda each, x: each(x), rows, normal(sum(rows), 6))
    assert cut(normal(2, 3, 6)).shape == made(normal(2, 3, 6)).shape
    assert repr(cut) == repr(made)
    assert_near(copy.deepcopy(cut)(normal(3, 6)), made(normal(3, 6)))
    spread_out = [each for each in cut.parameters() if isinstance(each, DTensor)]
    assert spread_out
    for each in spread_out:
        assert each.placements[0] == Shard(0) or name in ("CP", "ring")
        assert each.to_local().numel() * mesh().size() == each.numel()
    # files are whole
    cut.save(folder / "mixture")
    again = SparseMoE.load(folder / "mixture").state_dict()
    assert all(torch.equal(again[key], each) for key, each in made.state_dict().items())
    _, other = spread_pair(scaled(mixtures()[name]))
    other.reset_parameters()
    other.load_state_dict(again)
    assert_near(other(normal(3, 6)), made(normal(3, 6)))
    dcp.save({"model": cut.state_dict()}, checkpoint_id=folder / "step")
    other.reset_parameters()
    dcp.load({"model": (state := other.state_dict())}, checkpoint_id=folder / "step")
    other.load_state_dict(state)
    assert_near(other(normal(3, 6)), made(normal(3, 6)))
    # and on another number of devices
    grid = init_device_mesh("cpu", (mesh().size(), 1), mesh_dim_names=("data", "expert"))
    alone = parallelize_experts(scaled(mixtures()[name]), grid["expert"])
    alone.reset_parameters()
    dcp.load({"model": (state := alone.state_dict())}, checkpoint_id=folder / "step")
    alone.load_state_dict(state)
    assert_near(alone(normal(3, 6)), made(normal(3, 6)))


@pytest.mark.parametrize("name", mixtures())
def test_mixtures(ranks: Ranks, name: str, tmp_path: Path) -> None:
    ranks(compare_mixture, name, tmp_path)


def count_sent(rank: int) -> None:
    """Counts and rows there, rows back; and of the backward pass, two."""
    _, cut = spread_pair(scaled(mixtures()["CP"]))
    x = normal(5, 6).requires_grad_()
    index = cut.route(x).top_k_index
    with sent() as calls:
        output = cut(x)
    own, size = int((index // 2 == rank).sum()), mesh().size()
    everywhere = torch.tensor([own])
    dist.all_reduce(everywhere)
    assert [kind for kind, _ in calls] == ["all-to-all"] * 3
    assert calls[0][1] == 4 * 8
    assert calls[1][1] == int(everywhere) * 6 * 8
    assert calls[2][1] == index.numel() * 6 * 8
    assert size * calls[1][1] != 0
    with CommDebugMode() as debug:
        output.sum().backward()
    assert debug.get_total_counts() == 2


def test_what_is_sent(ranks: Ranks) -> None:
    ranks(count_sent)

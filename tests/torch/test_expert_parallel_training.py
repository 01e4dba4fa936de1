"""Experts spread over devices in training; what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tensormoe import TopK
from tensormoe.errors import BackendError, SpecError
from tensormoe.gates import OneExpert
from tensormoe.routing import Router
from tensormoe_torch import CartesianMoE, MuMoE, SparseMoE, synchronize_gates
from tensormoe_torch.adapters import add_adapters
from tensormoe_torch.parallel import parallelize, parallelize_experts
from tests.torch._cut import assert_near, mesh, scaled, spread_pair, whole
from tests.torch._helpers import normal
from tests.torch._ranks import Ranks


def train_narrow(rank: int) -> None:
    """In bfloat16 and under autocast; recomputed in the backward pass."""
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        options: dict[str, Any] = {"factorization": "cp", "rank": 16, "dtype": dtype}
        made, cut = spread_pair(scaled(SparseMoE(16, 32, experts=4, top_k=2, **options)))
        x = normal(6, 16, seed=rank, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = checkpoint(cut, x, use_reentrant=False)
            wanted = made(x)
        assert output.dtype == wanted.dtype
        assert cut.route(x).logits.dtype == torch.float32
        assert_near(output.detach().float(), wanted.detach().float(), tolerance=0.02)
        output.float().square().sum().backward()
        assert all(each.grad.dtype == dtype for each in cut.parameters())


def test_narrow_dtypes(ranks: Ranks) -> None:
    ranks(train_narrow)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
        self.experts = SparseMoE(8, 8, experts=4, top_k=2, factorization="cp", rank=4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        made: Tensor = self.last(x + self.experts(x))
        return made


def train(rank: int) -> None:
    """Curves of data-parallel training, by hand, by DDP and by fully_shard, are one device's."""
    size = mesh().size()
    x, target = normal(20, 4 * size, 6).float(), normal(20, 4 * size, 2, seed=1).float()
    curves = []
    for way in ("one", "by hand", "DDP", "fully_shard"):
        model = copy.deepcopy(scaled(Model()))
        called: Any = model
        if way != "one":
            parallelize_experts(model, mesh())
        cut = {name: each for name, each in model.named_parameters() if isinstance(each, DTensor)}
        if way == "DDP":
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*cut])
            called = DistributedDataParallel(model)
        if way == "fully_shard":
            fully_shard(model, mesh=mesh(), ignored_params={*cut.values()})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        curve = []
        for batch, wanted in zip(x, target, strict=True):
            rows = slice(None) if way == "one" else slice(4 * rank, 4 * rank + 4)
            optimizer.zero_grad()
            F.mse_loss(called(batch[rows]), wanted[rows]).backward()
            for name, each in model.named_parameters() if way != "one" else ():
                if name in cut:
                    each.grad.div_(size)
                elif way == "by hand":
                    dist.all_reduce(each.grad)
                    each.grad.div_(size)
            optimizer.step()
            with torch.no_grad():
                curve.append(F.mse_loss(called(x[0]), target[0]).item())
        curves.append(curve)
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-4, atol=0.0)


def test_training(ranks: Ranks) -> None:
    ranks(train)


def balance(rank: int) -> None:
    """The load of all processes, where gates are synchronized."""
    size = mesh().size()
    router = Router("sigmoid", balance=0.01)
    made, cut = spread_pair(scaled(SparseMoE(8, 8, experts=4, top_k=2, router=router)))
    x = normal(3 * size, 8).float()
    synchronize_gates(cut)(x[: 2 * size] if rank else x[2 * size :])
    other = x if size == 2 else torch.cat([x[2 * size :], *[x[: 2 * size]] * (size - 1)])
    made(other)
    assert torch.equal(cut.router.choice_bias, made.router.choice_bias)
    assert cut.router.choice_bias.any()


def test_balance(ranks: Ranks) -> None:
    ranks(balance)


def compiled(rank: int) -> None:
    """Exchanges run between compiled parts; one graph is refused."""
    made, cut = spread_pair(scaled(SparseMoE(8, 8, experts=4, top_k=2)))
    x = normal(5, 8, seed=rank).float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*autograd.function.Function'> should not")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        output = torch.compile(cut, backend="aot_eager")(x)
        assert_near(output, made(x), tolerance=1e-5)
        sources = [*cut.parameters()]
        wanted = torch.autograd.grad(cut(x).square().sum(), sources)
        for grad, other in zip(
            torch.autograd.grad(output.square().sum(), sources), wanted, strict=True
        ):
            assert_near(grad, whole(other), tolerance=1e-5)
        torch.compiler.reset()
        with pytest.raises(Exception, match="disable"):
            torch.compile(cut, backend="aot_eager", fullgraph=True)(x)


def test_compiled(ranks: Ranks) -> None:
    ranks(compiled)


def start_on_meta(rank: int) -> None:
    with torch.device("meta"):
        cut = SparseMoE(8, 8, experts=4, top_k=2, factorization="cp", rank=4, bias=True)
    parallelize_experts(cut, mesh()).to_empty(device="cpu")
    plain = SparseMoE.of(cut.config)
    for each in (cut, plain):
        torch.manual_seed(0)
        each.reset_parameters()
    x = normal(3, 8, seed=rank).float()
    assert_near(cut(x), plain(x), tolerance=1e-5)
    # values are those of the first process
    scaled(plain)
    with torch.no_grad():
        for each in plain.experts.parameters():
            each.mul_(1 + rank)
    assert_near(
        parallelize_experts(plain, mesh())(x), scaled(SparseMoE.of(cut.config))(x), tolerance=1e-5
    )


def test_initial_values(ranks: Ranks) -> None:
    ranks(start_on_meta)


def refuse(rank: int) -> None:
    def sparse(**options: Any) -> SparseMoE:
        return SparseMoE(8, 8, **({"experts": 4, "top_k": 2} | options))

    twice, legs, tied = sparse(), parallelize(sparse(), mesh()), sparse()
    parallelize_experts(twice, mesh())
    tied.experts.gate_up_proj.factors["expert"] = nn.Parameter(torch.ones(1))
    cases: list[tuple[nn.Module, str]] = [
        (nn.Linear(2, 2), "must have a SparseMoE or .*; got a Linear without"),
        (MuMoE(4, 4, 2, rank=2), "got a MuMoE without"),
        (sparse(experts=5), "experts must be a multiple of the 2 devices; got 5"),
        (sparse(router=Router(capacity=1.0)), "must have no capacity .*; got 1.0 in SparseMoE"),
        (nn.Sequential(sparse(), CartesianMoE(6, 8, experts=4, top_k=2)), "CartesianMoE at '1'"),
        (twice, "must be whole to be cut"),
        (legs, "must be whole to be cut"),
        (tied, "must have its own parameters alone"),
    ]
    for module, message in cases:
        before = [type(each) for each in module.parameters()]
        with pytest.raises(SpecError, match=message):
            parallelize_experts(module, mesh())
        assert [type(each) for each in module.parameters()] == before
    with pytest.raises(SpecError, match="must be whole to be cut"):
        parallelize(twice, mesh())
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module"):
        parallelize_experts(2, mesh())  # type: ignore[type-var]
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh"):
        parallelize_experts(sparse(), 2)  # type: ignore[arg-type]
    experts, x = twice.experts, torch.ones(3, 8)
    ids = torch.zeros(3, dtype=torch.long)
    calls = (
        lambda: experts[0](x),
        lambda: experts.every(x),
        lambda: experts.down_proj(x, OneExpert(ids)),
        lambda: experts.down_proj(x, TopK(ids[:, None], torch.ones(3, 1))),
        lambda: experts.down_proj(x, torch.ones(3, 4)),
    )
    for call in calls:
        with pytest.raises(SpecError, match="must be called together"):
            call()
    with pytest.raises(BackendError, match="must run eagerly"):
        torch.export.export(twice, (x,))
    adapted = parallelize_experts(sparse(factorization="cp", rank=4), mesh())
    add_adapters(adapted, rank=2)
    with pytest.raises(SpecError, match="got a ResidualExperts for 'gate_up_proj'"):
        adapted(x)
    with pytest.raises(SpecError, match="must have their own projections"):
        parallelize_experts(adapted, mesh())
    placed = DTensor.from_local(x, mesh(), [Replicate()])
    with pytest.raises(BackendError, match="must be plain tensors"):
        experts(placed, ids[:, None], torch.ones(3, 1))


def test_what_cannot_be_spread(ranks: Ranks) -> None:
    ranks(refuse)

"""Batch norm of gates over processes: as one process with the whole batch, gradients too."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensormoe import Gate
from tensormoe.errors import GateError
from tensormoe.routing import Router
from tensormoe_torch import MuMoE, MuMoEMLP, SparseMoE, synchronize_gates
from tests.torch._helpers import normal, randomize, traced
from tests.torch._ranks import Ranks

# of eight rows, how many the first process has
SPLITS = (4, 7, 8)


def build() -> Any:
    gate = Gate(normalization="batch", bias=True)
    sizes = {"experts": (3, 2), "rank": 4, "dtype": torch.float64}
    return randomize(nn.Sequential(MuMoE(6, 5, gate=gate, **sizes))).train()


def run(model: nn.Module, x: Tensor, sums: bool = False) -> dict[str, Tensor]:
    """Output, gradients and statistics of a call."""
    x = x.clone().requires_grad_()
    y = model(x)
    loss = (y * torch.arange(5.0)).sin().sum()
    found = torch.autograd.grad(loss, [x, *model.parameters()], create_graph=True)
    gradients = dict(zip(["x", *dict(model.named_parameters())], found, strict=True))
    (gradients["twice"],) = torch.autograd.grad((found[0] ** 2).sum(), x)
    if sums:
        for name in sorted(gradients.keys() - {"x", "twice"}):
            gradients[name] = gradients[name].detach().clone()
            torch.distributed.all_reduce(gradients[name])
    return {"y": y, **gradients, **dict(model.named_buffers())}


def compare(rank: int) -> None:
    wanted = run(build(), x := normal(8, 6))
    for split, way in product(SPLITS, (nullcontext, traced)):
        mine = slice(0, split) if rank == 0 else slice(split, 8)
        model = synchronize_gates(build())
        with way():
            found = run(model, x[mine], sums=True)
        for name, array in wanted.items():
            here = array[mine] if name in ("x", "y", "twice") else array
            torch.testing.assert_close(found[name], here, rtol=1e-9, atol=1e-9)


def test_like_one_process(ranks: Ranks) -> None:
    ranks(compare)


def apart(rank: int) -> float:
    """Without synchronization, each process by itself."""
    x = normal(8, 6)[4 * rank : 4 * rank + 4]
    model, alone = DistributedDataParallel(build()), build()
    # a group of one process is alone too
    lonely = synchronize_gates(build(), [torch.distributed.new_group([k]) for k in (0, 1)][rank])
    assert torch.equal(model(x), alone(x))
    assert torch.equal(lonely(x), build()(x))
    synchronized = DistributedDataParallel(synchronize_gates(build()))
    assert not torch.allclose(synchronized(x), alone(x))
    # evaluation needs no communication
    if rank == 0:
        synchronized.module.eval()(x)
    return float(model.module[0].gate.running_mean_0[0])


def test_apart_by_default(ranks: Ranks) -> None:
    first, second = ranks(apart)
    assert first != second


def too_few(rank: int) -> str:
    model = synchronize_gates(build())
    with pytest.raises(GateError, match="at least 2 tokens; got 1") as caught:
        model(normal(1 - rank, 6))
    return str(caught.value)


def test_two_tokens_in_all_are_needed(ranks: Ranks) -> None:
    ranks(too_few)


def compiled(rank: int) -> None:
    x = normal(8, 6)[4 * rank : 4 * rank + 4]
    model = synchronize_gates(MuMoE(6, 5, 3, rank=2, gate=Gate("softmax", normalization="batch")))
    model = randomize(model.double()).gate
    fast = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        # the compiler makes an instance of every function that it meets, which PyTorch deprecates
        warnings.filterwarnings("ignore", "<class 'torch.autograd.function.Function'> should not")
        for each in (model, fast):
            each(x)[0].square().sum().backward()
    torch.testing.assert_close(fast(x), model(x))
    for (name, a), b in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_compiled(ranks: Ranks) -> None:
    ranks(compiled)


def balanced(rank: int) -> None:
    gate, x = Gate("top_k", k=2, balance=0.01), normal(8, 6)
    whole, *others = (
        randomize(MuMoE(6, 5, 5, rank=2, gate=gate, dtype=torch.float64)).train()
        for _ in range(1 + len(SPLITS))
    )
    before = whole.gate.choice_bias_0.clone()
    whole(x)
    assert not torch.equal(whole.gate.choice_bias_0, before)
    for split, layer in zip(SPLITS, others, strict=True):
        synchronize_gates(layer)(x[:split] if rank == 0 else x[split:])
        assert torch.equal(layer.gate.choice_bias_0, whole.gate.choice_bias_0)


def test_biases_move_by_the_load_of_all_processes(ranks: Ranks) -> None:
    ranks(balanced)


def routed(rank: int) -> None:
    router, x = Router("sigmoid", balance=0.01), normal(8, 6)
    options = {"experts": 5, "top_k": 2, "kind": "linear", "router": router}
    whole, alone, *others = (
        randomize(SparseMoE(6, **options, dtype=torch.float64)).train()
        for _ in range(2 + len(SPLITS))
    )
    whole(x)
    alone(x[:4] if rank == 0 else x[4:])
    assert not torch.equal(alone.router.choice_bias, whole.router.choice_bias)
    for split, layer in zip(SPLITS, others, strict=True):
        synchronize_gates(layer)(x[:split] if rank == 0 else x[split:])
        assert torch.equal(layer.router.choice_bias, whole.router.choice_bias)
    others[0].eval()(x[:rank])


def test_routers_too(ranks: Ranks) -> None:
    ranks(routed)


def test_only_batch_norms_are_synchronized() -> None:
    block = MuMoEMLP(6, 7, experts=3, rank=2, gate=Gate(normalization="batch"))
    model = nn.ModuleList([build(), MuMoE(6, 5, experts=3, rank=2), nn.BatchNorm1d(3), block])
    assert synchronize_gates(model) is model
    assert model[0][0].gate.synchronized
    assert block.gate.synchronized
    assert not model[1].gate.synchronized
    # without a process group, as usual
    assert torch.equal(model[0](normal(8, 6)), build()(normal(8, 6)))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got list"):
        synchronize_gates([model])  # type: ignore[type-var]

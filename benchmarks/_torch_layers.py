"""The layer on PyTorch, its products, and the direct formulation, for several benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _shared import Call
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from tensormoe import CP, select_rank
from tensormoe.errors import BudgetError
from tensormoe_torch import MuMoE, TorchBackend

Operands = list[tuple[Tensor, Tensor]]


def trained(
    name: str,
    experts: int,
    features: int,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[MuMoE, Any] | None:
    """A layer within the budget whose gate tells inputs apart, as after training, and its rank."""
    bonds = None if name == "cp" else (4, 4, None)
    try:
        rank = select_rank(name, features, features, experts, bonds=bonds)
    except BudgetError:
        return None
    layer = MuMoE(features, features, experts, name, rank=rank, device=device, dtype=dtype)
    assert layer.gate is not None
    with torch.no_grad():
        layer.gate.projection_0.normal_(0.0, features**-0.5)
    return layer, rank


def recorded(call: Call) -> Operands:
    """The operands of all matrix products that layers run in a call."""
    operands: Operands = []
    run = TorchBackend.matmul

    def record(self: TorchBackend, left: Tensor, right: Tensor) -> Tensor:
        operands.append((left.detach(), right.detach()))
        return run(self, left, right)

    TorchBackend.matmul = record  # type: ignore[method-assign]
    try:
        call()
    finally:
        TorchBackend.matmul = run  # type: ignore[method-assign]
    return operands


def plain_products(operands: Operands) -> Call:
    """The products by PyTorch."""

    def run() -> None:
        for left, right in operands:
            torch.matmul(left, right)

    return run


def products_of(layer: MuMoE, x: Tensor) -> tuple[Call, Call]:
    """The matrix products of one call on the operands it had: by PyTorch, and as the layer does."""
    with torch.no_grad():
        operands = recorded(lambda: layer(x))
    own = TorchBackend(eager=True)

    def ours() -> None:
        for left, right in operands:
            own.matmul(left, right)

    return plain_products(operands), ours


def direct(layer: MuMoE, x: Tensor) -> Callable[[], Tensor]:
    """The formulation of the paper's appendix, written with einsum."""
    from entmax import entmax15

    factors: Any = layer.factors
    assert layer.gate is not None
    projection, gate = layer.gate.projection_0, layer.gate.gate
    cp = isinstance(layer.spec.factorization, CP)
    equation = "bn,nr,bi,ir,or->bo" if cp else "bn,npq,bi,iqs,osp->bo"
    joined = torch.cat([factors["input"], factors["bias"][None]]).detach().requires_grad_()
    experts = projection.shape[1]
    spread = gate.spread_of(experts)

    def run() -> Tensor:
        logits = (x @ projection).float()
        weights = entmax15(spread * layer_norm(logits, (experts,), eps=gate.eps), dim=-1)
        extended = torch.cat([x, x.new_ones(len(x), 1)], dim=-1)
        output: Tensor = torch.einsum(
            equation,
            weights.to(x.dtype),
            factors["expert_0"],
            extended,
            joined,
            factors["output"],
        )
        return output

    return run


def stepped(call: Callable[[], Tensor], layer: nn.Module, x: Tensor) -> Call:
    """Forward and backward, with new gradients every time; outputs are as wide as inputs."""
    cotangent = torch.randn_like(x)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        call().backward(cotangent)

    return run

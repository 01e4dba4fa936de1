"""Modules that the benchmark against peers needs and no package has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe_torch._products import product

FEATURES, HIDDEN = 768, 3072


class DenseMoE(nn.Module):
    """Softmax over N linear experts, all of which run as one product; einsum mixes the results."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, experts, bias=False)
        # expert and output as one axis: a third one would have einsum copy weights or gradients
        self.weight = nn.Parameter(weights(experts * FEATURES, FEATURES))
        self.bias = nn.Parameter(torch.zeros(experts, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.gate(x).softmax(dim=-1)
        every = F.linear(x, self.weight).unflatten(1, self.bias.shape)
        return torch.einsum("bn,bno->bo", coefficients, every) + coefficients @ self.bias


class DenseMLPMoE(nn.Module):
    """Softmax over N two-layer experts, all of which run; they are mixed before the second sum."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, experts, bias=False)
        self.first = nn.Linear(FEATURES, experts * HIDDEN)
        self.second = nn.Parameter(weights(FEATURES, experts * HIDDEN))
        self.second_bias = nn.Parameter(torch.zeros(experts, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        coefficients = self.gate(x).softmax(dim=-1)
        hidden = F.gelu(self.first(x)).unflatten(1, (-1, HIDDEN))
        mixed = torch.einsum("bn,bnh->bnh", coefficients, hidden).flatten(1)
        return F.linear(mixed, self.second) + coefficients @ self.second_bias


class GroupedLinear(nn.Module):
    """Linear experts for packages that hand over tokens as (expert, token, in)."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights(experts, FEATURES, FEATURES))
        self.bias = nn.Parameter(torch.zeros(experts, 1, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class OneSequence(nn.Module):
    """A package's layer for sequences, given all tokens as one sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        result = self.layer(x[None])
        if isinstance(result, Tensor):
            return result[0]
        return result[0][0], result[1]


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` on the products that our layers use, to tell the design from the library."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Product.apply(x, self.weight, self.bias)
        return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t()).add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return product(gradient, weight), product(gradient.t(), x), gradient.sum(dim=0)


def weights(*shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1).mul_(FEATURES**-0.5)

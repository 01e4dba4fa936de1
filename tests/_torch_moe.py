"""Small sparse models, and dense experts rebuilt from factors in the place of their own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe.testing import reconstruct
from tensormoe_torch import MuMoE
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import family

STACKED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"]
"""Families of transformers whose experts are stacks."""

TOKENS = torch.arange(24).reshape(2, 12)


def sparse(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model of a family; in double precision, rounding changes no router's choice."""
    model = family(name).to(dtype)
    # the way of running experts that takes double precision
    model.set_experts_implementation("eager")
    return model


class Expert(nn.Module):
    """As older code has them; Mixtral's names and no activation of its own, or LLaMA's names."""

    def __init__(
        self, names: tuple[str, str, str] = ("w1", "w3", "w2"), bias: bool = False, hidden: int = 8
    ) -> None:
        super().__init__()
        self.names = names
        gate, up, down = names
        self.add_module(gate, nn.Linear(6, hidden, bias=bias))
        self.add_module(up, nn.Linear(6, hidden, bias=bias))
        self.add_module(down, nn.Linear(hidden, 6, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        result: Tensor = down(F.silu(gate(x)) * up(x))
        return result


class Plain(nn.Module):
    """An expert without a gate, with an activation as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.act = nn.Linear(6, 8), nn.Linear(8, 6), nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return result


class OneByOne(nn.Module):
    """A router that calls the experts that are chosen, one after the other, as Mixtral's did."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Linear(6, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(rows)
        for place in range(len(self.experts)):
            token, k = torch.where(chosen == place)
            found = self.experts[place](rows[token]) * weights[token, k, None]
            result = result.index_add(0, token, found)
        return result.reshape(x.shape)


def dense(layer: MuMoE) -> tuple[Tensor, Tensor | None]:
    """(experts, in, out) and biases of a layer's factors, by TensorLy."""
    arrays = {name: each.detach().double().cpu().numpy() for name, each in layer.factors.items()}
    whole = torch.tensor(np.array(reconstruct(layer.spec.factorization, arrays)))
    return (whole[:, :-1], whole[:, -1]) if layer.spec.bias else (whole, None)


@torch.no_grad()
def rebuilt(original: nn.Module, compressed: nn.Module) -> nn.Module:
    """A copy of the original model with what the factors of the other stand for."""
    model = copy.deepcopy(original)
    for name, module in compressed.named_modules():
        if isinstance(module, FactorizedExperts):
            old = model.get_submodule(name)
            (_fill_list if isinstance(old, nn.ModuleList) else _fill_stack)(old, module)
    return model


def _fill_stack(old: Any, new: FactorizedExperts) -> None:
    assert new.gate_proj is not None
    first = torch.cat([dense(each)[0] for each in (new.gate_proj, new.up_proj)], dim=-1)
    old.gate_up_proj.copy_(first.transpose(1, 2))
    old.down_proj.copy_(dense(new.down_proj)[0].transpose(1, 2))


def _fill_list(old: nn.ModuleList, new: FactorizedExperts) -> None:
    layers = [each for each in (new.gate_proj, new.up_proj, new.down_proj) if each is not None]
    for role, layer in enumerate(layers):
        weights, biases = dense(layer)
        for place, expert in enumerate(old):
            # in the order in which the experts above make them
            linear = [each for each in expert.children() if isinstance(each, nn.Linear)][role]
            linear.weight.copy_(weights[place].T)
            if biases is not None:
                linear.bias.copy_(biases[place])


class Stored(nn.Module):
    """Stacks of experts as transformers' classes may hold them, run by one matrix at a time."""

    def __init__(self, transposed: bool, turns: bool, bias: bool, gated: bool) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated, self.gated = transposed, not turns, gated
        first = "gate_up_proj" if gated else "up_proj"
        width = 16 if gated else 8
        for name, rows, columns in ((first, 6, width), ("down_proj", 8, 6)):
            shape = (4, rows, columns) if transposed else (4, columns, rows)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, columns)))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for token, x in enumerate(hidden_states):
            for n, w in zip(top_k_index[token], top_k_weights[token], strict=True):
                result[token] += w * self._project("down_proj", n, self._hidden(n, x))
        return result

    def _hidden(self, n: Tensor, x: Tensor) -> Tensor:
        if not self.gated:
            return F.silu(self._project("up_proj", n, x))
        whole = self._project("gate_up_proj", n, x)
        gate, up = whole.chunk(2) if self.is_concatenated else (whole[::2], whole[1::2])
        return F.silu(gate) * up

    def _project(self, name: str, n: Tensor, x: Tensor) -> Tensor:
        weight, bias = getattr(self, name)[n], getattr(self, f"{name}_bias", None)
        found: Tensor = x @ (weight if self.is_transposed else weight.T)
        return found if bias is None else found + bias[n]

"""Dense experts of other code: their weights as stacks, and what they compute, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensormoe.mixtures import gated, hidden_units
from tensormoe_torch._activations import halves
from tensormoe_torch.compression._experts import Activation
from tensormoe_torch.compression._gate import Own

ROLES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of an expert, in the order in which reports have them."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One projection of all experts; views of the model's own weights.

    Args:
        weights: (experts, in, out), or a matrix (in, out) per expert.
        biases: (experts, out), or a row per expert; None without any.
    """

    weights: Tensor | tuple[Tensor, ...]
    biases: Tensor | tuple[Tensor, ...] | None

    @property
    def sizes(self) -> tuple[int, int]:
        """In and out."""
        first = self.weights[0]
        return first.shape[0], first.shape[1]

    def part(self, columns: slice) -> Stack:
        """Some of the outputs, of one stack of all experts; views."""
        assert isinstance(self.weights, Tensor)
        biases = None if self.biases is None else self.biases[:, columns]  # type: ignore[call-overload]
        return Stack(self.weights[..., columns], biases)

    def first(self, dtype: torch.dtype) -> Stack:
        """The first expert alone, on the CPU."""
        biases = None if self.biases is None else (self.biases[0].to("cpu", dtype),)
        return Stack((self.weights[0].to("cpu", dtype),), biases)

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weights and biases as one tensor each, which is a copy where they were several."""
        found = [
            torch.stack(each) if isinstance(each, tuple) else each
            for each in (self.weights, self.biases)
            if each is not None
        ]
        return found[0], found[1] if len(found) > 1 else None

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        """One expert's output per row: x (rows, in) and index (rows,) → (rows, out)."""
        found = x.new_empty(x.shape[0], self.sizes[1])
        for place in index.unique().tolist():
            chosen = index == place
            rows = x[chosen] @ self.weights[place]
            found[chosen] = rows if self.biases is None else rows + self.biases[place]
        return found


@dataclass(frozen=True, eq=False)
class DenseExperts:
    """The experts of one layer of a model.

    Args:
        name: of the module in the model.
        module: it.
        together: whether the model calls them at once, with indices and weights, or one by one.
        act: the activation.
        stacks: the projections by role.
        groups: the expert behind each of the router's, where they were merged before.
        joined: whether gate and up projection, two stacks, are decomposed side by side as one.
    """

    name: str
    module: nn.Module
    together: bool
    act: Activation
    stacks: Mapping[str, Stack]
    groups: Tensor | None = None
    joined: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """Projections that are decomposed, in the order of reports."""
        if self.joined:
            return "gate_up_proj", "down_proj"
        return tuple(role for role in ROLES if role in self.stacks)

    @property
    def new_act(self) -> Activation:
        """The activation between the layers that take the place of the experts."""
        return gated(self.act, halves) if self.joined else self.act

    @property
    def count(self) -> int:
        """N."""
        return len(self.stacks["down_proj"].weights)

    @property
    def routes(self) -> int:
        """Number of experts that the router has: more than N where some were merged."""
        return self.count if self.groups is None else len(self.groups)

    @property
    def keeps_biases(self) -> bool:
        """Whether biases are added to the outputs of factors, and are no part of them.

        Those of gate and up projection as one would be a row of a matrix twice as wide.
        """
        return isinstance(self.act, Own)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.stacks["down_proj"].weights[0].dtype

    def own_sizes(self, role: str) -> tuple[int, int, bool]:
        """In, out, and whether factors replace biases of a projection."""
        parts = [self.stacks[each] for each in self._parts(role)]
        rows, columns = parts[0].sizes[0], sum(each.sizes[1] for each in parts)
        biases = any(each.biases is not None for each in parts)
        return rows, columns, biases and not self.keeps_biases

    def decomposed(self, role: str) -> tuple[Tensor, Tensor | None]:
        """Weights (experts, in, out) of a projection, and the biases that factors replace."""
        found = [self.stacks[each].tensors() for each in self._parts(role)]
        weights, biases = found[0]
        if len(found) > 1:
            weights = torch.cat([each for each, _ in found], dim=-1)
            if any(each is not None for _, each in found):
                # of a list of experts, one of both may have none
                rows = [w[:, 0] * 0 if row is None else row for w, row in found]
                biases = torch.cat(rows, dim=-1)
        return weights, None if self.keeps_biases else biases

    def _parts(self, role: str) -> tuple[str, ...]:
        """The stacks that make a projection."""
        return (role,) if role in self.stacks else ("gate_proj", "up_proj")

    def parameters_of(self, count: int) -> tuple[int, int]:
        """Entries of all experts, and of ``count`` of them."""
        sizes = [(*each.sizes, each.biases is not None) for each in self.stacks.values()]
        one = sum((rows + bias) * columns for rows, columns, bias in sizes)
        return self.count * one, count * one

    def hidden(self, x: Tensor, index: Tensor) -> Tensor:
        """Inputs of the down projection: (rows, in) and (rows,) → (rows, hidden)."""

        def project(role: str, rows: Tensor) -> Tensor:
            return self.stacks[role].routed(rows, index)

        units: Tensor = hidden_units(self.stacks, project, self.act, x)
        return units

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        """One expert's output per row: (rows, in) and (rows,) → (rows, out)."""
        return self.stacks["down_proj"].routed(self.hidden(x, index), index)


def one_by_one(routed: Callable[[Tensor, Tensor], Tensor], x: Tensor, index: Tensor) -> Tensor:
    """Outputs (tokens, k, out) of a function of rows, for x (tokens, in) and index (tokens, k)."""
    tokens, count = index.shape
    rows = x.repeat_interleave(count, dim=0)
    return torch.unflatten(routed(rows, index.reshape(-1)), 0, (tokens, count))

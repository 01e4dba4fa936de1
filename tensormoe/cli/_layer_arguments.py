"""Arguments that ``rank`` and ``plan`` share: sizes, gate, batch and device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from tensormoe._format import format_experts
from tensormoe.choosing._words import parse_budget, parse_experts, parse_size
from tensormoe.cli._profile import resolve_device
from tensormoe.gates import Gate
from tensormoe.planning import Cost, Roofline, gate_cost
from tensormoe.selection import Budget

__all__ = ["LayerArguments"]


@dataclass(frozen=True)
class LayerArguments:
    """The checked arguments of a layer.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        experts: one size per level.
        bias: whether every expert has a bias.
        batch: inputs of a call.
        gate: of the layer; None for one that is given its coefficients.
        gate_in_budget: whether a budget covers the gate.
        top_k: experts per token, if any are asked for.
        device: whose times are predicted.
    """

    in_features: int
    out_features: int
    experts: tuple[int, ...]
    bias: bool
    batch: int
    gate: Gate | None
    gate_in_budget: bool
    top_k: int | None
    device: Roofline

    @classmethod
    def parse(cls, arguments: argparse.Namespace, gate: str = "entmax") -> LayerArguments:
        """Check the words of a command.

        Args:
            arguments: as the parser left them.
            gate: the one that is taken if none is named.

        Raises:
            SpecError: a size that can't be, or an unknown device.
            GateError: an unknown gate.
        """
        top_k = None if arguments.top_k is None else parse_size(arguments.top_k, "--top-k")
        experts = parse_experts(arguments.experts)
        name = (arguments.gate or gate).replace("-", "_")
        found = None
        if name != "none":
            kept = min(top_k or 2, *experts) if name in ("top_k", "relu_top_k") else None
            found = Gate(name, k=kept)
        return cls(
            parse_size(arguments.in_features, "in_features"),
            parse_size(arguments.out_features, "out_features"),
            experts,
            arguments.bias,
            parse_size(arguments.batch, "--batch"),
            found,
            not arguments.gate_on_top,
            top_k,
            resolve_device(arguments.device),
        )

    def to_dict(self) -> dict[str, Any]:
        """The arguments in plain values."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "experts": list(self.experts),
            "bias": self.bias,
            "batch": self.batch,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "gate_in_budget": self.gate_in_budget,
            "device": self.device.to_dict(),
        }

    @property
    def gate_cost(self) -> Cost:
        """The cost of the gate alone."""
        return gate_cost(self.gate, self.in_features, self.experts, self.batch)

    def budget(self, text: str | None, hidden: int) -> Budget:
        """The budget that ``--budget`` stands for, with the gate or without.

        Raises:
            BudgetError: words that cannot be read.
        """
        sizes = (self.in_features, hidden, self.out_features)
        if text is None:
            # as layers without one: the linear layer's parameters, and the gate on top
            return replace(Budget.parse(None, *sizes[::2], self.bias), batch=self.batch)
        like = {
            "linear": Budget.like_linear(*sizes[::2], self.bias),
            "mlp": Budget.like_mlp(*sizes, self.bias),
        }
        found = parse_budget(text, like, self.batch, self.device)
        return replace(found, gate=self.gate_in_budget)

    @property
    def num_experts(self) -> str:
        """The experts for a title: ``128`` or ``16 × 8``."""
        return format_experts(self.experts)

"""What ``rank`` and ``plan`` are both asked about: sizes, gate, batch and device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from tensormoe.cli._profile import resolve_device
from tensormoe.cli._values import parse_experts, parse_size
from tensormoe.gates import Gate
from tensormoe.planning import Roofline

__all__ = ["LayerArguments"]


@dataclass(frozen=True)
class LayerArguments:
    """The checked arguments of a layer.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        experts: one size a level.
        bias: whether every expert has a bias.
        batch: inputs of a call.
        gate: counted along if given.
        top_k: experts a token, if any are asked for.
        device: whose times are predicted.
    """

    in_features: int
    out_features: int
    experts: tuple[int, ...]
    bias: bool
    batch: int
    gate: Gate | None
    top_k: int | None
    device: Roofline

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> LayerArguments:
        """Check the words of a command.

        Raises:
            SpecError: a size that can't be, or an unknown device.
            GateError: an unknown gate.
        """
        top_k = None if arguments.top_k is None else parse_size(arguments.top_k, "--top-k")
        experts = parse_experts(arguments.experts)
        gate = None
        if arguments.gate not in (None, "none"):
            name = arguments.gate.replace("-", "_")
            gate = Gate(name, k=min(top_k or 2, *experts)) if name == "top_k" else Gate(name)
        return cls(
            parse_size(arguments.in_features, "in_features"),
            parse_size(arguments.out_features, "out_features"),
            experts,
            arguments.bias,
            parse_size(arguments.batch, "--batch"),
            gate,
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
            "device": self.device.to_dict(),
        }

    @property
    def num_experts(self) -> str:
        """The experts for a title: ``128`` or ``16 × 8``."""
        return " × ".join(map(str, self.experts))

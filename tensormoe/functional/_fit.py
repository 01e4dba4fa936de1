"""Fit of a layer to the weights that it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from tensormoe._config import LayerConfig
from tensormoe._format import format_share
from tensormoe._html import text_html


@dataclass(frozen=True)
class Fit:
    """Fit of a mixture of experts to a linear layer, or to a block of them.

    Args:
        error: Frobenius norm of what the experts' common matrix lacks, bias included, relative to
            the norm of the original; over all layers of a block together.
        norm: the Frobenius norm of the original.
        parameters_before: entries of the original.
        parameters_after: entries of the mixture, its gate included.
        expert_rank: the highest rank that an expert's matrix can have; a block's smallest.
        expert_span: how many independent matrices the experts can be; a block's smallest.
        noise: how far experts were moved from their common matrix, relative to it.
        parts: one fit a layer, for a block.

    >>> print(Fit(0.03, 10.0, 4160, 4672, 24, 8, 0.1))
    weights off by 3.0%, experts apart by 10.0%; 4,160 → 4,672 parameters; expert rank 24, span 8
    """

    error: float
    norm: float
    parameters_before: int
    parameters_after: int
    expert_rank: int
    expert_span: int
    noise: float = 0.0
    parts: tuple[Fit, ...] = ()

    @classmethod
    def of_layer(
        cls, config: LayerConfig, error: float, norm: float, before: int, noise: float
    ) -> Fit:
        """The fit of one layer."""
        spec = config.spec
        after = config.num_parameters
        return cls(error, norm, before, after, spec.expert_rank, spec.expert_span, noise)

    @classmethod
    def of_block(cls, *parts: Fit) -> Fit:
        """The fit of layers together."""
        norm = hypot(*(part.norm for part in parts))
        missing = hypot(*(part.error * part.norm for part in parts))
        return cls(
            missing / norm if norm else 0.0,
            norm,
            sum(part.parameters_before for part in parts),
            sum(part.parameters_after for part in parts),
            min(part.expert_rank for part in parts),
            min(part.expert_span for part in parts),
            max(part.noise for part in parts),
            parts,
        )

    def __str__(self) -> str:
        apart = f", experts apart by {format_share(self.noise)}" if self.noise else ""
        lines = [
            f"weights off by {format_share(self.error)}{apart}; "
            f"{self.parameters_before:,} → {self.parameters_after:,} parameters; "
            f"expert rank {self.expert_rank}, span {self.expert_span}"
        ]
        lines += [f"  layer {index}: {part}" for index, part in enumerate(self.parts)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return text_html("Fit", str(self))

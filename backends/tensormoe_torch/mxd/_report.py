"""Report of a distillation, as a value and as text."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe._format import format_share

__all__ = ["Distillation"]


@dataclass(frozen=True)
class Distillation:
    """Report of :func:`distill`; ``print`` shows it in words.

    Args:
        losses: mean of ‖out − target‖² / ‖target‖ over the tokens of every step's batch, before
            the step.
        tokens: how many tokens the figures below are of.
        active: the mean number of experts with a coefficient above zero per token (L0).
        explained_variance: 1 − Σ‖out − target‖² / Σ‖target − mean target‖².
        dead: the experts that none of the tokens uses.
        experts: how many there are.
        parameters: of the block.
    """

    losses: tuple[float, ...]
    tokens: int
    active: float
    explained_variance: float
    dead: tuple[int, ...]
    experts: int
    parameters: int

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{len(self.losses):,} steps: loss {self.losses[0]:.4g} → {self.losses[-1]:.4g}",
                f"{self.tokens:,} tokens: explained variance {self.explained_variance:.4f}, "
                f"{self.active:.1f} experts per token",
                f"{self.experts:,} experts, {format_share(len(self.dead) / self.experts)} of them "
                f"dead; {self.parameters:,} parameters",
            ]
        )

"""Progress and result of a healing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tensormoe._format import Cell, align_totals
from tensormoe._html import table_html
from tensormoe_torch.compression._evaluate import Evaluation


@dataclass(frozen=True)
class HealingProgress:
    """Progress of a healing.

    Args:
        done: steps.
        total: of them.
        loss: of the last batch, before its step; None before the first one.
        rate: learning rate of that step.
    """

    done: int
    total: int
    loss: float | None
    rate: float


@dataclass(frozen=True)
class HealingReport:
    """Report of a healing; ``print`` it for a table.

    Args:
        steps: that were made, those before an interruption included.
        parameters: that were trained.
        tokens: that were predicted in all steps.
        losses: of every step's batch, before the step.
        before: the compressed model next to the original on the held-out batches; None without any.
        after: the healed one.
    """

    steps: int
    parameters: int
    tokens: int
    losses: tuple[float, ...]
    before: Evaluation | None
    after: Evaluation | None

    @property
    def recovered(self) -> float | None:
        """Share of the cross-entropy lost by compression that the healing won back.

        None without held-out batches, or where compression lost nothing.
        """
        if self.before is None or self.after is None:
            return None
        (original, compressed), healed = self.before.losses, self.after.losses[1]
        if compressed <= original:
            return None
        return (compressed - healed) / (compressed - original)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        found = asdict(self)
        for name in ("before", "after"):
            each: Evaluation | None = getattr(self, name)
            found[name] = None if each is None else each.to_dict()
        return found | {"recovered": self.recovered}

    def __str__(self) -> str:
        rows = self._rows()
        lines = [*align_totals(rows), ""] if rows else []
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        return table_html("Healing", self._rows(), self._notes())

    def _rows(self) -> list[list[Cell]]:
        if self.before is None or self.after is None:
            return []
        first, last = self.before, self.after
        rows: list[list[Cell]] = [
            ["", "original", "compressed", "healed"],
            ["same likeliest token", "", f"{first.agreement:.2%}", f"{last.agreement:.2%}"],
            ["KL from the original", "", f"{first.divergence:.4g}", f"{last.divergence:.4g}"],
        ]
        losses = [*first.losses, last.losses[1]]
        return [*rows, ["loss, nats per token", *(f"{each:.4f}" for each in losses)]]

    def _notes(self) -> list[str]:
        notes = []
        if self.before is not None and self.after is not None:
            notes.append(f"{self.before.tokens:,} held-out tokens{self._verdict()}")
        notes.append(
            f"{self.parameters:,} parameters trained for {self.steps:,} steps of "
            f"{self.tokens // max(self.steps, 1):,} tokens"
        )
        if self.losses:
            notes.append(
                f"loss of the batches: {self.losses[0]:.4f} at first, {self.losses[-1]:.4f} at last"
            )
        return notes

    def _verdict(self) -> str:
        share = self.recovered
        if share is None:
            return "; compression had lost nothing there"
        if share < 0:
            return "; worse than before: lower the learning rate"
        return f"; {share:.1%} of the lost cross-entropy won back"

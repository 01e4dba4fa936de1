"""Several compressions of one model, next to one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensormoe._format import Cell, align_totals, format_bytes
from tensormoe._html import table_html
from tensormoe.checkpoint._files import checkpoint_path
from tensormoe.errors import SpecError
from tensormoe_torch.compression._evaluate import Evaluation, evaluate
from tensormoe_torch.compression._text import TextWindows, load_model, load_tokens


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several compressions of one model on one text; ``print`` it for a table.

    Args:
        names: of the compressions.
        evaluations: of each, next to the original.
    """

    names: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def best(self) -> str:
        """Name of the one with the smallest loss; of equal ones, that with the fewest bytes."""
        return min(zip(self.names, self.evaluations, strict=True), key=_rank)[0]

    @property
    def beaten(self) -> dict[str, str]:
        """Those that have both a larger loss and no fewer bytes than another, and the best such."""
        found = {}
        pairs = list(zip(self.names, self.evaluations, strict=True))
        for name, mine in pairs:
            better = [
                (other, theirs)
                for other, theirs in pairs
                if theirs.losses[1] < mine.losses[1]
                and theirs.weight_bytes[1] <= mine.weight_bytes[1]
            ]
            if better:
                found[name] = min(better, key=_rank)[0]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The comparison in plain values, for JSON."""
        listed = [
            {"name": name, **each.to_dict()}
            for name, each in zip(self.names, self.evaluations, strict=True)
        ]
        return {"compressions": listed, "best": self.best, "beaten": self.beaten}

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), "", *self._verdict()])

    def _repr_html_(self) -> str:
        return table_html("Comparison", self._rows(), self._verdict())

    def _rows(self) -> list[list[Cell]]:
        heads: list[Cell] = [
            "",
            "weights",
            "share",
            "loss",
            "lost",
            "divergence",
            "same",
            "tokens/s",
        ]
        first = self.evaluations[0]
        rows: list[list[Cell]] = [heads]
        for name, each in zip(self.names, self.evaluations, strict=True):
            before, after = each.weight_bytes
            rows.append(
                [
                    name,
                    format_bytes(after),
                    f"{after / before:.1%}",
                    f"{each.losses[1]:.4f}",
                    f"{each.losses[1] - each.losses[0]:+.4f}",
                    f"{each.divergence:.4f}",
                    f"{each.agreement:.1%}",
                    f"{each.tokens_per_second[1]:,.0f}",
                ]
            )
        # the original comes last, set apart
        speed = f"{first.tokens_per_second[0]:,.0f}"
        size = format_bytes(first.weight_bytes[0])
        rows.append(["original", size, "100.0%", f"{first.losses[0]:.4f}", "", "", "", speed])
        return rows

    def _verdict(self) -> list[str]:
        best = self.evaluations[self.names.index(self.best)]
        before, after = best.weight_bytes
        lost = best.losses[1] - best.losses[0]
        lines = [
            f"{best.tokens:,} tokens; least lost: {self.best}, {lost:+.4f} nats per token at "
            f"{after / before:.1%} of the bytes"
        ]
        lines += [
            f"{name} loses more than {other}, which has no more bytes"
            for name, other in self.beaten.items()
        ]
        return lines


def compare_checkpoints(
    model: str | os.PathLike[str],
    compressed: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    windows: TextWindows | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> Comparison:
    """Compare several folders of transformers with the one that all were compressed from.

    Two models are in memory at a time.

    Args:
        model: folder of the original.
        compressed: folders that ``tensormoe compress``, ``tensormoe reduce`` or
            ``save_pretrained`` wrote.
        data: a text file in UTF-8.
        tokenizer: folder of the tokenizer; the original model's by default.
        windows: how the text is cut; 128 windows of 2048 tokens by default.
        dtype: that all run in; that of their files by default.
        device: that all run on.

    Raises:
        CheckpointError: a model, tokenizer or text that can't be opened.
        SpecError, ShapeError: no folders, or the same twice; and as of :func:`evaluate`.
        MissingDependencyError: transformers is not installed.
    """
    names = [os.path.basename(os.path.normpath(checkpoint_path(each))) for each in compressed]
    if len(set(names)) < len(names):
        # of equal names, the folders that they are in tell
        names = [os.path.normpath(checkpoint_path(each)) for each in compressed]
    if not names or len(set(names)) < len(names):
        raise SpecError(
            f"compressed models to compare must be different folders; got {', '.join(names)}."
        )
    words = checkpoint_path(model) if tokenizer is None else checkpoint_path(tokenizer)
    before = load_model(model, device, dtype)
    found = []
    for each in compressed:
        after = load_model(each, device, dtype)
        ids = load_tokens(data, words, (before, after))
        batches = [part.to(device) for part in (windows or TextWindows()).of(ids, before)]
        found.append(evaluate(before, after, batches))
        del after
    return Comparison(tuple(names), tuple(found))


def _rank(pair: tuple[str, Evaluation]) -> tuple[float, int]:
    _, evaluation = pair
    return evaluation.losses[1], evaluation.weight_bytes[1]

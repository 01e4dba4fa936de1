"""Report of a model whose experts became fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensormoe._format import Cell, align_totals, format_share
from tensormoe._html import table_html

# groups that a line of the table shows
_SHOWN = 8
_CRITERIA = {
    "router": "Experts merged by router logits (M-SMoE)",
    "outputs": "Experts merged by average outputs (HC-SMoE)",
    "frequency": "Experts pruned to those that are chosen most often",
    "reap": "Experts pruned to those of the highest saliency (REAP)",
}


@dataclass(frozen=True)
class ReducedModule:
    """The experts of one layer.

    Args:
        name: of the module in the model.
        kind: class of the module that was there.
        experts: how many before and after.
        groups: of each expert that is left, the old ones that it is made of, the one that is
            chosen most often first.
        frequencies: share of the router's choices that fell on each old expert.
        saliency: of each old expert, where those with the highest one were kept; else None.
        similarity: cosine of each old expert's router logits, or average outputs, and those of the
            first in its group; None of pruned ones.
        parameters: entries of the experts before and after.
        output_error: of the layer's outputs for the calibration inputs, relative to what the old
            experts give; of experts that are called one by one, before the router's weights. None
            of pruned ones, whose router chooses others.
    """

    name: str
    kind: str
    experts: tuple[int, int]
    groups: tuple[tuple[int, ...], ...]
    frequencies: tuple[float, ...]
    saliency: tuple[float, ...] | None
    similarity: tuple[float, ...] | None
    parameters: tuple[int, int]
    output_error: float | None

    @property
    def kept_frequency(self) -> float:
        """Share of the router's choices that fell on the first experts of groups."""
        return sum(self.frequencies[group[0]] for group in self.groups)


@dataclass(frozen=True)
class ReductionReport:
    """Report of :func:`reduce_experts`; ``print`` shows it as a table.

    Args:
        how: "merge" or "prune".
        criterion: of merged experts "router" or "outputs", of pruned ones "frequency" or "reap".
        tokens: of the calibration batches.
        modules: one per layer, in the model's order.
        model_parameters: parameters of the whole model before and after, tied ones counted once.
    """

    how: str
    criterion: str
    tokens: int
    modules: tuple[ReducedModule, ...]
    model_parameters: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the modules."""
        return tuple(each.name for each in self.modules)

    @property
    def parameters(self) -> tuple[int, int]:
        """Entries of all experts before and after."""
        before, after = zip(*(each.parameters for each in self.modules), strict=True)
        return sum(before), sum(after)

    @property
    def summary(self) -> str:
        """Words that say how experts became fewer."""
        return f"{_CRITERIA[self.criterion]}, over {self.tokens:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        modules = [asdict(each) for each in self.modules]
        return {
            "how": self.how,
            "criterion": self.criterion,
            "tokens": self.tokens,
            "modules": modules,
            "model_parameters": self.model_parameters,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReductionReport:
        """The report of what :meth:`to_dict` gave, also as JSON."""
        given = dict(values)
        modules = tuple(ReducedModule(**_tuples(each)) for each in given.pop("modules"))
        return cls(**_tuples(given), modules=modules)

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        return table_html("Reduction", self._rows(), self._notes())

    def _rows(self) -> list[list[Cell]]:
        heads: list[Cell] = ["experts", "number", "groups", "parameters", "share", "choices"]
        heads += ["least alike", "outputs off by"]
        rows: list[list[Cell]] = [heads]
        for each in self.modules:
            least = None if each.similarity is None else f"{min(each.similarity):.2f}"
            off = None if each.output_error is None else format_share(each.output_error)
            rows.append(
                [
                    each.name,
                    (str(each.experts[0]), str(each.experts[1])),
                    _groups(each.groups),
                    *_counts(*each.parameters),
                    f"{each.kept_frequency:.1%}",
                    least or "",
                    off or "",
                ]
            )
        return [*rows, ["total", "", "", *_counts(*self.parameters), "", "", ""]]

    def _notes(self) -> list[str]:
        before, after = self.model_parameters
        return [
            f"whole model: {before:,} → {after:,} parameters",
            self.summary,
            "choices: share of the router's choices that fell on the experts that stay, before",
        ]


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with tuples where JSON has lists."""

    def of(value: Any) -> Any:
        return tuple(map(of, value)) if isinstance(value, list | tuple) else value

    return {key: of(each) for key, each in values.items()}


def _groups(groups: tuple[tuple[int, ...], ...]) -> str:
    shown = ["+".join(map(str, each)) for each in groups[:_SHOWN]]
    return " ".join([*shown, *(["…"] if len(groups) > _SHOWN else [])])


def _counts(before: int, after: int) -> list[Cell]:
    return [(f"{before:,}", f"{after:,}"), f"{after / before:.1%}"]

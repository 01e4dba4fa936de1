"""Report of surgery: a table of costs before and after, as a value and as text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from tensormoe._format import (
    Cell,
    align_totals,
    format_bytes,
    format_count,
    format_share,
    format_time,
)
from tensormoe._html import table_html
from tensormoe.functional import Fit
from tensormoe.planning import Cost, Roofline


@dataclass(frozen=True)
class Replacement:
    """One module that became a mixture of experts.

    Args:
        name: of the module in the model.
        kind: class of the module that was there.
        sizes: in and out of a layer; in, hidden and out of a block.
        inputs: how many inputs the costs are for.
        before: cost of the module that was there. An activation between two layers, the same
            before and after, is in neither cost.
        after: cost of what took its place, the gate included.
        fit: how well that stands for the old weights; None if it starts from fresh values.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    inputs: int
    before: Cost
    after: Cost
    fit: Fit | None


@dataclass(frozen=True)
class Surgery:
    """Report of :func:`replace`; ``print`` shows it as a table.

    Args:
        replacements: one a replaced module, in the model's order.
        model_parameters: parameters of the whole model before and after, tied ones counted once.
        roofline: the device that times are predicted for.
        training: whether costs are those of forward and backward.
    """

    replacements: tuple[Replacement, ...]
    model_parameters: tuple[int, int]
    roofline: Roofline
    training: bool = False

    @property
    def before(self) -> Cost:
        """The cost of all replaced modules before, one after the other."""
        return reduce(Cost.then, (each.before for each in self.replacements))

    @property
    def after(self) -> Cost:
        """The cost of all replaced modules now, one after the other."""
        return reduce(Cost.then, (each.after for each in self.replacements))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the replaced modules."""
        return tuple(each.name for each in self.replacements)

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        return table_html("Surgery", self._rows(), self._notes())

    def _rows(self) -> list[list[Cell]]:
        rows: list[list[Cell]] = [
            ["module", "inputs", "parameters", "FLOPs", "peak", "time", "weights off by"]
        ]
        for each in self.replacements:
            off = "fresh" if each.fit is None else format_share(each.fit.error)
            rows.append(
                [each.name, f"{each.inputs:,}", *self._figures(each.before, each.after), off]
            )
        return [*rows, ["total", "", *self._figures(self.before, self.after), ""]]

    def _figures(self, before: Cost, after: Cost) -> list[Cell]:
        time = self.roofline.time
        return [
            (f"{before.parameters:,}", f"{after.parameters:,}"),
            (format_count(before.flops), format_count(after.flops)),
            (format_bytes(before.peak_memory), format_bytes(after.peak_memory)),
            (format_time(time(before)), format_time(time(after))),
        ]

    def _notes(self) -> list[str]:
        before, after = self.model_parameters
        return [
            f"whole model: {before:,} → {after:,} parameters",
            f"cost: {'forward and backward' if self.training else 'forward'}; peak memory beyond "
            "input and parameters, of the total the largest;",
            f"      time as predicted for {self.roofline.name}",
        ]

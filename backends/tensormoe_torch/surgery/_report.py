"""What surgery changed: a table of costs before and after, as a value and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from tensormoe.functional._fit import Fit, share
from tensormoe.planning import Cost, Roofline

__all__ = ["Cell", "Replacement", "Surgery", "aligned"]

Cell = str | tuple[str, str]


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
    """What :func:`replace` did to a model; ``print`` shows it as a table.

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
        pairs = [(each.before, each.after) for each in self.replacements]
        pairs.append((self.before, self.after))
        columns = [self._column(name, pairs) for name in ("parameters", "FLOPs", "peak", "time")]
        heads: list[Cell] = ["module", "inputs", *(head for head, _ in columns), "weights off by"]
        rows: list[list[Cell]] = [heads]
        for place, each in enumerate(self.replacements):
            cells = [cells[place] for _, cells in columns]
            off = "fresh" if each.fit is None else share(each.fit.error)
            rows.append([each.name, f"{each.inputs:,}", *cells, off])
        rows.append(["total", "", *(cells[-1] for _, cells in columns), ""])
        before, after = self.model_parameters
        way = "forward and backward" if self.training else "forward"
        return "\n".join(
            [
                *aligned(rows),
                f"whole model: {before:,} → {after:,} parameters",
                f"cost: {way}; peak memory beyond input and parameters, of the total the largest;",
                f"      time as predicted for {self.roofline.name}",
            ]
        )

    def _column(
        self, name: str, pairs: Sequence[tuple[Cost, Cost]]
    ) -> tuple[str, list[tuple[str, str]]]:
        """A heading with its unit, and the figures before and after, with the total at the end."""
        measured = {
            "parameters": lambda cost: cost.parameters,
            "FLOPs": lambda cost: cost.flops,
            "peak": lambda cost: cost.peak_memory,
            "time": self.roofline.time,
        }[name]
        figures = [(measured(before), measured(after)) for before, after in pairs]
        if name == "parameters":
            return name, [(f"{old:,}", f"{new:,}") for old, new in figures]
        units, heading = _UNITS[name]
        largest = max(max(pair) for pair in figures)
        size, unit = next((each for each in units if largest >= each[0]), units[-1])
        shown = [(_short(old / size), _short(new / size)) for old, new in figures]
        return heading.format(unit), shown


# the sizes and names of units, and the heading of a column in one of them
_UNITS: dict[str, tuple[tuple[tuple[float, str], ...], str]] = {
    "FLOPs": (((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")), "{}FLOP"),
    "peak": (((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")), "peak {}"),
    "time": (((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "time {}"),
}


def _short(value: float) -> str:
    """Three figures, and no fewer than the whole number has."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def aligned(rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Rows of a table: the first column to the left, the others to the right, arrows in line."""
    columns = [[*column] for column in zip(*rows, strict=True)]
    texts = []
    for column in columns:
        found = [cell for cell in column if isinstance(cell, tuple)]
        if found:
            left, right = (max(len(cell[side]) for cell in found) for side in (0, 1))
            column = [
                f"{cell[0]:>{left}} → {cell[1]:>{right}}" if isinstance(cell, tuple) else cell
                for cell in column
            ]
        width = max(len(str(cell)) for cell in column)
        align = "<" if column is columns[0] else ">"
        texts.append([f"{cell:{align}{width}}" for cell in column])
    lines = ["  ".join(line).rstrip() for line in zip(*texts, strict=True)]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]

"""Report of the adapters that were added to a model."""

from __future__ import annotations

from dataclasses import dataclass

from tensormoe._format import Cell, align_totals
from tensormoe._html import table_html
from tensormoe.mixtures import ResidualConfig


@dataclass(frozen=True)
class AddedAdapter:
    """One mixture that was added.

    Args:
        name: of the layer in the model now, or of the experts' projection.
        kind: class of the module that was there.
        config: the mixture.
        base_parameters: entries of what it is added to.
    """

    name: str
    kind: str
    config: ResidualConfig
    base_parameters: int

    @property
    def parameters(self) -> int:
        """Trainable entries."""
        return self.config.num_parameters


@dataclass(frozen=True)
class AdapterReport:
    """Report of :func:`add_adapters`; ``print`` shows it as a table.

    Args:
        adapters: in the model's order.
        model_parameters: parameters of the whole model before, tied ones counted once.
    """

    adapters: tuple[AddedAdapter, ...]
    model_parameters: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers that have a mixture now."""
        return tuple(each.name for each in self.adapters)

    @property
    def parameters(self) -> int:
        """Trainable entries, all others are frozen."""
        return sum(each.parameters for each in self.adapters)

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), self._note()])

    def _repr_html_(self) -> str:
        return table_html("Adapters", self._rows(), [self._note()])

    def _rows(self) -> list[list[Cell]]:
        rows: list[list[Cell]] = [
            ["module", "N × in × out", "factorization", "parameters", "trained", "share"]
        ]
        for each in self.adapters:
            spec = each.config.layer.spec
            sizes = (spec.num_experts, spec.in_features, spec.out_features)
            rows.append(
                [
                    each.name,
                    " × ".join(f"{size:,}" for size in sizes),
                    repr(spec.factorization),
                    *_figures(each.base_parameters, each.parameters),
                ]
            )
        bases = sum(each.base_parameters for each in self.adapters)
        return [*rows, ["total", "", "", *_figures(bases, self.parameters)]]

    def _note(self) -> str:
        share = self.parameters / (self.model_parameters + self.parameters)
        return (
            f"whole model: {self.model_parameters:,} frozen parameters, {self.parameters:,} "
            f"trained ones, {share:.2%}"
        )


def _figures(base: int, trained: int) -> list[Cell]:
    return [f"{base:,}", f"{trained:,}", f"{trained / base:.2%}" if base else ""]

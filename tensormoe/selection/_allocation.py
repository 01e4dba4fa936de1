"""The factorization and rank of each layer of a model: a value, a table and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensormoe._files import write_file
from tensormoe._format import Cell, align_totals, format_parameters, format_rank
from tensormoe._html import table_html
from tensormoe._spec import LayerSpec
from tensormoe._validation import brief, choice, is_number
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization
from tensormoe.gates import Gate
from tensormoe.planning._gate_cost import gate_parameters
from tensormoe.selection._sites import KINDS, LayerSite, checked_keys

METHODS = ("equal", "size", "sensitivity")
"""Ways to share a budget out over layers."""
UNITS = ("parameters", "bytes")
"""Units of a budget for a whole model."""

_SCHEMA = 1
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class AllocatedLayer:
    """One layer of a model, and the factors that are to take its place.

    Args:
        site: the layer.
        specs: one layer of factors for each of its projections.
        gate: of linear layers and MLPs, which become mixtures; None for a stack of experts, whose
            router stays.
        loss: what the model loses by it, as far as sensitivities tell; None without any.
    """

    site: LayerSite
    specs: tuple[LayerSpec, ...]
    gate: Gate | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        listed = isinstance(self.specs, tuple | list)
        if not listed or not all(isinstance(each, LayerSpec) for each in self.specs):
            raise SpecError(f"specs must be a tuple of LayerSpec; got {brief(self.specs)}.")
        object.__setattr__(self, "specs", tuple(self.specs))
        if self.gate is not None and not isinstance(self.gate, Gate):
            raise SpecError(f"gate must be a Gate or None; got {brief(self.gate)}.")
        if self.loss is not None and not is_number(self.loss):
            raise SpecError(f"loss must be a number or None; got {brief(self.loss)}.")
        wanted = [(e.in_features, e.out_features, e.bias) for e in self.site.projections]
        found = [(e.in_features, e.out_features, e.bias) for e in self.specs]
        stack = self.site.experts
        counts = {each.experts for each in self.specs}
        if found != wanted or len(counts) != 1 or (stack is not None and counts != {(stack,)}):
            raise SpecError(
                f"specs of {self.name!r} must have the sizes of its projections, {wanted}, and "
                f"its experts; got {found} and {sorted(counts)}."
            )

    @property
    def name(self) -> str:
        """Name of the module in the model."""
        return self.site.name

    @property
    def kind(self) -> str:
        """Kind of the layer."""
        return self.site.kind

    @property
    def experts(self) -> tuple[int, ...]:
        """Experts by level."""
        return self.specs[0].experts

    @property
    def factorizations(self) -> tuple[Factorization, ...]:
        """One per projection, with its rank."""
        return tuple(each.factorization for each in self.specs)

    @property
    def parameters_before(self) -> int:
        """Entries of what is there."""
        return self.site.parameters

    @property
    def parameters(self) -> int:
        """Entries of the factors, and of the gate."""
        gate = self.gate
        counted = 0
        if gate is not None:
            counted = gate_parameters(gate, self.specs[0].in_features, self.experts)
        return counted + sum(each.num_parameters for each in self.specs)

    @property
    def share(self) -> float:
        """Parameters over those before."""
        return self.parameters / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON knows them."""
        return {
            "site": self.site.to_dict(),
            "specs": [each.to_dict() for each in self.specs],
            "gate": None if self.gate is None else self.gate.to_dict(),
            "loss": self.loss,
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
            "share": self.share,
        }


@dataclass(frozen=True)
class Allocation:
    """A budget shared out over the layers of a model; ``print`` shows it as a table.

    ``tensormoe_torch.compress(model, allocation)`` and ``tensormoe_torch.replace(model,
    allocation)`` carry it out, and ``tensormoe compress --allocation FILE`` on disk.

    Args:
        layers: in the model's order.
        by: one of :data:`METHODS`.
        limit: what all layers together may take.
        unit: of the limit, one of :data:`UNITS`.

    Raises:
        SpecError: layers of one name, or values that cannot be.
    """

    layers: tuple[AllocatedLayer, ...]
    by: str
    limit: int
    unit: str = "parameters"

    def __post_init__(self) -> None:
        listed = isinstance(self.layers, tuple | list)
        if not listed or not all(isinstance(each, AllocatedLayer) for each in self.layers):
            raise SpecError(f"layers must be a tuple of AllocatedLayer; got {brief(self.layers)}.")
        object.__setattr__(self, "layers", tuple(self.layers))
        check_names(each.name for each in self.layers)
        choice(self.by, METHODS, "by", SpecError)
        choice(self.unit, UNITS, "unit", SpecError)
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:
            raise SpecError(f"limit must be a positive integer; got {brief(self.limit)}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(each.name for each in self.layers)

    @property
    def parameters_before(self) -> int:
        """Entries of all layers as they are."""
        return sum(each.parameters_before for each in self.layers)

    @property
    def parameters(self) -> int:
        """Entries of all factors and gates."""
        return sum(each.parameters for each in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of all factors and gates, in the dtypes of the layers."""
        return sum(each.parameters * each.site.itemsize for each in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of all layers as they are."""
        return sum(each.parameters_before * each.site.itemsize for each in self.layers)

    @property
    def loss(self) -> float | None:
        """Sum of what the layers lose; None where that is not known."""
        losses = [each.loss for each in self.layers if each.loss is not None]
        return sum(losses) if losses and len(losses) == len(self.layers) else None

    def of_kind(self, *kinds: str) -> Allocation:
        """The same for some kinds of layers alone.

        Args:
            kinds: of :data:`KINDS`: ``"experts"`` are those that ``compress`` takes, and
                ``"linear"`` and ``"mlp"`` those that ``replace`` takes.

        Raises:
            SpecError: an unknown kind.
        """
        for each in kinds:
            choice(each, KINDS, "kind", SpecError)
        return replace(self, layers=tuple(each for each in self.layers if each.kind in kinds))

    def __getitem__(self, name: str) -> AllocatedLayer:
        """The layer of a name.

        Raises:
            KeyError: there is none.
        """
        return next(layer for layer in self._found(name))

    def _found(self, name: str) -> list[AllocatedLayer]:
        found = [each for each in self.layers if each.name == name]
        if not found:
            raise KeyError(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON knows them; figures that follow from others are there to read."""
        return {
            "version": _SCHEMA,
            "by": self.by,
            "limit": self.limit,
            "unit": self.unit,
            "layers": [each.to_dict() for each in self.layers],
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "bytes": self.bytes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Allocation:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: values that are missing, unknown, of another version or that cannot be.
        """
        given = checked_keys(values, _KEYS, "an allocation")
        if given["version"] != _SCHEMA:
            raise SpecError(
                f"version of an allocation must be {_SCHEMA}; got {brief(given['version'])}. "
                "Update tensormoe."
            )
        if not isinstance(given["layers"], list | tuple):
            raise SpecError(f"layers must be a list; got {brief(given['layers'])}.")
        layers = tuple(_layer(each) for each in given["layers"])
        return cls(layers, given["by"], given["limit"], given["unit"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            SpecError: it can't be written.
        """
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_file(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Read a file that :meth:`save` or ``tensormoe allocate --output`` wrote.

        Raises:
            SpecError: it can't be read, or is something else.
        """
        values = read_json(path, "an allocation")
        if not isinstance(values, Mapping):
            raise SpecError(f"an allocation must be a JSON object; {str(path)!r} is none.")
        return cls.from_dict(values)

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), self._note()])

    def _repr_html_(self) -> str:
        return table_html("Allocation", self._rows(), [self._note()])

    def _rows(self) -> list[list[Cell]]:
        heads: list[Cell] = ["layer", "kind", "sizes", "experts", "factorization", "rank"]
        rows: list[list[Cell]] = [[*heads, "parameters", "share"]]
        for each in self.layers:
            rows.append(
                [
                    each.name,
                    each.kind,
                    " → ".join(map(str, _sizes(each.site))),
                    " × ".join(map(str, each.experts)),
                    _joined(kind.name for kind in each.factorizations),
                    " | ".join(format_rank(kind.rank) for kind in each.factorizations),
                    *_counts(each.parameters_before, each.parameters),
                ]
            )
        total = _counts(self.parameters_before, self.parameters) if self.layers else ["", ""]
        return [*rows, ["total", "", "", "", "", "", *total]]

    def _note(self) -> str:
        return (
            f"by {self.by}; at most {self.limit:,} {self.unit}; ranks in the order of projections"
        )


_KEYS = (
    "version",
    "by",
    "limit",
    "unit",
    "layers",
    "parameters_before",
    "parameters",
    "bytes_before",
    "bytes",
)


def _layer(values: Any) -> AllocatedLayer:
    names = ("site", "specs", "gate", "loss", "parameters_before", "parameters", "share")
    given = checked_keys(values, names, "a layer of an allocation")
    if not isinstance(given["specs"], list | tuple):
        raise SpecError(f"specs of a layer must be a list; got {brief(given['specs'])}.")
    gate = None if given["gate"] is None else Gate.from_dict(given["gate"])
    specs = tuple(LayerSpec.from_dict(each) for each in given["specs"])
    return AllocatedLayer(LayerSite.from_dict(given["site"]), specs, gate, given["loss"])


def check_names(names: Iterable[str]) -> None:
    """Refuse two layers of one name.

    Raises:
        SpecError: there are.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SpecError(f"layers must have different names; got {name!r} twice.")
        seen.add(name)


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The values in a JSON file.

    Raises:
        SpecError: it can't be read, is too large, or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise SpecError(f"{what} must be smaller than 64 MiB; {str(path)!r} is not.")
        return json.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpecError(f"{what} can't be read from {str(path)!r}: {reason}.") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{what} must be JSON; {str(path)!r} is not: {error}.") from None


def _sizes(site: LayerSite) -> tuple[int, ...]:
    first, last = site.projections[0], site.projections[-1]
    if site.kind == "linear":
        return first.in_features, first.out_features
    return first.in_features, last.in_features, last.out_features


def _joined(names: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(names))


def _counts(before: int, after: int) -> list[Cell]:
    return [(format_parameters(before), format_parameters(after)), f"{after / before:.1%}"]

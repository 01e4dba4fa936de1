"""Report of the compression of a model's experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensormoe._format import Cell, align_totals, format_bytes, format_share
from tensormoe._html import table_html
from tensormoe.compression._predicted import summed
from tensormoe.decomposition import Report
from tensormoe.decomposition._controls import verdict
from tensormoe.factorizations import Factorization


@dataclass(frozen=True)
class CompressedProjection:
    """One projection of all experts of a layer.

    Args:
        role: ``"gate_proj"``, ``"up_proj"`` or ``"down_proj"``; ``"gate_up_proj"`` of both as one.
        sizes: in and out.
        factorization: with its rank.
        report: errors and parameters, as ``decompose`` reports them. Its output error is that of
            the rows that the router gave the experts, in its weights.
        bits: 8 or 4 of the factors' entries; None for entries of the weights' dtype.
        nbytes: of the weights, and of what takes their place, scales included.
        predicted_loss: increase of the model's loss if this projection alone is compressed, in nats
            per token, see :func:`tensormoe.compression.predicted_loss`; None without gradients in a
            calibration.
    """

    role: str
    sizes: tuple[int, int]
    factorization: Factorization
    report: Report
    bits: int | None
    nbytes: tuple[int, int]
    predicted_loss: float | None = None

    @property
    def rank(self) -> Any:
        """The bond sizes: an integer, or one per bond; None where there are none."""
        return self.factorization.rank


@dataclass(frozen=True)
class CompressedModule:
    """The experts of one layer.

    Args:
        name: of the module in the model.
        kind: class of the module that was there.
        experts: N.
        projections: in the order gate, up, down.
        output_error: of the layer's outputs for the calibration inputs, relative to what the dense
            experts give; of experts that are called one by one, before the router's weights. None
            without inputs.
    """

    name: str
    kind: str
    experts: int
    projections: tuple[CompressedProjection, ...]
    output_error: float | None

    @property
    def parameters(self) -> tuple[int, int]:
        """Entries before and after."""
        reports = [each.report for each in self.projections]
        return sum(r.dense_parameters for r in reports), sum(r.parameters for r in reports)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes before and after."""
        before, after = zip(*(each.nbytes for each in self.projections), strict=True)
        return sum(before), sum(after)


@dataclass(frozen=True)
class CompressionReport:
    """Report of :func:`compress`; ``print`` shows it as a table.

    Args:
        modules: one a replaced module, in the model's order.
        model_parameters: parameters of the whole model before and after, tied ones counted once,
            and entries of rounded factors, which train no more.
        model_bytes: of its parameters and buffers, before and after.
    """

    modules: tuple[CompressedModule, ...]
    model_parameters: tuple[int, int]
    model_bytes: tuple[int, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the replaced modules."""
        return tuple(each.name for each in self.modules)

    @property
    def parameters(self) -> tuple[int, int]:
        """Entries of all experts before and after."""
        before, after = zip(*(each.parameters for each in self.modules), strict=True)
        return sum(before), sum(after)

    @property
    def predicted_loss(self) -> float | None:
        """The increase of the model's loss in nats per token: the sum of those of projections.

        None without gradients in a calibration, see :func:`tensormoe.compression.predicted_loss`.
        """
        return summed(p.predicted_loss for each in self.modules for p in each.projections)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of all experts before and after."""
        before, after = zip(*(each.nbytes for each in self.modules), strict=True)
        return sum(before), sum(after)

    @property
    def seconds(self) -> float:
        """Seconds that the decompositions took."""
        return sum(p.report.seconds for each in self.modules for p in each.projections)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        modules = []
        for each in self.modules:
            projections = [
                {
                    "role": p.role,
                    "sizes": p.sizes,
                    "factorization": p.factorization.name,
                    "rank": p.rank,
                    "predicted_loss": p.predicted_loss,
                    "bits": p.bits,
                    "bytes": p.nbytes,
                    **p.report.to_dict(),
                }
                for p in each.projections
            ]
            plain = {key: getattr(each, key) for key in ("name", "kind", "experts", "output_error")}
            modules.append(plain | {"projections": projections})
        return {
            "modules": modules,
            "model_parameters": self.model_parameters,
            "predicted_loss": self.predicted_loss,
            "model_bytes": self.model_bytes,
        }

    def __str__(self) -> str:
        return "\n".join([*align_totals(self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        return table_html("Compression", self._rows(), self._notes())

    def _rows(self) -> list[list[Cell]]:
        heads: list[Cell] = ["experts", "N × in × out", "factorization", "parameters", "share"]
        heads += ["weights off by", "SVDs", "joint SVD", "outputs off by"]
        predicted = self.predicted_loss
        more: list[Cell] = [] if predicted is None else [_signed(predicted)]
        heads += ["loss"] if more else []
        blank: list[Cell] = [""] * len(more)
        rows: list[list[Cell]] = [heads]
        for module in self.modules:
            for each in module.projections:
                report = each.report
                sizes = " × ".join(f"{n:,}" for n in (module.experts, *each.sizes))
                rows.append(
                    [
                        f"{module.name}.{each.role}",
                        sizes,
                        repr(each.factorization),
                        *_counts(report.dense_parameters, report.parameters),
                        format_share(report.error),
                        _share(report.svd_error),
                        _share(None if report.joint is None else report.joint.error),
                        _share(report.output_error),
                        *([_signed(each.predicted_loss)] if more else []),
                    ]
                )
            off = _share(module.output_error)
            rows.append(
                [module.name, "", "", *_counts(*module.parameters), "", "", "", off, *blank]
            )
        return [*rows, ["total", "", "", *_counts(*self.parameters), "", "", "", "", *more]]

    def _notes(self) -> list[str]:
        before, after = self.model_parameters
        return [
            *self._sizes(),
            f"whole model: {before:,} → {after:,} parameters; {self.seconds:.1f} s",
            "SVDs: truncated, with no more parameters, of each expert; joint SVD: the best of "
            "all together",
            *self._predicted(),
            *self._verdicts(),
        ]

    def _predicted(self) -> list[str]:
        """A line on where the loss is from."""
        said = "loss: nats per token, as the calibration predicts it"
        return [] if self.predicted_loss is None else [said]

    def _sizes(self) -> Iterator[str]:
        """Bytes, where they are not those of as many parameters."""
        bits = {each.bits for module in self.modules for each in module.projections}
        if bits != {None}:
            sizes = [
                " → ".join(map(format_bytes, pair)) for pair in (self.nbytes, self.model_bytes)
            ]
            share = self.nbytes[1] / self.nbytes[0]
            shown = " and ".join(str(each) for each in bits)
            yield f"factors in {shown} bits: experts {sizes[0]} ({share:.1%}), model {sizes[1]}"

    def _verdicts(self) -> Iterator[str]:
        """Of each projection that a truncated singular value decomposition is closer to."""
        for module in self.modules:
            for each in module.projections:
                if each.report.closer is not None:
                    said = verdict(each.report.closer, each.report.total_error)
                    yield f"{module.name}.{each.role}: {said}"


def _counts(before: int, after: int) -> list[Cell]:
    return [(f"{before:,}", f"{after:,}"), f"{after / before:.1%}"]


def _share(value: float | None) -> str:
    return "" if value is None else format_share(value)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"

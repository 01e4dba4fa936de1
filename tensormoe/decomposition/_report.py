"""What a decomposition kept, and what it lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array
from tensormoe.functional import LayerConfig
from tensormoe.functional._fit import share
from tensormoe.gates import Gate

__all__ = ["Decomposition", "Report"]


@dataclass(frozen=True)
class Report:
    """How well factors stand for the dense experts that they were made from.

    All errors are relative Frobenius norms: of what is missing, over what was given.

    Args:
        error: of all weights together, biases left out.
        expert_errors: of each expert's matrix, the last level fastest. What stands for an expert of
            zeros is relative to the root mean square of all experts' norms.
        svd_error: of the best truncated singular value decompositions of the experts, one by one,
            with as many parameters together; None where it was not asked for.
        bias_error: of the experts' biases; None without any.
        output_error: of the outputs for the given inputs, biases included, mixed by the given
            coefficients, or expert by expert without any; None without inputs.
        parameters: stored entries of the factors.
        dense_parameters: entries of what was given.
        sweeps: of alternating least squares.
        history: relative error after each sweep, as far as rounding lets it be seen.
        seconds: that it took.
        ended: why the search ended: ``"converged"``, further sweeps gained less than its
            tolerance; ``"sweeps"``, all of them were made; ``"stalled"``, the true error did not
            follow what sweeps claimed, so that rounding ended the search rather than an optimum;
            before that ``"time"``, the limit; ``"stopped"``, by the callback; ``"interrupted"``, by
            Ctrl-C.
    """

    error: float
    expert_errors: tuple[float, ...]
    svd_error: float | None
    bias_error: float | None
    output_error: float | None
    parameters: int
    dense_parameters: int
    sweeps: int
    history: tuple[float, ...]
    seconds: float
    ended: str = "converged"

    @property
    def ratio(self) -> float:
        """Stored entries of the factors per entry that was given."""
        return self.parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        return asdict(self) | {"ratio": self.ratio}

    def __str__(self) -> str:
        worst = max(self.expert_errors)
        lines = [
            f"weights off by {share(self.error)}, the worst expert by {share(worst)}",
            f"{self.dense_parameters:,} → {self.parameters:,} parameters ({self.ratio:.1%}), "
            f"{self.sweeps} sweeps, {self.seconds:.1f} s",
        ]
        if self.svd_error is not None:
            lines.append(f"experts by truncated SVDs of the same size: {share(self.svd_error)}")
        if self.bias_error is not None:
            lines.append(f"biases off by {share(self.bias_error)}")
        if self.output_error is not None:
            lines.append(f"outputs off by {share(self.output_error)}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Factors of dense experts, and what was lost.

    Args:
        spec: sizes and factorization of the layer that the factors make.
        factors: by their short names, the bias included; of the library, dtype and device of the
            weights.
        report: how well they stand for the weights.
    """

    spec: LayerSpec
    factors: Mapping[str, Array]
    report: Report

    def config(self, gate: Gate | str | None = None) -> LayerConfig:
        """The configuration of a layer with these factors.

        Args:
            gate: of the layer; None for one that is always given its coefficients.
        """
        return LayerConfig(self.spec, None if gate is None else Gate.parse(gate))

    @property
    def parameters(self) -> dict[str, Array]:
        """The factors by canonical name, as ``MuMoE.restore(config(), parameters)`` takes them."""
        return {f"factors.{name}": array for name, array in self.factors.items()}

"""Results of a decomposition, and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensormoe._format import format_share, plain_rank
from tensormoe._html import text_html
from tensormoe._spec import LayerSpec
from tensormoe.backend import Array
from tensormoe.decomposition._controls import EACH, Control, best_joint, closest, verdict
from tensormoe.factorizations import Factorization
from tensormoe.functional import LayerConfig
from tensormoe.gates import Gate


@dataclass(frozen=True)
class Report:
    """Errors of factors against the dense experts that they were made from.

    All errors are relative Frobenius norms: of what is missing, over what was given.

    Args:
        error: of all weights together, biases left out.
        expert_errors: of each expert's matrix, the last level fastest. What stands for an expert of
            zeros is relative to the root mean square of all experts' norms.
        controls: truncated singular value decompositions with no more parameters: of the experts,
            one by one, and of all together, unfolded; empty where they were not asked for.
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
        total_error: of weights and biases together, which is that of the controls as well.
        tried: of several factorizations that were to choose from, each with its rank and the error
            that a search came to, in the metric that errors were weighted by.
        weighted_error: of what was minimized: weights and biases in the given moments; None without
            moments.
    """

    error: float
    expert_errors: tuple[float, ...]
    controls: tuple[Control, ...]
    bias_error: float | None
    output_error: float | None
    parameters: int
    dense_parameters: int
    sweeps: int
    history: tuple[float, ...]
    seconds: float
    ended: str
    total_error: float
    weighted_error: float | None = None
    tried: tuple[tuple[Factorization, float], ...] = ()

    @property
    def svd_error(self) -> float | None:
        """Error of the experts' truncated singular value decompositions, one by one, if known."""
        return next((each.error for each in self.controls if each.unfolding == EACH), None)

    @property
    def joint(self) -> Control | None:
        """The best truncated singular value decomposition of all experts together, if known."""
        return best_joint(self.controls)

    @property
    def closer(self) -> Control | None:
        """The best truncated singular value decomposition if it beats the factors; else None.

        Errors of weights and biases together are compared; differences of less than a thousandth,
        and what may be rounding, don't count.
        """
        return closest(self.controls, self.total_error)

    @property
    def ratio(self) -> float:
        """Stored entries of the factors per entry that was given."""
        return self.parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, for JSON."""
        tried = [{"name": k.name, "rank": plain_rank(k.rank), "error": e} for k, e in self.tried]
        return asdict(self) | {"ratio": self.ratio, "svd_error": self.svd_error, "tried": tried}

    def __str__(self) -> str:
        worst = max(self.expert_errors)
        lines = [
            f"weights off by {format_share(self.error)}, the worst expert by {format_share(worst)}",
            f"{self.dense_parameters:,} → {self.parameters:,} parameters ({self.ratio:.1%}), "
            f"{self.sweeps} sweeps, {self.seconds:.1f} s",
        ]
        if self.bias_error is not None:
            lines.append(f"biases off by {format_share(self.bias_error)}")
        if self.output_error is not None:
            lines.append(f"outputs off by {format_share(self.output_error)}")
        if self.weighted_error is not None:
            lines.append(f"off by {format_share(self.weighted_error)} in the given moments")
        if self.tried:
            best = sorted(self.tried, key=lambda each: each[1])
            others = ", ".join(f"{kind} {format_share(error)}" for kind, error in best)
            lines.append(f"of those tried the closest: {others}")
        shown = ", ".join(str(each) for each in self.controls if each.rank)
        if shown:
            lines.append(f"truncated SVDs with no more parameters: {shown}")
        if self.closer is not None:
            both = "" if self.bias_error is None else ", of weights and biases together"
            lines.append(verdict(self.closer, self.total_error) + both)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return text_html("Decomposition", str(self))


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

    def _repr_html_(self) -> str:
        return text_html(repr(self.spec), str(self.report), self.spec.draw())

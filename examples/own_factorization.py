"""Add a factorization in one file: experts as mixtures of a few shared matrices.

    python examples/own_factorization.py

𝒲[n, i, o] = Σ_p C[n, p] B[i, p, o]: P full-rank matrices that all experts share, P numbers an
expert. Naming the legs is all that the planner, the costs, the capacities, the gradients and the
contract suite need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from tensormoe import Factorization, LayerSpec
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Initializer, Leg, expert_leg
from tensormoe_numpy import MuMoE


@dataclass(frozen=True)
class Mixtures(Factorization):
    """Experts in the span of ``rank`` shared matrices; expert rank min(I, O), span min(N, P)."""

    rank: int
    name: ClassVar[str] = "mixtures"

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("P",)

    def with_rank(self, rank: tuple[int, ...]) -> Mixtures:
        return Mixtures(*rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return (self.rank,)

    def factors(self, levels: int) -> tuple[Factor, ...]:
        experts = tuple(Factor(f"expert_{e}", (expert_leg(e), "p")) for e in range(levels))
        return (*experts, Factor("basis", (INPUT, "p", OUTPUT)))

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {"p": self.rank}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        starts = {f"expert_{e}": Initializer(1.0, "normal", "one") for e in range(len(experts))}
        energy = self.rank * 2.0 ** len(experts)
        return starts | {"basis": Initializer(1.0 / sqrt(3.0 * in_features * energy))}

    def to_tensorly(self, factors: Mapping[str, Any], xp: Any) -> Any:
        raise NotImplementedError("TensorLy has no decomposition of this shape")

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Any]:
        raise NotImplementedError("TensorLy has no decomposition of this shape")


def main() -> None:
    spec = LayerSpec(96, 64, experts=500, factorization=Mixtures(8))
    print(f"{spec.num_parameters:,} parameters, expert rank {spec.expert_rank}, ", end="")
    print(f"expert span {spec.expert_span}")
    print(spec.plan(256).describe())

    layer = MuMoE(96, 64, 500, spec.factorization, dtype="float64", seed=0)
    x = np.random.default_rng(0).standard_normal((32, 96))
    weights, biases = layer.materialize()
    assert biases is not None
    (a,) = layer.coefficients(x)
    dense = np.einsum("bn,bi,nio->bo", a, x, weights) + a @ biases
    error = np.abs(layer(x) - dense).max()
    print(f"\nfactorized and unfactorized differ by {error:.1e}")
    assert error < 1e-12
    assert np.linalg.matrix_rank(weights.reshape(500, -1)) == spec.expert_span
    assert np.linalg.matrix_rank(weights[0]) == spec.expert_rank


if __name__ == "__main__":
    main()

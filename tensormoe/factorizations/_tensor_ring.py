"""Tensor ring: 𝒲 as the trace of a product of matrices, one per mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend
from tensormoe.factorizations._base import (
    Factorization,
    Split,
    checked_rank,
    checked_scheme,
    linear_std,
    mode_names,
    spread_rank,
)
from tensormoe.factorizations._initialization import Initializer, chain_energy, noise_share
from tensormoe.factorizations._layouts import (
    cores_from_tensorly,
    cores_of,
    cores_to_tensorly,
)
from tensormoe.factorizations._network import INPUT, OUTPUT, Factor, Leg, expert_leg
from tensormoe.factorizations._shared_ring import shared_ring


@dataclass(frozen=True)
class TensorRing(Factorization):
    """𝒲[n, i, o] = tr(C₁[n] C_in[i] C_out[o]) (Oldfield et al. 2024, section 3.2).

    r₁Nr₂ + r₂Ir₃ + r₃Or₁ parameters and r₁r₂r₃ more multiply-adds a token. Expert rank
    min(r₃·min(r₁, r₂), I, O), expert span min(N, r₁r₂): bonds around the expert mode buy
    diversity, the bond between input and output buys rank. Memory grows with N only through
    r₁Nr₂, which is why the paper recommends it for many experts.

    Args:
        rank: the bonds around the ring, one per mode: the one before each expert mode in turn,
            then the one before the input mode, then the one before the output mode. (4, 4, 97)
            for one level of experts; one integer for all bonds alike.

    Raises:
        RankError: an entry is not a positive integer, or their number does not fit the levels.

    >>> from tensormoe import LayerSpec
    >>> spec = LayerSpec(768, 768, experts=512, factorization=TensorRing((4, 4, 90)))
    >>> spec.expert_rank, spec.expert_span
    (360, 16)
    """

    rank: int | tuple[int, ...]
    name: ClassVar[str] = "tensor_ring"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=False))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("a",) * (levels + 1) + ("s",)

    def with_rank(self, rank: tuple[int, ...]) -> TensorRing:
        return TensorRing(rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return spread_rank(
            self.rank, levels + 2, f"one per mode of {levels} expert level(s), in, out"
        )

    def factors(self, levels: int) -> tuple[Factor, ...]:
        modes = (*(expert_leg(level) for level in range(levels)), INPUT, OUTPUT)
        names = mode_names(levels)
        return tuple(
            Factor(name, (mode, f"r{k}", f"r{(k + 1) % len(modes)}"))
            for k, (name, mode) in enumerate(zip(names, modes, strict=True))
        )

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {f"r{k}": size for k, size in enumerate(self.bonds(len(experts)))}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        levels = len(experts)
        bonds = self.bonds(levels)
        if checked_scheme(scheme) == "paper":
            # N(1, 1) on the diagonal of the first level, plain identities after: appendix F.2
            starts = {
                f"expert_{e}": Initializer(0.0 if e else 1.0, "normal", "identity", diagonal=True)
                for e in range(levels)
            }
            output = Initializer(linear_std(bonds[0] * bonds[-1]))
            return starts | {"input": Initializer(linear_std(in_features)), "output": output}
        noises, norm = chain_energy(bonds[:-1], noise_share(levels))
        starts = {
            f"expert_{e}": Initializer(sqrt(noise), "normal", "tiled")
            for e, noise in enumerate(noises)
        }
        return starts | {
            "input": Initializer(1.0 / sqrt(in_features)),
            "output": Initializer(1.0 / sqrt(3.0 * bonds[-1] * norm)),
        }

    def upcycled_factors(
        self,
        experts: tuple[int, ...],
        in_features: int,
        table: Array,
        split: Split,
        backend: Backend,
    ) -> dict[str, Array]:
        return shared_ring(experts, self.bonds(len(experts)), table, split, backend)

    def expert_variance(self, levels: int) -> float:
        # a core has an entry for every pair of bonds, min(r₁, …)² that count
        return 1.0 / min(self.bonds(levels)[:-1])

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """The cores (r, n, r′) of ``tensorly.tr_to_tensor``."""
        return cores_to_tensorly(factors, [name for name in factors if name != "bias"], xp)

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        cores = cores_of(decomposition, self.name)
        return cores_from_tensorly(cores, mode_names(len(cores) - 2), xp)

"""Tensor train: a tensor ring whose outer bond is 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

from tensormoe.backend import Array, Backend
from tensormoe.errors import ShapeError
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
class TensorTrain(Factorization):
    """𝒲[n, i, o] = C₁[n] C_in[i] C_out[o], matrices of a train (Oldfield et al. 2024, r₁ = 1).

    The outer bond of the ring is 1 and is not stored: C₁ is (N, r₁), C_out is (O, r₂).
    Nr₁ + r₁Ir₂ + r₂O parameters. Expert rank min(r₂, I, O), expert span min(N, r₁, …).

    Args:
        rank: the bonds along the train: one after each expert mode, then the one between the input
            and the output mode; (16, 200) for one level. One integer for all bonds alike.

    Raises:
        RankError: an entry is not a positive integer, or their number does not fit the levels.

    >>> from tensormoe import LayerSpec
    >>> LayerSpec(6, 5, 4, TensorTrain((2, 3)), bias=False).num_parameters
    59
    """

    rank: int | tuple[int, ...]
    name: ClassVar[str] = "tensor_train"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", checked_rank(self.rank, single=False))

    def rank_pattern(self, levels: int) -> tuple[str, ...]:
        return ("a",) * levels + ("s",)

    def with_rank(self, rank: tuple[int, ...]) -> TensorTrain:
        return TensorTrain(rank)

    def bonds(self, levels: int) -> tuple[int, ...]:
        return spread_rank(
            self.rank, levels + 1, f"one after each of {levels} expert level(s) and after the input"
        )

    def factors(self, levels: int) -> tuple[Factor, ...]:
        modes = (*(expert_leg(level) for level in range(levels)), INPUT, OUTPUT)
        bonds: list[tuple[Leg, ...]] = [(f"r{k - 1}", f"r{k}") for k in range(len(modes))]
        bonds[0], bonds[-1] = bonds[0][1:], bonds[-1][:1]
        return tuple(
            Factor(name, (mode, *legs))
            for name, mode, legs in zip(mode_names(levels), modes, bonds, strict=True)
        )

    def bond_sizes(self, experts: tuple[int, ...], out_features: int) -> Mapping[Leg, int]:
        return {f"r{k}": size for k, size in enumerate(self.bonds(len(experts)))}

    def initializers(
        self, experts: tuple[int, ...], in_features: int, out_features: int, scheme: str
    ) -> Mapping[str, Initializer]:
        levels = len(experts)
        bonds = (1, *self.bonds(levels))
        if checked_scheme(scheme) == "paper":
            # the ring's scheme with r₁ = 1; the first core, a vector, starts at ones so that
            # every bond carries signal (an identity of one row would use a single one)
            starts = {
                f"expert_{e}": Initializer(
                    0.0 if e else 1.0, "normal", "identity" if e else "one", diagonal=e > 0
                )
                for e in range(levels)
            }
            output = Initializer(linear_std(bonds[-1]))
            return starts | {"input": Initializer(linear_std(in_features)), "output": output}
        noises, norm = chain_energy(bonds[:-1], noise_share(levels))
        starts = {
            f"expert_{e}": Initializer(sqrt(noise), "normal", "tiled" if e else "one")
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
        stored = shared_ring(experts, (1, *self.bonds(len(experts))), table, split, backend)
        stored["expert_0"] = stored["expert_0"][:, 0, :]
        stored["output"] = stored["output"][:, :, 0]
        return stored

    def to_tensorly(self, factors: Mapping[str, Array], xp: Any) -> Any:
        """The cores (r, n, r′) of ``tensorly.tt_to_tensor``, the outer bonds 1 included."""
        names = [name for name in factors if name != "bias"]
        stored = dict(factors)
        stored["expert_0"] = xp.expand_dims(factors["expert_0"], axis=1)
        stored["output"] = xp.expand_dims(factors["output"], axis=2)
        return cores_to_tensorly(stored, names, xp)

    def from_tensorly(self, decomposition: Any, xp: Any) -> dict[str, Array]:
        cores = cores_of(decomposition, self.name)
        stored = cores_from_tensorly(cores, mode_names(len(cores) - 2), xp)
        if cores[0].shape[0] != 1 or cores[-1].shape[2] != 1:
            raise ShapeError(
                "a tensor train must have outer bonds of 1; got cores of shapes "
                f"{tuple(cores[0].shape)} and {tuple(cores[-1].shape)}. A train that is closed to "
                "a ring is a TensorRing."
            )
        stored["expert_0"] = stored["expert_0"][:, 0, :]
        stored["output"] = stored["output"][:, :, 0]
        return stored

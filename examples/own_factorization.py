"""Add a factorization in one file: experts as mixtures of a few shared matrices.

    python examples/own_factorization.py

𝒲[n, i, o] = Σ_p C[n, p] B[i, p, o]: P full-rank matrices that all experts share, P numbers an
expert. Naming the legs is all that the planner, the costs, the capacities, the gradients, rank
selection, decomposition and the contract suite need; registering the class lets its name go into
checkpoints, so that every framework opens them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np

from tensormoe import Factorization, LayerSpec, register_factorization, select_rank
from tensormoe.decomposition import decompose
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Initializer, Leg, expert_leg
from tensormoe_numpy import MuMoE


@register_factorization
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


def prove() -> None:
    """Run a layer, and compare it with its experts multiplied out."""
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
    print(f"\nFactorized and unfactorized differ by {error:.1e}")
    assert error < 1e-12
    assert np.linalg.matrix_rank(weights.reshape(500, -1)) == spec.expert_span
    assert np.linalg.matrix_rank(weights[0]) == spec.expert_rank


def choose_and_save(folder: Path) -> None:
    """The rank by a budget, from nothing and from experts; the file in other libraries."""
    rank = select_rank("mixtures", 96, 64, 500, budget=60_000, gate=None)
    layer = MuMoE(96, 64, 500, "mixtures", budget=60_000, gate=None, seed=0)
    print(
        f"\nA budget of 60,000 parameters buys rank {rank}, {layer.spec.num_parameters:,} of them."
    )

    rng = np.random.default_rng(0)
    experts = np.einsum("np,pio->nio", rng.standard_normal((40, 3)), rng.standard_normal((3, 9, 8)))
    found = decompose(experts, "mixtures", budget=0.2)
    print(f"Of 40 experts, {found.spec.factorization} keeps all but {found.report.error:.0e}.")
    assert found.report.error < 1e-6

    path = folder / "mixtures.safetensors"
    layer.save(path)
    x, shares = rng.standard_normal((4, 96)), rng.dirichlet(np.ones(500), 4)
    x, shares = x.astype("float32"), shares.astype("float32")
    want = layer(x, coefficients=shares)
    assert np.array_equal(MuMoE.load(path)(x, coefficients=shares), want)
    if find_spec("torch"):
        import torch

        import tensormoe_torch

        opened = tensormoe_torch.MuMoE.load(path)
        given = torch.from_numpy(x), torch.from_numpy(shares)
        with torch.no_grad():
            got = opened(given[0], coefficients=given[1]).numpy()
        print(f"PyTorch opens the file: {opened.spec.factorization}.")
        assert np.allclose(got, want, atol=1e-5)
    if find_spec("jax") and find_spec("flax"):
        import jax.numpy as jnp

        from tensormoe_jax import nnx

        opened = nnx.MuMoE.load(path)
        got = opened(jnp.asarray(x), coefficients=jnp.asarray(shares))
        print(f"JAX opens it too: {opened.spec.factorization}.")
        assert np.allclose(got, want, atol=1e-5)


def main() -> None:
    prove()
    with TemporaryDirectory() as folder:
        choose_and_save(Path(folder))


if __name__ == "__main__":
    main()

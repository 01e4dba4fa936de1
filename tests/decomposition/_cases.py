"""What the tests of decomposition share: planted tensors, and an oracle of the reconstruction."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from tensormoe import (
    CP,
    BaseDelta,
    Hadamard,
    LayerSpec,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.backend import backend_of
from tensormoe.decomposition import _starts
from tensormoe.decomposition._contractions import Structure, structures
from tensormoe.decomposition._source import Source
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.testing import reconstruct_by_einsum
from tests._kinds import KINDS

NAMES = [kind.name for kind in KINDS if kind.name != "dense"]


def planted(name: str, seed: int) -> tuple[LayerSpec, np.ndarray]:
    """A random layer of a factorization, and its weights: one or two levels, small ranks."""
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, 3))
    experts = tuple(int(size) for size in rng.integers(3, 8, levels))
    rows, columns = (int(size) for size in rng.integers(6, 20, 2))

    def ranks(count: int) -> tuple[int, ...]:
        return tuple(int(size) for size in rng.integers(1, 4, count))

    def tucker() -> Tucker:
        sizes = ranks(levels + 2)
        # of a bond larger than all others together, the rest has nothing to stand for
        return Tucker(tuple(min(size, prod(sizes) // size) for size in sizes))

    kinds: dict[str, Any] = {
        "cp": lambda: CP(int(rng.integers(1, 6))),
        "tensor_ring": lambda: TensorRing(ranks(levels + 2)),
        "tensor_train": lambda: TensorTrain(ranks(levels + 1)),
        "tucker": tucker,
        "low_rank": lambda: LowRank(*ranks(1)),
        "hadamard": Hadamard,
        "shared_basis": lambda: SharedBasis(ranks(2)),
        "base_delta": lambda: BaseDelta(*ranks(1)),
        "shared_delta": lambda: SharedDelta(*ranks(1)),
    }
    spec = LayerSpec(rows, columns, experts, kinds[name](), bias=False)
    factors = {key: rng.standard_normal(shape) for key, shape in spec.shapes.items()}
    return spec, weights_of(spec, factors)


def weights_of(spec: LayerSpec, factors: Any) -> np.ndarray:
    """The weights of factors, by one einsum in float64, the bias left out."""
    plain = {name: array for name, array in factors.items() if not name.startswith("bias")}
    return np.asarray(reconstruct_by_einsum(spec.factorization, plain))


def with_noise(weights: np.ndarray, level: float, seed: int) -> tuple[np.ndarray, float]:
    """Weights with noise of a share of their norm, and that share of the sum's norm."""
    noise = np.random.default_rng(seed).standard_normal(weights.shape)
    noise *= level * np.linalg.norm(weights) / np.linalg.norm(noise)
    return weights + noise, float(np.linalg.norm(noise) / np.linalg.norm(weights + noise))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def spec_of(kind: Any, weights: Any) -> LayerSpec:
    """A layer without bias whose weights have that shape."""
    return LayerSpec(*weights.shape[-2:], tuple(weights.shape[:-2]), kind, bias=False)


def structure_of(spec: LayerSpec) -> Structure:
    """The only term of a network."""
    network = spec.network
    (found,) = structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)
    return found


def started(kind: Any, weights: Any, place: int = 0, seed: int = 0) -> dict[str, Any]:
    """Where a search starts."""
    source = Source(weights, backend_of(weights))
    structure = structure_of(spec_of(kind, weights))
    return _starts.start(structure, source, place, np.random.default_rng(seed))


def random_weights(
    kind: Any, sizes: tuple[int, int], levels: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """The weights of random factors."""
    spec = LayerSpec(*sizes, levels, kind, bias=False)
    return weights_of(spec, {k: rng.standard_normal(shape) for k, shape in spec.shapes.items()})

"""Many experts at the price of one layer: factorized mixtures of linear experts.

A mixture of N linear experts is one tensor 𝒲 (experts…, in, out). tensormoe stores it as a small
tensor network that is never multiplied out, plans the cheapest way to contract it, and knows what
that costs before any array exists. This package is the core: it plans on shapes and imports no
array library. Layers are in ``tensormoe_numpy`` and its siblings.

>>> from tensormoe import CP, LayerSpec
>>> spec = LayerSpec(768, 768, experts=512, factorization=CP(rank=256))
>>> spec.num_experts, spec.num_parameters, spec.expert_rank
(512, 524544, 256)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensormoe._spec import LayerSpec
    from tensormoe.backend import (
        available_backends,
        backend_of,
        convert,
        get_backend,
        known_backends,
    )
    from tensormoe.factorizations import (
        CP,
        BaseDelta,
        Dense,
        Factorization,
        Hadamard,
        LowRank,
        SharedBasis,
        SharedDelta,
        TensorRing,
        TensorTrain,
        Tucker,
        from_tensorly,
        register_factorization,
        to_tensorly,
    )
    from tensormoe.gates import Gate, TopK, entmax, softmax, sparsemax
    from tensormoe.planning import Cost, Plan, Roofline
    from tensormoe.selection import Budget, RankChoice, rank_front, select_rank

__all__ = [
    "CP",
    "BaseDelta",
    "Budget",
    "Cost",
    "Dense",
    "Factorization",
    "Gate",
    "Hadamard",
    "LayerSpec",
    "LowRank",
    "Plan",
    "RankChoice",
    "Roofline",
    "SharedBasis",
    "SharedDelta",
    "TensorRing",
    "TensorTrain",
    "TopK",
    "Tucker",
    "available_backends",
    "backend_of",
    "convert",
    "entmax",
    "from_tensorly",
    "get_backend",
    "known_backends",
    "rank_front",
    "register_factorization",
    "select_rank",
    "softmax",
    "sparsemax",
    "to_tensorly",
]

__version__ = "0.1.0.dev0"

# fmt: off
_NAMES = {
    "tensormoe._spec": ("LayerSpec",),
    "tensormoe.backend": (
        "available_backends", "backend_of", "convert", "get_backend", "known_backends"
    ),
    "tensormoe.factorizations": (
        "CP", "BaseDelta", "Dense", "Factorization", "Hadamard", "LowRank",
        "SharedBasis", "SharedDelta", "TensorRing", "TensorTrain", "Tucker", "from_tensorly",
        "register_factorization", "to_tensorly"
    ),
    "tensormoe.gates": ("Gate", "TopK", "entmax", "softmax", "sparsemax"),
    "tensormoe.planning": ("Cost", "Plan", "Roofline"),
    "tensormoe.selection": ("Budget", "RankChoice", "rank_front", "select_rank"),
}
# fmt: on
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
_PACKAGES = ("backend", "errors", "factorizations", "gates", "planning", "selection")


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported when it is first asked for."""
    if name in _PACKAGES:
        return import_module(f"tensormoe.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tensormoe' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})

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

from tensormoe._spec import LayerSpec as LayerSpec
from tensormoe.backend import available_backends as available_backends
from tensormoe.backend import backend_of as backend_of
from tensormoe.backend import convert as convert
from tensormoe.backend import get_backend as get_backend
from tensormoe.backend import known_backends as known_backends
from tensormoe.factorizations import CP as CP
from tensormoe.factorizations import BaseDelta as BaseDelta
from tensormoe.factorizations import Dense as Dense
from tensormoe.factorizations import Factorization as Factorization
from tensormoe.factorizations import Hadamard as Hadamard
from tensormoe.factorizations import SharedBasis as SharedBasis
from tensormoe.factorizations import SharedDelta as SharedDelta
from tensormoe.factorizations import TensorRing as TensorRing
from tensormoe.factorizations import TensorTrain as TensorTrain
from tensormoe.factorizations import Tucker as Tucker
from tensormoe.factorizations import from_tensorly as from_tensorly
from tensormoe.factorizations import register_factorization as register_factorization
from tensormoe.factorizations import to_tensorly as to_tensorly
from tensormoe.gates import Gate as Gate
from tensormoe.gates import TopK as TopK
from tensormoe.gates import entmax as entmax
from tensormoe.gates import softmax as softmax
from tensormoe.gates import sparsemax as sparsemax
from tensormoe.planning import Cost as Cost
from tensormoe.planning import Plan as Plan
from tensormoe.planning import Roofline as Roofline
from tensormoe.selection import Budget as Budget
from tensormoe.selection import RankChoice as RankChoice
from tensormoe.selection import rank_front as rank_front
from tensormoe.selection import select_rank as select_rank

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

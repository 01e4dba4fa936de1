"""Storage of the expert tensor 𝒲 (experts…, in, out): one frozen value per factorization.

| value | network | expert rank (one level) | expert span |
| --- | --- | --- | --- |
| `CP(rank=R)` | one bond shared by all factors | min(R, I, O) | min(N, R, I·O) |
| `TensorRing(rank=(r₁, r₂, r₃))` | a ring of cores | min(r₃·min(r₁, r₂), I, O) | min(N, r₁r₂, …) |
| `TensorTrain(rank=(r₁, r₂))` | a ring with an outer bond of 1 | min(r₂, I, O) | min(N, r₁, …) |
| `Tucker(rank=(p, q, s))` | a core, one factor per mode | min(q, s, I, O) | min(N, p, qs) |
| `LowRank(rank=r)` | a product of rank r for each expert | min(r, I, O) | min(N, I·O) |
| `SharedBasis(rank=(J, r))` | mixtures of J matrices, times own ones | min(r, I, O) | min(N, …) |
| `BaseDelta(rank=r)` | a common matrix plus products of rank r | min(I, O) | min(N, I·O) |
| `SharedDelta(rank=r)` | the same, one side shared | min(I, O) | min(N, 1 + r·min(I, O)) |
| `Hadamard()` | the output mode is a hyperedge | min(I, O) | min(N, O) |
| `Dense()` | 𝒲 itself | min(I, O) | min(N, I·O) |
"""

from __future__ import annotations

from tensormoe.factorizations._base import INITIALIZATIONS as INITIALIZATIONS
from tensormoe.factorizations._base import Factorization as Factorization
from tensormoe.factorizations._base_delta import BaseDelta as BaseDelta
from tensormoe.factorizations._base_delta import SharedDelta as SharedDelta
from tensormoe.factorizations._classes import sample as sample
from tensormoe.factorizations._cp import CP as CP
from tensormoe.factorizations._dense import Dense as Dense
from tensormoe.factorizations._experts import expert_axes as expert_axes
from tensormoe.factorizations._experts import expert_carriers as expert_carriers
from tensormoe.factorizations._experts import has_common_part as has_common_part
from tensormoe.factorizations._hadamard import Hadamard as Hadamard
from tensormoe.factorizations._initialization import Draw as Draw
from tensormoe.factorizations._initialization import Initializer as Initializer
from tensormoe.factorizations._initialization import draw_factor as draw_factor
from tensormoe.factorizations._low_rank import LowRank as LowRank
from tensormoe.factorizations._named import FACTORIZATIONS as FACTORIZATIONS
from tensormoe.factorizations._named import FactorizationLike as FactorizationLike
from tensormoe.factorizations._named import factorization_class as factorization_class
from tensormoe.factorizations._named import rank_pattern as rank_pattern
from tensormoe.factorizations._named import register_factorization as register_factorization
from tensormoe.factorizations._named import resolve_factorization as resolve_factorization
from tensormoe.factorizations._network import BATCH as BATCH
from tensormoe.factorizations._network import INPUT as INPUT
from tensormoe.factorizations._network import OUTPUT as OUTPUT
from tensormoe.factorizations._network import Cut as Cut
from tensormoe.factorizations._network import Factor as Factor
from tensormoe.factorizations._network import Leg as Leg
from tensormoe.factorizations._network import Network as Network
from tensormoe.factorizations._network import Term as Term
from tensormoe.factorizations._network import expert_leg as expert_leg
from tensormoe.factorizations._shared_basis import SharedBasis as SharedBasis
from tensormoe.factorizations._slice import Slice as Slice
from tensormoe.factorizations._slice import resized as resized
from tensormoe.factorizations._tensor_ring import TensorRing as TensorRing
from tensormoe.factorizations._tensor_train import TensorTrain as TensorTrain
from tensormoe.factorizations._tensorly import from_tensorly as from_tensorly
from tensormoe.factorizations._tensorly import to_tensorly as to_tensorly
from tensormoe.factorizations._tucker import Tucker as Tucker
from tensormoe.factorizations._updates import Response as Response
from tensormoe.factorizations._updates import responses as responses

__all__ = [
    "BATCH",
    "CP",
    "FACTORIZATIONS",
    "INITIALIZATIONS",
    "INPUT",
    "OUTPUT",
    "BaseDelta",
    "Cut",
    "Dense",
    "Factor",
    "Factorization",
    "FactorizationLike",
    "Hadamard",
    "Initializer",
    "Leg",
    "LowRank",
    "Network",
    "Response",
    "SharedBasis",
    "SharedDelta",
    "Slice",
    "TensorRing",
    "TensorTrain",
    "Term",
    "Tucker",
    "draw_factor",
    "expert_axes",
    "expert_carriers",
    "expert_leg",
    "factorization_class",
    "from_tensorly",
    "has_common_part",
    "rank_pattern",
    "register_factorization",
    "resolve_factorization",
    "responses",
    "to_tensorly",
]

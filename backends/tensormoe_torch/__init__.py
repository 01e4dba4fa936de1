"""tensormoe on PyTorch: layers as modules, for training, compiling and exporting.

Mixtures that are run expert by expert are in :mod:`tensormoe_torch.mixtures`. What works on models
of others has rooms with their own names: :mod:`tensormoe_torch.surgery`,
:mod:`tensormoe_torch.mxd` (MLPs imitated by mixtures of decoders),
:mod:`tensormoe_torch.compression`, :mod:`tensormoe_torch.official` (state dicts of the paper's
code) and :mod:`tensormoe_torch.huggingface`. The verbs to start with are here as well; classes of
reports and of replaced modules are in the rooms alone.
"""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_torch", ("torch",), "torch"):
    raise absent

from tensormoe_torch._adapter import BACKEND, TorchBackend
from tensormoe_torch._contexts import restored, steered
from tensormoe_torch._editing import (
    merge_experts,
    permute_experts,
    replace_expert,
    scale_experts,
    silence_experts,
)
from tensormoe_torch._embedding import MuMoEEmbedding
from tensormoe_torch._factors import Factors
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._groups import parameter_groups
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch._per_sample import per_sample_gradients
from tensormoe_torch._routing import (
    scaled_routing,
    silenced_routing,
    steer_router,
    steered_routing,
)
from tensormoe_torch._synchronize import synchronize_gates
from tensormoe_torch.compression import compress, reduce_experts
from tensormoe_torch.mixtures import (
    CartesianMoE,
    ConvMoE,
    DiverseMoE,
    MonetMoE,
    MultiGateMoE,
    ProductMoE,
    ResidualExperts,
    SoftMoE,
    SparseMoE,
    from_conv,
)
from tensormoe_torch.official import from_official, to_official
from tensormoe_torch.surgery import from_linear, from_mlp, replace

__all__ = [
    "BACKEND",
    "CartesianMoE",
    "ConvMoE",
    "DiverseMoE",
    "ExpertGate",
    "Factors",
    "MonetMoE",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "MultiGateMoE",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SparseMoE",
    "TorchBackend",
    "compress",
    "from_conv",
    "from_linear",
    "from_mlp",
    "from_official",
    "merge_experts",
    "parameter_groups",
    "per_sample_gradients",
    "permute_experts",
    "reduce_experts",
    "replace",
    "replace_expert",
    "restored",
    "scale_experts",
    "scaled_routing",
    "silence_experts",
    "silenced_routing",
    "steer_router",
    "steered",
    "steered_routing",
    "synchronize_gates",
    "to_official",
]

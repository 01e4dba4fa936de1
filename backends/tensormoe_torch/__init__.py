"""tensormoe on PyTorch: layers as modules, for training, compiling and exporting.

What works on models of others has rooms with their own names: :mod:`tensormoe_torch.surgery`,
:mod:`tensormoe_torch.mxd` (MLPs imitated by mixtures of decoders),
:mod:`tensormoe_torch.compression`, :mod:`tensormoe_torch.official` (state dicts of the paper's
code) and :mod:`tensormoe_torch.huggingface`. The verbs to start with are here as well; classes of
reports and of replaced modules are in the rooms alone.
"""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe_torch", ("torch",), "torch"):
    raise absent

from tensormoe_torch._adapter import BACKEND as BACKEND
from tensormoe_torch._adapter import TorchBackend as TorchBackend
from tensormoe_torch._editing import replace_expert as replace_expert
from tensormoe_torch._editing import restored as restored
from tensormoe_torch._editing import scale_experts as scale_experts
from tensormoe_torch._editing import silence_experts as silence_experts
from tensormoe_torch._embedding import MuMoEEmbedding as MuMoEEmbedding
from tensormoe_torch._factors import Factors as Factors
from tensormoe_torch._gate import ExpertGate as ExpertGate
from tensormoe_torch._groups import parameter_groups as parameter_groups
from tensormoe_torch._layer import MuMoE as MuMoE
from tensormoe_torch._mlp import MuMoEMLP as MuMoEMLP
from tensormoe_torch._per_sample import per_sample_gradients as per_sample_gradients
from tensormoe_torch._synchronize import synchronize_gates as synchronize_gates
from tensormoe_torch.compression import compress as compress
from tensormoe_torch.official import from_official as from_official
from tensormoe_torch.official import to_official as to_official
from tensormoe_torch.surgery import from_linear as from_linear
from tensormoe_torch.surgery import from_mlp as from_mlp
from tensormoe_torch.surgery import replace as replace

__all__ = [
    "BACKEND",
    "ExpertGate",
    "Factors",
    "MuMoE",
    "MuMoEEmbedding",
    "MuMoEMLP",
    "TorchBackend",
    "compress",
    "from_linear",
    "from_mlp",
    "from_official",
    "parameter_groups",
    "per_sample_gradients",
    "replace",
    "replace_expert",
    "restored",
    "scale_experts",
    "silence_experts",
    "synchronize_gates",
    "to_official",
]

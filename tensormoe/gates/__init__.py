"""Gates: from logits to expert coefficients, on arrays of any library.

One implementation on the Array-API standard serves all backends. Nothing here keeps state.
"""

from __future__ import annotations

from tensormoe.gates._activate import Activation as Activation
from tensormoe.gates._activate import Statistics as Statistics
from tensormoe.gates._activate import activate as activate
from tensormoe.gates._activate import activate_vjp as activate_vjp
from tensormoe.gates._activate import batch_norm as batch_norm
from tensormoe.gates._entropy import entropy as entropy
from tensormoe.gates._entropy import entropy_loss as entropy_loss
from tensormoe.gates._entropy import entropy_loss_vjp as entropy_loss_vjp
from tensormoe.gates._functions import entmax as entmax
from tensormoe.gates._functions import softmax as softmax
from tensormoe.gates._functions import sparsemax as sparsemax
from tensormoe.gates._gate import Gate as Gate
from tensormoe.gates._load import balanced_bias as balanced_bias
from tensormoe.gates._load import expert_load as expert_load
from tensormoe.gates._losses import importance_loss as importance_loss
from tensormoe.gates._losses import importance_loss_vjp as importance_loss_vjp
from tensormoe.gates._losses import load_balance_loss as load_balance_loss
from tensormoe.gates._losses import load_balance_loss_vjp as load_balance_loss_vjp
from tensormoe.gates._losses import z_loss as z_loss
from tensormoe.gates._losses import z_loss_vjp as z_loss_vjp
from tensormoe.gates._normalization import Across as Across
from tensormoe.gates._one_expert import OneExpert as OneExpert
from tensormoe.gates._relu_top_k import relu_top_k as relu_top_k
from tensormoe.gates._top_k import TopK as TopK
from tensormoe.gates._top_k import top_k as top_k
from tensormoe.gates._top_k import top_k_indices as top_k_indices
from tensormoe.gates._top_k import top_k_indices_vjp as top_k_indices_vjp
from tensormoe.gates._workspace import workspace as workspace

__all__ = [
    "Across",
    "Activation",
    "Gate",
    "OneExpert",
    "Statistics",
    "TopK",
    "activate",
    "activate_vjp",
    "balanced_bias",
    "batch_norm",
    "entmax",
    "entropy",
    "entropy_loss",
    "entropy_loss_vjp",
    "expert_load",
    "importance_loss",
    "importance_loss_vjp",
    "load_balance_loss",
    "load_balance_loss_vjp",
    "relu_top_k",
    "softmax",
    "sparsemax",
    "top_k",
    "top_k_indices",
    "top_k_indices_vjp",
    "workspace",
    "z_loss",
    "z_loss_vjp",
]

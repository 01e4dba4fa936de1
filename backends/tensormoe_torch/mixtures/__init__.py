"""Mixtures whose experts are run one by one, as modules."""

from __future__ import annotations

from tensormoe_torch.mixtures._base import MixtureModule as MixtureModule
from tensormoe_torch.mixtures._cartesian import CartesianMoE as CartesianMoE
from tensormoe_torch.mixtures._conv import ConvExperts as ConvExperts
from tensormoe_torch.mixtures._conv import ConvFactors as ConvFactors
from tensormoe_torch.mixtures._conv import ConvMoE as ConvMoE
from tensormoe_torch.mixtures._diverse import DiverseExperts as DiverseExperts
from tensormoe_torch.mixtures._diverse import DiverseMoE as DiverseMoE
from tensormoe_torch.mixtures._from_conv import from_conv as from_conv
from tensormoe_torch.mixtures._monet import Halves as Halves
from tensormoe_torch.mixtures._monet import MonetMoE as MonetMoE
from tensormoe_torch.mixtures._multi_gate import GatedExperts as GatedExperts
from tensormoe_torch.mixtures._multi_gate import MultiGateMoE as MultiGateMoE
from tensormoe_torch.mixtures._multi_gate import TaskRouter as TaskRouter
from tensormoe_torch.mixtures._neurons import NeuronNetworks as NeuronNetworks
from tensormoe_torch.mixtures._neurons import NeuronTables as NeuronTables
from tensormoe_torch.mixtures._product import ProductMoE as ProductMoE
from tensormoe_torch.mixtures._residual import Adapter as Adapter
from tensormoe_torch.mixtures._residual import ResidualExperts as ResidualExperts
from tensormoe_torch.mixtures._robustness import without_best_experts as without_best_experts
from tensormoe_torch.mixtures._router import MixtureRouter as MixtureRouter
from tensormoe_torch.mixtures._router import SparseRouter as SparseRouter
from tensormoe_torch.mixtures._soft import SoftMoE as SoftMoE
from tensormoe_torch.mixtures._soft import SoftRouter as SoftRouter
from tensormoe_torch.mixtures._sparse import SparseMoE as SparseMoE

__all__ = [
    "Adapter",
    "CartesianMoE",
    "ConvExperts",
    "ConvFactors",
    "ConvMoE",
    "DiverseExperts",
    "DiverseMoE",
    "GatedExperts",
    "Halves",
    "MixtureModule",
    "MixtureRouter",
    "MonetMoE",
    "MultiGateMoE",
    "NeuronNetworks",
    "NeuronTables",
    "ProductMoE",
    "ResidualExperts",
    "SoftMoE",
    "SoftRouter",
    "SparseMoE",
    "SparseRouter",
    "TaskRouter",
    "from_conv",
    "without_best_experts",
]

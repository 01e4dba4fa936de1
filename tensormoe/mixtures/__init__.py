"""Mixtures whose experts are run one by one, beside those that are one tensor.

A mixture is a configuration (:class:`tensormoe._mixture.MixtureConfig`), made of layers and a few
arrays of its own, and a formula that runs them (:class:`Parts` say how). Every framework's classes
are thin wrappers of these.
"""

from __future__ import annotations

from tensormoe._mixture import MixtureConfig as MixtureConfig
from tensormoe._mixture import OwnArray as OwnArray
from tensormoe.mixtures._by_size import Dispatch as Dispatch
from tensormoe.mixtures._by_size import send_by_size as send_by_size
from tensormoe.mixtures._cartesian import CartesianConfig as CartesianConfig
from tensormoe.mixtures._cartesian import rms_norm as rms_norm
from tensormoe.mixtures._cartesian_options import cartesian_config as cartesian_config
from tensormoe.mixtures._conv import ConvConfig as ConvConfig
from tensormoe.mixtures._conv_cost import ConvPlan as ConvPlan
from tensormoe.mixtures._conv_options import conv_config as conv_config
from tensormoe.mixtures._conv_run import check_coefficients as check_coefficients
from tensormoe.mixtures._conv_run import check_images as check_images
from tensormoe.mixtures._conv_run import convolve as convolve
from tensormoe.mixtures._conv_run import expert_kernel as expert_kernel
from tensormoe.mixtures._diverse import DiverseConfig as DiverseConfig
from tensormoe.mixtures._diverse import diverse_config as diverse_config
from tensormoe.mixtures._experts import ExpertsConfig as ExpertsConfig
from tensormoe.mixtures._experts import experts_config as experts_config
from tensormoe.mixtures._experts import gate_of as gate_of
from tensormoe.mixtures._experts import gated as gated
from tensormoe.mixtures._experts import hidden_units as hidden_units
from tensormoe.mixtures._experts import run_expert as run_expert
from tensormoe.mixtures._gate_stage import GateStage as GateStage
from tensormoe.mixtures._gate_stage import Inputs as Inputs
from tensormoe.mixtures._gate_stage import mix_tasks as mix_tasks
from tensormoe.mixtures._groups import grouped_index as grouped_index
from tensormoe.mixtures._initialize import draw_own as draw_own
from tensormoe.mixtures._initialize import initialize_mixture as initialize_mixture
from tensormoe.mixtures._keys import Keys as Keys
from tensormoe.mixtures._monet import MonetConfig as MonetConfig
from tensormoe.mixtures._monet import monet_config as monet_config
from tensormoe.mixtures._multi_gate import MultiGateConfig as MultiGateConfig
from tensormoe.mixtures._multi_gate_options import multi_gate_config as multi_gate_config
from tensormoe.mixtures._neurons import run_networks as run_networks
from tensormoe.mixtures._neurons import run_tables as run_tables
from tensormoe.mixtures._parts import Parts as Parts
from tensormoe.mixtures._parts import activation as activation
from tensormoe.mixtures._parts import check_routes as check_routes
from tensormoe.mixtures._parts import layers_of as layers_of
from tensormoe.mixtures._parts import run_all as run_all
from tensormoe.mixtures._parts import run_routed as run_routed
from tensormoe.mixtures._parts import run_shared as run_shared
from tensormoe.mixtures._parts import send as send
from tensormoe.mixtures._parts import with_shared as with_shared
from tensormoe.mixtures._product import ProductConfig as ProductConfig
from tensormoe.mixtures._product import merged_choices as merged_choices
from tensormoe.mixtures._product import product_config as product_config
from tensormoe.mixtures._residual import ResidualConfig as ResidualConfig
from tensormoe.mixtures._residual import add_residual as add_residual
from tensormoe.mixtures._residual import check_base as check_base
from tensormoe.mixtures._residual import residual_config as residual_config
from tensormoe.mixtures._residual_files import Adapters as Adapters
from tensormoe.mixtures._residual_files import adapter_of as adapter_of
from tensormoe.mixtures._residual_files import check_adapters as check_adapters
from tensormoe.mixtures._residual_files import read_adapters as read_adapters
from tensormoe.mixtures._residual_merge import check_merge as check_merge
from tensormoe.mixtures._residual_merge import fixed_delta as fixed_delta
from tensormoe.mixtures._residual_merge import merged_experts as merged_experts
from tensormoe.mixtures._residual_merge import summed as summed
from tensormoe.mixtures._residual_start import start_at_zero as start_at_zero
from tensormoe.mixtures._routing import route_tokens as route_tokens
from tensormoe.mixtures._sent import run_sent as run_sent
from tensormoe.mixtures._sizes import paired_sizes as paired_sizes
from tensormoe.mixtures._soft import SoftConfig as SoftConfig
from tensormoe.mixtures._soft import counting_tokens as counting_tokens
from tensormoe.mixtures._soft_options import soft_config as soft_config
from tensormoe.mixtures._sparse import PER_CHOICE as PER_CHOICE
from tensormoe.mixtures._sparse import SparseConfig as SparseConfig
from tensormoe.mixtures._sparse import sparse_config as sparse_config
from tensormoe.mixtures._tasks import record_of as record_of
from tensormoe.mixtures._window import Window as Window
from tensormoe.mixtures._window import window as window

__all__ = [
    "PER_CHOICE",
    "Adapters",
    "CartesianConfig",
    "ConvConfig",
    "ConvPlan",
    "Dispatch",
    "DiverseConfig",
    "ExpertsConfig",
    "GateStage",
    "Inputs",
    "Keys",
    "MixtureConfig",
    "MonetConfig",
    "MultiGateConfig",
    "OwnArray",
    "Parts",
    "ProductConfig",
    "ResidualConfig",
    "SoftConfig",
    "SparseConfig",
    "Window",
    "activation",
    "adapter_of",
    "add_residual",
    "cartesian_config",
    "check_adapters",
    "check_base",
    "check_coefficients",
    "check_images",
    "check_merge",
    "check_routes",
    "conv_config",
    "convolve",
    "counting_tokens",
    "diverse_config",
    "draw_own",
    "expert_kernel",
    "experts_config",
    "fixed_delta",
    "gate_of",
    "gated",
    "grouped_index",
    "hidden_units",
    "initialize_mixture",
    "layers_of",
    "merged_choices",
    "merged_experts",
    "mix_tasks",
    "monet_config",
    "multi_gate_config",
    "paired_sizes",
    "product_config",
    "read_adapters",
    "record_of",
    "residual_config",
    "rms_norm",
    "route_tokens",
    "run_all",
    "run_expert",
    "run_networks",
    "run_routed",
    "run_sent",
    "run_shared",
    "run_tables",
    "send",
    "send_by_size",
    "soft_config",
    "sparse_config",
    "start_at_zero",
    "summed",
    "window",
    "with_shared",
]

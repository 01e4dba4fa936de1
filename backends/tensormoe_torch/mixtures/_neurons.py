"""Experts of a few hidden units each, as modules that are called with numbers and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormoe.gates import TopK
from tensormoe.mixtures import ProductConfig, run_networks, run_tables
from tensormoe_torch._activations import ACTIVATIONS
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._tracing import is_traced


class NeuronTables(nn.Module):
    """Experts whose vectors are rows of two tables: only those that are chosen are read.

    Args:
        config: the mixture.
        sparse: whether gradients of the tables are sparse tensors, of the rows that were read. A
            dense gradient has the table's size, whatever the batch. The attribute ``sparse`` of
            the tables, as of every ``nn.Embedding``, can be set at any time.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        up_proj: ``nn.Embedding`` (N, hidden · in).
        down_proj: ``nn.Embedding`` (N, hidden · out).
    """

    def __init__(
        self, config: ProductConfig, sparse: bool, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        for role, table in config.tables.items():
            # no table is drawn twice: a million rows take seconds
            empty = torch.empty(table.shape, device=device, dtype=dtype)
            self.add_module(role, nn.Embedding(*table.shape, sparse=sparse, _weight=empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both tables anew."""
        for role, table in self.config.tables.items():
            # in place: a million rows are gigabytes
            self.get_submodule(role).weight.uniform_(-table.size, table.size)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs (tokens, out) of experts, weighted.

        Args:
            hidden_states: (tokens, in).
            top_k_index: (tokens, k) numbers of experts.
            top_k_weights: (tokens, k), in any floating-point dtype.
        """

        def look_up(role: str, index: Tensor) -> Tensor:
            rows: Tensor = self.get_submodule(role)(index)
            return rows

        down: nn.Embedding = self.get_submodule("down_proj")  # type: ignore[assignment]
        # one pass over the rows without a copy; compilers fuse the two steps by themselves
        plain = not is_traced(hidden_states) and hidden_states.dtype == down.weight.dtype
        hooked = bool(down._forward_hooks or down._forward_pre_hooks or down._backward_hooks)
        made: Tensor = run_tables(
            look_up,
            _summed(down) if plain and not hooked else None,
            ACTIVATIONS[self.config.act_layer],
            self.config.hidden_features,
            hidden_states,
            top_k_index,
            top_k_weights,
            BACKEND,
        )
        return made


class NeuronNetworks(nn.Module):
    """Experts whose vectors are entries of tensor networks over the levels of their numbers.

    Args:
        config: the mixture.
        init: ``"variance"`` or ``"paper"``, of both layers.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        projections: :class:`MuMoE` layers without gates by role, ``up_proj`` and ``down_proj``.
    """

    def __init__(self, config: ProductConfig, init: str, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        layers = {} if config.factorized is None else config.factorized.layers
        self.projections = nn.ModuleDict(
            {role: MuMoE.of(layer, init, device, dtype) for role, layer in layers.items()}
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs (tokens, out) of experts, weighted; arguments as of :class:`NeuronTables`."""

        def project(role: str, rows: Tensor, given: tuple[TopK, ...]) -> Tensor:
            made: Tensor = self.projections[role](rows, given if len(given) > 1 else given[0])
            return made

        made: Tensor = run_networks(
            project,
            ACTIVATIONS[self.config.act_layer],
            self.config.keys.experts,
            hidden_states,
            top_k_index,
            top_k_weights,
            BACKEND,
        )
        return made


def _summed(table: nn.Embedding) -> Any:
    def combine(role: str, index: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(
            index,
            table.weight,
            per_sample_weights=weights.to(table.weight.dtype),
            mode="sum",
            sparse=table.sparse,
        )

    return combine

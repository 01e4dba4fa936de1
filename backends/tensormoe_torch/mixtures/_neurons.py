"""Experts of a few hidden units each, as modules that are called with numbers and weights."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormoe.errors import BackendError
from tensormoe.gates import OneExpert
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
            count, width = table.shape
            # no table is drawn twice: a million rows take seconds
            empty = torch.empty((count, width), device=device, dtype=dtype)
            self.add_module(role, nn.Embedding(count, width, sparse=sparse, _weight=empty))
        self.reset_parameters()

    @property
    def tables(self) -> dict[str, nn.Embedding]:
        """The tables by role."""
        found = {role: self.get_submodule(role) for role in self.config.tables}
        return {role: table for role, table in found.items() if isinstance(table, nn.Embedding)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both tables anew."""
        for role, table in self.tables.items():
            # in place: a million rows are gigabytes
            span = self.config.tables[role].size
            table.weight.uniform_(-span, span)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs (tokens, out) of experts, weighted.

        Args:
            hidden_states: (tokens, in).
            top_k_index: (tokens, k) numbers of experts.
            top_k_weights: (tokens, k), in any floating-point dtype.

        Raises:
            BackendError: tables with sparse gradients under a compiler.
        """
        run = run_tables
        if torch.is_grad_enabled() and any(table.sparse for table in self.tables.values()):
            run = _uncompiled()

        def look_up(role: str, index: Tensor) -> Tensor:
            rows: Tensor = self.get_submodule(role)(index)
            return rows

        down = self.get_submodule("down_proj")
        made: Tensor = run(
            look_up,
            _summed(down) if _is_plain(down, hidden_states) else None,
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

        def project(role: str, rows: Tensor, given: tuple[OneExpert, ...]) -> Tensor:
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


def _is_plain(table: nn.Module, x: Tensor) -> TypeGuard[nn.Embedding]:
    """Whether calling a table does no more than reading its rows, for inputs of its dtype.

    Compilers fuse the reading and the sum by themselves.
    """
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return False
    hooks = table._forward_hooks, table._forward_pre_hooks, table._backward_hooks
    if any(hooks) or is_traced(x) or is_traced(table.weight):
        return False
    return x.dtype == table.weight.dtype


def _uncompiled() -> Any:
    """The formula as the compiler must leave it, for it fails at sparse gradients.

    Raises:
        BackendError: inside of what is being compiled; the compiler takes this for the end of a
            graph, or reports it where there must be one graph.
    """
    if torch.compiler.is_compiling():
        raise BackendError(
            "tables must have dense gradients to be compiled for training; got sparse=True. Call "
            "sparse_gradients(False), or factorize the experts."
        )
    # to load the compiler takes a second
    return _disabled() if "torch._dynamo" in sys.modules else run_tables


@cache
def _disabled() -> Any:
    return torch.compiler.disable(run_tables)


def _summed(table: nn.Embedding) -> Any:
    """The sum of rows by weights in one pass, without a copy of the rows."""

    def combine(role: str, index: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(
            index,
            table.weight,
            per_sample_weights=weights.to(table.weight.dtype),
            mode="sum",
            sparse=table.sparse,
        )

    return combine

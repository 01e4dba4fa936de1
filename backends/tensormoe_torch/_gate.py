"""The gate of a layer as a module of its own: from inputs to coefficients."""

from __future__ import annotations

from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensormoe._layers import Methods
from tensormoe.checkpoint import check_config
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig, gate_bound, own_gate
from tensormoe.gates import Across, Gate, Statistics
from tensormoe_torch._autograd import no_autocast, route
from tensormoe_torch._checks import check_input
from tensormoe_torch._dtypes import checked_device, checked_dtype
from tensormoe_torch._sharded import put, stored

__all__ = ["ExpertGate", "Gated"]

C = TypeVar("C", bound=LayerConfig | BlockConfig)


class ExpertGate(nn.Module):
    """Projection, normalization and activation: (..., in) to one tensor (..., N_e) per level.

    A layer makes its own. Its parameters are ``projection_<level>`` (in, N_e) and, if the gate has
    one, ``bias_<level>`` (N_e,); its buffers are batch norm's ``running_mean_<level>`` and
    ``running_variance_<level>``. Logits and coefficients are float32 at least. A forward hook on
    this module sees which experts every input uses.

    Args:
        config: the layer, which has a gate.
        device: of the parameters.
        dtype: of the parameters; buffers are float32 at least.

    Attributes:
        config: the layer.
        synchronized: whether a batch norm in training takes its statistics over all processes of a
            group; :func:`synchronize_gates` sets it.
        process_group: that group; None for all processes.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> (coefficients,) = MuMoE(8, 4, experts=3, rank=2).gate(torch.ones(5, 8))
    >>> coefficients.shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        config: LayerConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype, device = checked_dtype(dtype), checked_device(device)
        check_config(config, "MuMoE")
        if config.gate is None:
            raise SpecError("config must have a gate; got None for it. Give LayerConfig one.")
        self.config = config
        self.synchronized = False
        self.process_group: dist.ProcessGroup | None = None
        for name, shape in config.parameter_shapes().items():
            kind, _, short = name.partition(".")
            if kind == "gate":
                array = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(short, nn.Parameter(array))
        for name, shape in config.buffer_shapes().items():
            array = torch.empty(shape, device=device, dtype=dtype)
            wide = array.to(torch.float32) if array.dtype.itemsize < 4 else array
            self.register_buffer(name.partition(".")[2], wide)
        self._names = {f"gate.{name}": name for name, _ in self.named_parameters()}
        self._buffer_names = {f"gate.{name}": name for name, _ in self.named_buffers()}
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: projections of zero, so that experts start alike, and fresh statistics.

        Projections of a "relu_top_k" gate start like those of ``nn.Linear``.
        """
        bound = gate_bound(self.config)
        for parameter in stored(self, self._names.values()).values():
            if bound:
                like: Any = {"device": parameter.device, "dtype": parameter.dtype}
                put(parameter, torch.empty(parameter.shape, **like).uniform_(-bound, bound))
            else:
                parameter.zero_()
        for name, buffer in self.named_buffers(recurse=False):
            buffer.fill_(1.0 if "variance" in name else 0.0)

    def extra_repr(self) -> str:
        return f"{self.config.spec.in_features}, {self.config.spec.experts}, {self.config.gate!r}"

    @property
    def gate(self) -> Gate:
        """Rule from logits to coefficients."""
        assert self.config.gate is not None
        return self.config.gate

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of inputs (..., in): one tensor (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``.

        In training, a batch-norm gate uses the batch's own statistics and updates its buffers.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        features = self.config.spec.in_features
        parameters = {name: getattr(self, short) for name, short in self._names.items()}
        lead = check_input(x, features, parameters["gate.projection_0"], narrower=True)
        rows = x if len(lead) == 1 else x.reshape(prod(lead), features)
        buffers = {name: getattr(self, short) for name, short in self._buffer_names.items()}
        with no_autocast(x.device.type):
            made, statistics = route(
                self.config,
                parameters,
                rows,
                buffers,
                lead,
                training=self.training,
                across=self._across() if self.synchronized and self.training else None,
            )
        if self.training and statistics is not None:
            self._update(statistics)
        return tuple(made)

    def _across(self) -> Across | None:
        """The sum over all processes that share the batch, where there are others."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return None
        return lambda array: _Sum.apply(array, group)

    @torch.no_grad()
    def _update(self, statistics: list[Statistics]) -> None:
        for level, found in enumerate(statistics):
            getattr(self, f"running_mean_{level}").copy_(found.mean)
            getattr(self, f"running_variance_{level}").copy_(found.variance)


class Gated(Methods[Tensor, C]):
    """Layers and blocks with a gate of their own."""

    gate: ExpertGate | None

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of inputs (..., in): one tensor (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``. Both layers of a block share them.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        made: tuple[Tensor, ...] = own_gate(self.gate, self.config)(x)
        return made


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, array: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = array.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(cotangent, ctx.group), None

"""The gate of a layer as a module of its own: from inputs to coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensormoe._layers import Methods
from tensormoe._validation import flag
from tensormoe.checkpoint import check_config
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig, initial_span, own_gate
from tensormoe.gates import Across, Gate
from tensormoe_torch._autograd import no_autocast, route
from tensormoe_torch._checks import check_input
from tensormoe_torch._dtypes import checked_device, checked_dtype
from tensormoe_torch._sharded import Copied, put, stored

__all__ = ["ExpertGate", "Gated", "Logits"]

C = TypeVar("C", bound=LayerConfig | BlockConfig)

Steering: TypeAlias = tuple[int, tuple[float, ...]]
"""A level, and what each of its experts' coefficients gets."""


class Logits(nn.Module):
    """A place for forward hooks that see the logits of a gate: one tensor (..., N_e) per level.

    It passes them on, when hooks are there or logits are asked for. Coefficients are made of the
    logits already: what a hook returns changes what :meth:`Gated.route` returns, and no more.
    """

    def forward(self, *logits: Tensor) -> tuple[Tensor, ...]:
        return logits


class ExpertGate(Copied):
    """Projection, normalization and activation: (..., in) to one tensor (..., N_e) per level.

    A layer makes its own. Its parameters are ``projection_<level>`` (in, N_e) and, if the gate has
    one, ``bias_<level>`` (N_e,); its buffers are batch norm's ``running_mean_<level>`` and
    ``running_variance_<level>``, and with ``balance`` the ``choice_bias_<level>``, (N_e,) each.
    Logits and coefficients are float32 at least. A forward hook on this module sees which experts
    every input uses, and one on its ``logits`` sees the logits.

    Args:
        config: the layer, which has a gate.
        device: of the parameters.
        dtype: of the parameters; buffers are float32 at least.

    Attributes:
        config: the layer.
        logits: passes the logits on, for hooks.
        synchronized: whether, in training, batch norm takes its statistics, and ``balance`` the
            load, over all processes of a group; :func:`synchronize_gates` sets it.
        process_group: that group; None for all processes.
        steering: what is added to the coefficients, a level and one amount per expert each;
            :func:`steered` sets it for a while. Compiled models see it, other than a new hook.
        boundary: of the layer, where it is cut over devices, which all have the whole gate.

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
        self.logits = Logits()
        self.synchronized = False
        self.process_group: dist.ProcessGroup | None = None
        self.steering: tuple[Steering, ...] = ()
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
        """Start anew, with fresh statistics and biases for the choice.

        Projections start at zero, so that experts start alike; those of a gate that chooses k
        experts are drawn from PyTorch's generator as the weight of ``nn.Linear`` is, so that
        different tokens choose different experts.
        """
        for name, parameter in stored(self, self._names.values()).items():
            drawn = torch.zeros(parameter.shape, device=parameter.device, dtype=parameter.dtype)
            if span := initial_span(self.config, name):
                drawn.uniform_(-span, span)
            put(parameter, drawn)
        for name, buffer in self.named_buffers(recurse=False):
            buffer.fill_(1.0 if "variance" in name else 0.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return f"{self.config.spec.in_features}, {self.config.spec.experts}, {self.config.gate!r}"

    @property
    def gate(self) -> Gate:
        """Rule from logits to coefficients."""
        assert self.config.gate is not None
        return self.config.gate

    def forward(self, x: Tensor, logits: bool = False) -> tuple[Tensor, ...]:
        """The coefficients of inputs (..., in): one tensor (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``.

        In training, a batch-norm gate uses the batch's own statistics and updates its buffers; one
        with ``noise`` draws from PyTorch's generator; and one with ``balance`` moves its biases.

        Args:
            x: (..., in), in the layer's dtype.
            logits: whether the logits follow, one tensor (..., N_e) per level.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        flag(logits, "logits")
        keep = logits or bool(self.logits._forward_hooks or self.logits._forward_pre_hooks)
        features = self.config.spec.in_features
        x = self._whole(x)
        parameters = {
            name: self._whole(getattr(self, short)) for name, short in self._names.items()
        }
        lead = check_input(x, features, parameters["gate.projection_0"], narrower=True)
        rows = x if len(lead) == 1 else x.reshape(prod(lead), features)
        buffers = {name: getattr(self, short) for name, short in self._buffer_names.items()}
        with no_autocast(x.device.type):
            made, changed = route(
                self.config,
                parameters,
                rows,
                buffers,
                lead,
                training=self.training,
                across=(
                    across_processes(self.process_group)
                    if self.synchronized and self.training
                    else None
                ),
                noise=self._noise(rows) if self.training and self.gate.noise else None,
                keep=keep,
            )
        self._update(changed)
        if self.steering:
            made = self._steered(made)
        levels = self.config.spec.levels
        if not keep:
            return tuple(made)
        seen = self.logits(*made[levels:])
        return (*made[:levels], *seen) if logits else tuple(made[:levels])

    def _noise(self, rows: Tensor) -> list[Tensor]:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return [
            self._agreed(torch.randn(rows.shape[0], count, device=rows.device, dtype=wide))
            for count in self.config.spec.experts
        ]

    def _steered(self, made: Sequence[Tensor]) -> list[Tensor]:
        """Coefficients with what is added to them; logits as they are."""
        found = [*made]
        for level, amounts in self.steering:
            old = found[level]
            found[level] = old + torch.tensor(amounts, dtype=old.dtype, device=old.device)
        return found

    @torch.no_grad()
    def _update(self, changed: Mapping[str, Tensor]) -> None:
        for name, array in changed.items():
            getattr(self, self._buffer_names[name]).copy_(array)


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

    def route(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Coefficients and logits of inputs (..., in): one tensor (..., N_e) per level each.

        Logits are those of the projection, before normalization, noise and the choice of experts.
        Losses are made of both, and the coefficients are given to the layer, so that a step
        computes them once.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.

        >>> import torch
        >>> from tensormoe.gates import Gate, z_loss
        >>> from tensormoe_torch import MuMoE
        >>> layer, x = MuMoE(8, 4, experts=3, rank=2, gate=Gate("top_k", k=2)), torch.ones(5, 8)
        >>> coefficients, logits = layer.route(x)
        >>> y, loss = layer(x, coefficients), z_loss(logits)
        """
        made: tuple[Tensor, ...] = own_gate(self.gate, self.config)(x, logits=True)
        return made[: len(made) // 2], made[len(made) // 2 :]


def across_processes(process_group: dist.ProcessGroup | None) -> Across | None:
    """The sum over all processes that share the batch, where there are others."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = process_group or dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return None
    return lambda array: _Sum.apply(array, group)


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

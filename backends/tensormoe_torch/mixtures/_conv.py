"""The factorized mixture of convolutions as a module."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tensormoe._layers import ConvMethods
from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import Gate
from tensormoe.mixtures import (
    ConvConfig,
    check_coefficients,
    check_images,
    conv_config,
    convolve,
)
from tensormoe.mixtures._window import Padding, Sizes
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import no_autocast
from tensormoe_torch._base import Mixture
from tensormoe_torch._checks import check_images as check_device_and_dtype
from tensormoe_torch._factors import Factors, narrowed
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._operator import direct
from tensormoe_torch._tracing import is_traced
from tensormoe_torch.mixtures._base import MixtureModule


class ConvFactors(Factors):
    """The factors of a convolution by name; called with images and coefficients.

    Args:
        config: the layer.
        factors: those of its experts.
    """

    def __init__(self, config: ConvConfig, factors: Factors) -> None:
        super().__init__(config.experts, dict(factors.items()))
        self.window = config.window
        # no compiler has to follow the planner
        self.programs = config.programs("each", channels_first=True)
        # compilers generate no code for groups whose number is open
        self.traced_programs = config.programs("shared", channels_first=True)

    def forward(self, x: Tensor, *coefficients: Any) -> Tensor:
        """Outputs (images, out, *size) of images (images, in, *size).

        Args:
            x: images.
            coefficients: (images, N_e) per level, or (positions, N_e), checked already.
        """
        dtype, factors = narrowed(self.by_name())
        # what nobody differentiates may be written into
        traced = is_traced(x)
        plain = not traced and not torch.is_grad_enabled()
        with no_autocast(x.device.type):
            made: Tensor = convolve(
                self.window,
                self.traced_programs if traced else self.programs,
                factors,
                x.to(dtype),
                coefficients,
                direct(x) if plain else BACKEND,
                # a compiled model must not be bound to the sizes that one plan is the cheapest for
                any_size=torch.compiler.is_compiling() or torch.compiler.is_exporting(),
            )
        return made


class ConvExperts(Mixture):
    """The experts of a :class:`ConvMoE`: matrices (kernel · in, out) of patches, stored as factors.

    Args:
        config: the layer.
        init: ``"variance"`` or ``"paper"``.
        device: of the parameters.
        dtype: of the parameters.
    """

    _kind = "MuMoE"

    def __init__(
        self, config: ConvConfig, init: str, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__(config.experts, init, device, dtype)
        self.factors = ConvFactors(config, self.factors)

    def forward(self, x: Tensor, *coefficients: Tensor) -> Tensor:
        """Outputs (images, out, *size) of images (images, in, *size), for given coefficients."""
        made: Tensor = self.factors(x, *coefficients)
        return made


class ConvMoE(ConvMethods[Tensor], MixtureModule[ConvConfig]):
    """A factorized mixture of convolutions in place of ``nn.Conv2d``, or of one or three axes.

    ``y = Σ_n a_n(x) (W_n ⋆ x + b_n)``, with the kernels W_n of all experts stored as one tensor
    network, as the matrices of :class:`MuMoE` are (Oldfield et al. 2024). Coefficients are those of
    an image, as in CondConv (Yang et al. 2019) and dynamic convolution (Chen et al. 2020), or of
    each position.

    Kernels are never multiplied out, unless that is cheaper: ``plan(size)`` says what is run.

    Args:
        in_channels: of an image.
        out_channels: of the output.
        kernel_size: one number per spatial axis, or one for all of ``dims``.
        experts: N, or one size per level of hierarchy.
        stride: positions between outputs.
        padding: zeros on both sides of every axis; one number per axis, or pairs of numbers before
            and behind; "valid" for none, and "same" for outputs of the images' size.
        dilation: positions between entries of the kernel.
        groups: must be 1.
        dims: number of spatial axes, for a kernel size that is one number.
        experts_per: "image" for one set of coefficients per image, from the mean of its pixels;
            "position" for one per position of the output, from the mean of the pixels that the
            kernel sees there, zeros of the padding included.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name. Without rank or budget, the factors get the parameters of
            one convolution of the same size, and the gate comes on top.
        budget: parameters of all that is built instead, experts and gate: a number, or a
            ``Budget(parameters=…)``, whose ``gate=False`` leaves the gate out.
        bias: whether every expert has a bias.
        gate: how channels become coefficients: a :class:`tensormoe.Gate` or the name of its
            activation; None for a layer that is always given coefficients.
        init: ``"variance"`` (every expert starts like ``nn.Conv2d``) or ``"paper"``.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on.

    Attributes:
        experts: the :class:`ConvExperts`, with the factors.
        gate: the :class:`ExpertGate` over the channels, or None.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> import torch
    >>> layer = ConvMoE(16, 32, kernel_size=3, experts=8, padding=1, rank=24)
    >>> x = torch.randn(4, 16, 28, 28)
    >>> layer(x).shape, layer.coefficients(x)[0].shape
    (torch.Size([4, 32, 28, 28]), torch.Size([4, 8]))
    >>> layer.plan((28, 28), images=4).way
    'kernels'
    """

    _kind = "ConvMoE"
    _config_kind = ConvConfig
    _channels_first = True

    experts: ConvExperts
    gate: ExpertGate | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        *,
        experts: int | tuple[int, ...],
        stride: Sizes = 1,
        padding: Padding = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        dims: int = 2,
        experts_per: str = "image",
        factorization: FactorizationLike = "cp",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | None = None,
        bias: bool = True,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = conv_config(
            in_channels,
            out_channels,
            kernel_size,
            experts=experts,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            dims=dims,
            experts_per=experts_per,
            factorization=factorization,
            rank=rank,
            budget=budget,
            bias=bias,
            gate=gate,
        )
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        config = self.config
        self.experts = ConvExperts(config, init, device, dtype)
        gated = config.gate_config
        self.gate = None if gated is None else ExpertGate(gated, device, dtype)

    @property
    def _weight(self) -> Tensor:
        return self.experts._weight

    def _weights(self) -> dict[str, Tensor]:
        return self.experts._weights()

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of images: one tensor (..., N_e) per level.

        With ``experts_per="position"`` they are (..., *size, N_e), for the positions of the output.

        Args:
            x: (..., in, *size), in the layer's dtype.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        made: tuple[Tensor, ...] = self._gate()(self._means(x))
        return made

    def route(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Coefficients and logits of images, as :meth:`coefficients` has them.

        Logits are those of the projection, before normalization, noise and the choice of experts.

        Args:
            x: (..., in, *size), in the layer's dtype.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        made: tuple[Tensor, ...] = self._gate()(self._means(x), logits=True)
        return made[: len(made) // 2], made[len(made) // 2 :]

    def forward(self, x: Tensor, coefficients: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Run the layer: (..., in, *size) → (..., out, *size).

        Args:
            x: images, in the layer's dtype; under autocast, in any dtype that it narrows.
            coefficients: ready-made ones, as :meth:`coefficients` returns them; the gate makes them
                otherwise.

        Returns:
            Outputs in the layer's dtype, or in autocast's. They are contiguous, or in the memory
            format ``channels_last`` if the input is.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input or coefficients do not fit the layer.
        """
        batch_shape, size = self._checked(x)
        config = self.config
        given = self.coefficients(x) if coefficients is None else coefficients
        out_size = config.window.out_size(size)
        shape = batch_shape if config.per_image else (*batch_shape, *out_size)
        rows = check_coefficients(given, config.experts.spec.experts, shape, BACKEND)
        images = x.reshape(prod(batch_shape), config.in_channels, *size)
        y: Tensor = self.experts(images, *rows)
        y = y.contiguous(memory_format=_format_of(images))
        return (
            y if len(batch_shape) == 1 else y.reshape(*batch_shape, config.out_channels, *out_size)
        )

    def _gate(self) -> ExpertGate:
        self.config.checked_gate()
        assert self.gate is not None
        return self.gate

    def _checked(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        check_device_and_dtype(x, self._weight)
        config = self.config
        return check_images(x, config.window, config.in_channels, channels_first=True)

    def _means(self, x: Tensor) -> Tensor:
        """Inputs of the gate: (..., channels), or (..., *size, channels)."""
        batch_shape, size = self._checked(x)
        config = self.config
        images = x.reshape(prod(batch_shape), config.in_channels, *size)
        rows: Tensor = config.gate_inputs(images, BACKEND)
        places = () if config.per_image else config.window.out_size(size)
        return rows.reshape(*batch_shape, *places, config.in_channels)


def _format_of(images: Tensor) -> torch.memory_format:
    """The memory format that images are in."""
    plain = images.ndim != 4 or images.is_contiguous()
    if plain or not images.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last

"""The factorized mixture of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe._layers import ConvMethods
from tensormoe.backend import Array
from tensormoe.errors import ShapeError
from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import Gate
from tensormoe.mixtures import ConvConfig, check_coefficients, check_images, conv_config
from tensormoe.mixtures._window import Padding, Sizes
from tensormoe.selection import Budget
from tensormoe_numpy._random import checked_dtype, draw
from tensormoe_numpy.mixtures._base import MixtureLayer

Levels = tuple[Array, ...]


class ConvMoE(ConvMethods[Array], MixtureLayer[ConvConfig]):
    """A factorized mixture of convolutions; channels come last; forward alone.

    ``y = Σ_n a_n(x) (W_n ⋆ x + b_n)``, with the kernels W_n of all experts stored as one tensor
    network, as the matrices of :class:`MuMoE` are (Oldfield et al. 2024). Coefficients are those of
    an image, as in CondConv (Yang et al. 2019) and dynamic convolution (Chen et al. 2020), or of
    each position.

    Train it in another framework, and open the checkpoint here.

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
        init: ``"variance"`` (every expert starts like ``torch.nn.Conv2d``) or ``"paper"``.
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``; inputs must have it.
        seed: of the initial values.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> layer = ConvMoE(16, 32, kernel_size=3, experts=8, padding=1, rank=24, seed=0)
    >>> x = np.ones((4, 28, 28, 16), dtype="float32")
    >>> layer(x).shape, layer.coefficients(x)[0].shape
    ((4, 28, 28, 32), (4, 8))
    """

    _kind = "ConvMoE"
    _config_kind = ConvConfig
    _channels_first = False

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
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
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
        self._hold(config, draw(config, checked_dtype(dtype), seed, init, self.backend))

    def coefficients(self, x: Array) -> Levels:
        """The coefficients of images, as outside training: one array (..., N_e) per level.

        With ``experts_per="position"`` they are (..., *size, N_e), for the positions of the output.

        Args:
            x: (..., *size, in), in the layer's dtype.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
            GateError: logits are NaN.
        """
        return self.route(x)[0]

    def route(self, x: Array) -> tuple[Levels, Levels]:
        """Coefficients and logits of images, as :meth:`coefficients` has them.

        Args:
            x: (..., *size, in), in the layer's dtype.

        Raises:
            BackendError, GateError, ShapeError: as :meth:`coefficients`.
        """
        self.config.checked_gate()
        images, lead = self._images(x)
        rows = self.config.gate_inputs(images, self.backend)
        made, _ = self.config.route(self._parts, rows)
        coefficients, logits = (
            tuple(each.reshape(*lead, each.shape[-1]) for each in levels) for levels in made
        )
        return coefficients, logits

    def __call__(self, x: Array, coefficients: Array | Sequence[Array] | None = None) -> Array:
        """Run the layer: (..., *size, in) → (..., *size, out).

        Args:
            x: images, in the layer's dtype.
            coefficients: ready-made ones, as :meth:`coefficients` returns them; the gate makes them
                otherwise.

        Raises:
            BackendError, ShapeError: input or coefficients do not fit, or there is no gate.
            GateError: logits are NaN.
        """
        images, lead = self._images(x)
        given = self.coefficients(x) if coefficients is None else coefficients
        experts = self.config.experts.spec.experts
        rows = check_coefficients(given, experts, lead, self.backend)
        y = self.config.run(self._parts, images, rows)
        return y.reshape(*x.shape[: x.ndim - 1 - self.config.window.axes], *y.shape[1:])

    def _images(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        """Checked images (images, *size, in), and the leading shape of their coefficients."""
        functional.check_array(x, self.backend, "images")
        config = self.config
        if x.dtype != self.dtype:
            raise ShapeError(
                f"images must have the layer's dtype {self.dtype}; got {x.dtype}. Cast them, or "
                "build the layer with their dtype."
            )
        batch_shape, size = check_images(x, config.window, config.in_channels, channels_first=False)
        images = x.reshape(prod(batch_shape), *size, config.in_channels)
        places = () if config.per_image else config.window.out_size(size)
        return images, (*batch_shape, *places)

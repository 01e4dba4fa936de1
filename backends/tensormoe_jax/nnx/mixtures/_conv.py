"""The factorized mixture of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import Array

from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import Gate
from tensormoe.mixtures import ConvConfig, conv_config
from tensormoe.mixtures._window import Padding, Sizes
from tensormoe.selection import Budget
from tensormoe_jax._convolutions import ConvLayer, Levels, route_images, run_images
from tensormoe_jax.nnx._rngs import Source
from tensormoe_jax.nnx.mixtures._base import MixtureModule


class ConvMoE(ConvLayer, MixtureModule[ConvConfig]):
    """A factorized mixture of convolutions in place of ``nnx.Conv``; channels come last.

    ``y = Σ_n a_n(x) (W_n ⋆ x + b_n)``, with the kernels W_n of all experts stored as one tensor
    network, as the matrices of :class:`MuMoE` are (Oldfield et al. 2024). Coefficients are those of
    an image, as in CondConv (Yang et al. 2019) and dynamic convolution (Chen et al. 2020), or of
    each position.

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
        dtype: of the parameters, JAX's default one for None; inputs must have it.
        gate_dtype: of the gate's parameters: ``dtype`` for None, or float32 beside factors of 16
            bits, whose logits are in float32 anyway.
        rngs: streams, a seed or a key: parameters are drawn by the stream ``params``, a gate's
            noise by ``noise``.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> import jax.numpy as jnp
    >>> layer = ConvMoE(16, 32, kernel_size=3, experts=8, padding=1, rank=24, rngs=0)
    >>> x = jnp.ones((4, 28, 28, 16))
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
        dtype: Any = None,
        gate_dtype: Any = None,
        rngs: Source,
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
        self._start(config, init, dtype, gate_dtype, rngs)

    def coefficients(self, x: Array, *, use_running_average: bool | None = None) -> Levels:
        """The coefficients of images: one array (..., N_e) per level.

        With ``experts_per="position"`` they are (..., *size, N_e), for the positions of the output.

        Args:
            x: (..., *size, in), in the layer's dtype.
            use_running_average: takes the place of the attribute.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
            GateError: noise is to be drawn, and the module was made without ``rngs``.
        """
        return self.route(x, use_running_average=use_running_average)[0]

    def route(self, x: Array, *, use_running_average: bool | None = None) -> tuple[Levels, Levels]:
        """Coefficients and logits of images, as :meth:`coefficients` has them.

        Args:
            x: (..., *size, in), in the layer's dtype.
            use_running_average: takes the place of the attribute.

        Raises:
            BackendError, GateError, ShapeError: as :meth:`coefficients`.
        """
        training, key = self._noise(use_running_average)
        arrays = self.parameters | self.buffers
        made, changed = route_images(
            self.config, arrays, x, channels_first=False, training=training, key=key
        )
        if training:
            for name, array in changed.items():
                self._variable(name)[...] = array
        return made

    def __call__(
        self,
        x: Array,
        coefficients: Array | Sequence[Array] | None = None,
        *,
        use_running_average: bool | None = None,
    ) -> Array:
        """Run the layer: (..., *size, in) → (..., *size, out).

        Args:
            x: images, in the layer's dtype.
            coefficients: ready-made ones, as :meth:`coefficients` returns them; the gate makes them
                otherwise.
            use_running_average: takes the place of the attribute.

        Raises:
            BackendError, GateError, ShapeError: input or coefficients do not fit.
        """
        if coefficients is None:
            coefficients = self.coefficients(x, use_running_average=use_running_average)
        return run_images(self.config, self.parameters, x, coefficients, channels_first=False)

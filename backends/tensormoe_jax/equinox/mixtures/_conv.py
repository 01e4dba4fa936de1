"""The factorized mixture of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equinox.nn import State
from jax import Array

from tensormoe.errors import GateError
from tensormoe.factorizations import FactorizationLike
from tensormoe.gates import Gate
from tensormoe.mixtures import ConvConfig, conv_config
from tensormoe.mixtures._window import Padding, Sizes
from tensormoe.selection import Budget
from tensormoe_jax._convolutions import ConvLayer, route_images, run_images
from tensormoe_jax.equinox.mixtures._base import MixtureModule


class ConvMoE(ConvLayer, MixtureModule[ConvConfig]):
    """A factorized mixture of convolutions in place of ``equinox.nn.Conv``; channels come first.

    ``y = Σ_n a_n(x) (W_n ⋆ x + b_n)``, with the kernels W_n of all experts stored as one tensor
    network, as the matrices of :class:`MuMoE` are (Oldfield et al. 2024). Coefficients are those of
    an image, as in CondConv (Yang et al. 2019) and dynamic convolution (Chen et al. 2020), or of
    each position. Unlike ``equinox.nn.Conv``, a layer takes batches of any shape, so that no
    ``jax.vmap`` is needed; it works under one as well.

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
            activation; None for a layer that is always given coefficients. One with batch norm
            or balance keeps arrays in a state: make the layer by ``equinox.nn.make_with_state``.
        init: ``"variance"`` (every expert starts like ``torch.nn.Conv2d``) or ``"paper"``.
        dtype: of the parameters, JAX's default one for None; inputs must have it.
        gate_dtype: of the gate's parameters: ``dtype`` for None, or float32 beside factors of 16
            bits, whose logits are in float32 anyway.
        key: of ``jax.random``.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.

    >>> import jax, jax.numpy as jnp
    >>> key = jax.random.key(0)
    >>> layer = ConvMoE(16, 32, kernel_size=3, experts=8, padding=1, rank=24, key=key)
    >>> x = jnp.ones((4, 16, 28, 28))
    >>> layer(x).shape, layer(x[0]).shape, layer.coefficients(x)[0].shape
    ((4, 32, 28, 28), (32, 28, 28), (4, 8))
    """

    _kind = "ConvMoE"
    _config_kind = ConvConfig
    _channels_first = True

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
        key: Array,
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
        self._start(config, init, dtype, gate_dtype, key)

    def coefficients(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """The coefficients of images, and the state afterwards if one was given.

        Args:
            x: (..., in, *size), in the layer's dtype.
            state: running statistics of batch norm, biases of ``balance``.
            key: what a gate's noise is drawn by, in training.
            inference: takes the place of the attribute.

        Returns:
            One array (..., N_e) per level; with ``experts_per="position"`` (..., *size, N_e), for
            the positions of the output.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
            GateError: batch norm or balance without a state.
            SpecError: noise is to be drawn, and there is no key.
        """
        found = self.route(x, state, key=key, inference=inference)
        return found[0] if state is None else (found[0][0], found[1])

    def route(
        self,
        x: Array,
        state: State | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """Coefficients and logits, and the state afterwards if one was given.

        Args:
            x: (..., in, *size), in the layer's dtype.
            state: as for :meth:`coefficients`.
            key: as for :meth:`coefficients`.
            inference: as for :meth:`coefficients`.

        Returns:
            A pair of coefficients and logits, one array per level each.

        Raises:
            BackendError, GateError, ShapeError, SpecError: as :meth:`coefficients`.
        """
        if self.statistics is not None and state is None:
            raise GateError(
                "batch norm and balance keep their arrays in an equinox.nn.State; got none. Make "
                "the layer by equinox.nn.make_with_state, and call it with state=…."
            )
        stored = self.inference if inference is None else inference
        made, changed = route_images(
            self.config,
            self.arrays | self.buffers(state),
            x,
            channels_first=True,
            training=not stored,
            key=key,
        )
        if changed and not stored and state is not None and self.statistics is not None:
            state = state.set(
                self.statistics, tuple(changed[name] for name in self.config.buffer_shapes())
            )
        return made if state is None else (made, state)

    def __call__(
        self,
        x: Array,
        coefficients: Array | Sequence[Array] | None = None,
        state: State | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> Any:
        """Run the layer: (..., in, *size) → (..., out, *size), and the state if one was given.

        Args:
            x: images, in the layer's dtype.
            coefficients: ready-made ones, as :meth:`coefficients` returns them; the gate makes them
                otherwise.
            state: as for :meth:`coefficients`.
            key: as for :meth:`coefficients`.
            inference: takes the place of the attribute.

        Raises:
            BackendError, GateError, ShapeError, SpecError: as :meth:`coefficients`; or coefficients
                that do not fit.
        """
        if coefficients is None:
            found = self.coefficients(x, state, key=key, inference=inference)
            coefficients, state = (found, None) if state is None else found
        assert coefficients is not None
        y = run_images(self.config, self.arrays, x, coefficients, channels_first=True)
        return y if state is None else (y, state)

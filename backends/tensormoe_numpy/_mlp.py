"""The two-layer block: experts, activation, experts, with one gate for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe._layers import BlockMethods
from tensormoe._names import block_names, split_names
from tensormoe._validation import choice
from tensormoe.backend import Array
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import BlockConfig
from tensormoe.gates import Gate
from tensormoe.selection import Budget
from tensormoe_numpy._activations import ACTIVATIONS, activations
from tensormoe_numpy._base import Given, Gradients, Held, check_cotangent
from tensormoe_numpy._layer import MuMoE
from tensormoe_numpy._random import checked_dtype, checked_generator, draw

__all__ = ["MuMoEMLP"]


def _checked_name(act_layer: Any) -> str:
    try:
        return choice(act_layer, ACTIVATIONS, "act_layer", SpecError)
    except SpecError as error:
        if not callable(act_layer) and act_layer is not None:
            raise
        raise SpecError(
            f"{error} A function alone can't be trained here: its derivative is needed. PyTorch's "
            "and JAX's blocks take any."
        ) from None


class MuMoEMLP(Held[BlockConfig], BlockMethods[Array]):
    """A μMoE block in place of an MLP (Oldfield et al. 2024, section 3): two mixtures, one gate.

    The coefficients are computed once, from the block's input, and mix the experts of both layers.
    Argument names are those that vision codebases give their MLPs.

    Args:
        in_features: size of an input.
        hidden_features: size between the layers; ``in_features`` by default.
        out_features: size of an output; ``in_features`` by default.
        act_layer: name of the activation between: "gelu", "gelu_tanh", "relu", "silu" or "tanh".
            Functions are not taken: training needs the derivative too.
        bias: whether every expert has a bias.
        drop: share of entries dropped, in training, behind the activation and the second layer.
        gated: whether the block is a gated linear unit (SwiGLU with ``act_layer="silu"``; Shazeer
            2020): ``second(act(g) * u)``, where ``g`` and ``u`` are the first and the second half
            of the ``2 * hidden_features`` outputs of the first layer.
        experts: N, or one size per level of hierarchy.
        factorization: a value or a name for both layers, or a pair of them.
        rank: bond sizes of both layers, with a name.
        budget: upper limits for the block instead, both layers and the gate together;
            ``"linear"`` stands for the parameters of the linear layers that it replaces, and
            ``Budget(…, gate=False)`` leaves the gate out. Layers share a budget as the linear ones
            would. Without rank or budget the factors of each layer get the parameters of its
            linear layer, and the gate comes on top.
        gate: how inputs become coefficients, or None for a block that is always given them.
        init: ``"variance"`` or ``"paper"``.
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``.
        seed: of the initial values, of dropped entries, and of the noise of a gate that has some; a
            NumPy generator is drawn from.

    Attributes:
        parameters: the trainable arrays by canonical name: ``first.…``, ``second.…``, ``gate.…``.
        buffers: as for :class:`MuMoE`.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import numpy as np
    >>> block = MuMoEMLP(32, 64, experts=16, factorization="tensor_ring", rank=(2, 2, 8), seed=0)
    >>> block(np.ones((5, 32), dtype="float32")).shape
    (5, 32)
    """

    _kind = "MuMoEMLP"
    _layer: ClassVar[type[MuMoE]] = MuMoE

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str = "gelu",
        bias: bool = True,
        drop: float = 0.0,
        *,
        gated: bool = False,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike | tuple[FactorizationLike, FactorizationLike] = "cp",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        options = functional.Options(experts, factorization, rank, budget, bias, gate)
        self.config = options.block(
            in_features, hidden_features, out_features, _checked_name(act_layer), drop, gated=gated
        )
        self._generator = checked_generator(seed)
        self.first, self.second = (
            self._layer.restore(
                layer, draw(layer, checked_dtype(dtype), self._generator, init, self.backend)
            )
            for layer in (self.config.first, self.config.second)
        )
        self.first._generator = self._generator

    @property
    def parameters(self) -> dict[str, Array]:  # type: ignore[override]
        """The trainable arrays by canonical name; update them in place."""
        return block_names(self.first.parameters, self.second.parameters)

    @property
    def buffers(self) -> dict[str, Array]:  # type: ignore[override]
        """Arrays that training changes without gradients, by canonical name."""
        return self.first.buffers

    def coefficients(self, x: Array) -> tuple[Array, ...]:
        """The coefficients (..., N_e) per level that both layers share."""
        return self.first.coefficients(x)

    def route(self, x: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Coefficients and logits, as :meth:`MuMoE.route`."""
        return self.first.route(x)

    def __call__(self, x: Array, coefficients: Given | None = None) -> Array:
        """Run the block: (..., in) → (..., out); nothing is dropped.

        Args:
            x: (..., in), in the block's dtype.
            coefficients: ready-made ones for both layers; the gate makes them otherwise.
        """
        given = self.first.coefficients(x) if coefficients is None else coefficients
        return self.second(self._bend(self.first(x, given))[0], given)

    def vjp(
        self, x: Array, coefficients: Given | None = None, *, training: bool = True
    ) -> tuple[Array, Callable[[Array], Gradients]]:
        """Run the block and return its output with its backward pass, as :meth:`MuMoE.vjp`.

        Args:
            x: (..., in), in the block's dtype.
            coefficients: ready-made ones for both layers; the gate makes them otherwise.
            training: whether entries are dropped and batch norm uses the batch's own statistics.
        """
        pull_gate = None
        given: Given
        if coefficients is None:
            given, pull_gate = self.first.route_vjp(x, training=training)
        else:
            given = coefficients
        before, pull_first = self.first.vjp(x, given)
        middle, pull_middle = self._bend(before)
        keep = self._keep(middle.shape, training)
        middle = _kept(middle, keep)
        result, pull_second = self.second.vjp(middle, given)
        keep_out = self._keep(result.shape, training)

        def pullback(cotangent: Array) -> Gradients:
            check_cotangent(cotangent, result.shape, result.dtype, self.backend)
            second = pull_second(_kept(cotangent, keep_out))
            assert second.input is not None
            first = pull_first(pull_middle(_kept(second.input, keep)))
            by_level = tuple(
                a + b for a, b in zip(first.coefficients, second.coefficients, strict=True)
            )
            named = block_names(first.parameters, second.parameters)
            if pull_gate is None:
                return Gradients(first.input, named, by_level)
            through_gate, gate = pull_gate(by_level)
            by_input = first.input
            assert by_input is not None
            by_input += through_gate
            return Gradients(by_input, named | gate)

        return _kept(result, keep_out), pullback

    def _keep(self, shape: tuple[int, ...], training: bool) -> Array | None:
        """Dropout mask: 0 where dropped, more than 1 elsewhere; None if nothing is dropped."""
        drop = self.config.drop
        if not training or drop == 0.0:
            return None
        # drawn on the host, as initial values are: a seed means one thing in every library
        drawn = self.backend.from_host(self._generator.random(shape) >= drop)
        kept: Array = drawn.astype(self.dtype)
        kept /= 1.0 - drop
        return kept

    def _bend(self, before: Array) -> tuple[Array, Callable[[Array], Array]]:
        """Apply the activation, gated or not; return the result and its pullback."""
        function, slope = activations(self.backend)[self.config.act_layer or ""]
        if not self.config.gated:
            return function(before), lambda cotangent: cotangent * slope(before)
        hidden = self.config.hidden_features
        gate, up = before[..., :hidden], before[..., hidden:]
        passed = function(gate)

        def pullback(cotangent: Array) -> Array:
            halves = [cotangent * up * slope(gate), cotangent * passed]
            return self.backend.namespace.concat(halves, axis=-1)

        return passed * up, pullback

    @classmethod
    def _check(cls, config: BlockConfig, arrays: Mapping[str, Array]) -> None:
        super()._check(config, arrays)
        _checked_name(config.act_layer)

    @classmethod
    def _of_arrays(cls, config: BlockConfig, arrays: Mapping[str, Array]) -> Self:
        block = cls.__new__(cls)
        block.config = config
        parts = split_names(arrays)
        gate = {f"gate.{name}": array for name, array in parts.get("gate", {}).items()}
        block.first = cls._layer.restore(config.first, parts["first"] | gate)
        block.second = cls._layer.restore(config.second, parts["second"])
        block._generator = np.random.default_rng()
        return block

    def _layers(self) -> tuple[MuMoE, MuMoE]:
        return self.first, self.second


def _kept(array: Array, keep: Array | None) -> Array:
    """``array`` after some of its entries were dropped; itself where none are."""
    return array if keep is None else array * keep

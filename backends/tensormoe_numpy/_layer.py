"""The layer on NumPy: forward, gradients without a framework, and inference on prepared weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe._layers import LinearSizes
from tensormoe._validation import flag
from tensormoe.backend import Array
from tensormoe.errors import ShapeError
from tensormoe.execution import execute
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Routed
from tensormoe.gates import Gate, TopK
from tensormoe.selection import Budget
from tensormoe_numpy._base import Given, Gradients, Layer, check_cotangent
from tensormoe_numpy._random import checked_dtype, checked_generator, draw

__all__ = ["MuMoE", "Prepared"]


class MuMoE(Layer, LinearSizes):
    """A multilinear mixture of linear experts (Oldfield et al. 2024), on NumPy.

    ``y = Σ_n a_n(x) (W_nᵀ x + b_n)``, with all W_n stored as one tensor network that is never
    multiplied out.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name.
        budget: upper limits for the layer with its gate instead (:class:`tensormoe.Budget`, a
            number of parameters, or ``"linear"``, those of the linear layer of the same size);
            ``Budget(…, gate=False)`` leaves the gate out. Without rank or budget the factors get
            the linear layer's parameters, and the gate comes on top: ``num_parameters`` counts
            both, ``spec.num_parameters`` the factors alone.
        bias: whether every expert has a bias.
        gate: how inputs become coefficients: a :class:`tensormoe.Gate` or the name of its
            activation; None for a layer that is always given coefficients.
        init: ``"variance"`` (every expert starts like ``torch.nn.Linear``) or ``"paper"``.
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``; inputs must have it.
        seed: of the initial values, and of the noise of a gate that has some; a NumPy generator is
            drawn from.

    Attributes:
        parameters: the trainable arrays by canonical name; update them in place.
        buffers: batch norm's running statistics and the biases of ``balance``; empty for other
            gates.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import numpy as np
    >>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, seed=0)
    >>> layer(np.ones((5, 7, 64), dtype="float32")).shape
    (5, 7, 10)
    """

    _kind = "MuMoE"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike = "cp",
        *,
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        bias: bool = True,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        options = functional.Options(experts, factorization, rank, budget, bias, gate)
        config = options.layer(in_features, out_features)
        generator = checked_generator(seed)
        arrays = draw(config, checked_dtype(dtype), generator, init, self.backend)
        self._hold(config, arrays, generator)

    def coefficients(self, x: Array) -> tuple[Array, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Rows sum to one if ``gate.sums_to_one``.

        Raises:
            ShapeError: the input does not fit, or the layer has no gate.
        """
        lead, rows = self._rows(x)
        routed = self._route(rows)
        return _led(routed.coefficients, lead)

    def route(self, x: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Coefficients and logits of inputs (..., in): one array (..., N_e) per level each.

        Logits are those of the projection, before normalization and the choice of experts.

        Raises:
            ShapeError: the input does not fit, or the layer has no gate.
        """
        lead, rows = self._rows(x)
        routed = self._route(rows, keep=True)
        return _led(routed.coefficients, lead), _led(routed.logits, lead)

    def __call__(
        self,
        x: Array,
        coefficients: Given | None = None,
        *,
        memory_limit: int | None = None,
    ) -> Array:
        """Run the layer.

        Args:
            x: (..., in), in the layer's dtype.
            coefficients: ready-made ones, an array (..., N_e) or a ``TopK`` a level; the gate
                makes them otherwise.
            memory_limit: bytes the call may take beyond input and parameters; larger batches run
                in chunks.

        Returns:
            (..., out).

        Raises:
            ShapeError: input or coefficients do not fit the layer.
            PlanError: a limit that not even single inputs keep to.
            GateError: logits are NaN.
        """
        lead, rows = self._rows(x)
        given = None if coefficients is None else self._merged(coefficients, lead)
        if memory_limit is None:
            result = self._forward(rows, given)
        else:
            size = self.config.plan(
                len(rows),
                memory_limit=memory_limit,
                itemsize=self.dtype.itemsize,
                library=self.backend.library,
            ).chunk
            result = self.backend.namespace.concat(
                [
                    self._forward(rows[k : k + size], _slice(given, k, k + size))
                    for k in range(0, max(len(rows), 1), size)
                ]
            )
        return result.reshape(*lead, self.spec.out_features)

    def vjp(
        self, x: Array, coefficients: Given | None = None, *, training: bool = True
    ) -> tuple[Array, Callable[[Array], Gradients]]:
        """Run the layer and return its output with its backward pass.

        Args:
            x: (..., in), in the layer's dtype.
            coefficients: ready-made ones; the gate makes them otherwise.
            training: whether a batch-norm gate uses the batch's own statistics, one with
                ``noise`` draws it from the layer's generator, and ``buffers`` are updated.

        Returns:
            The output (..., out), and a function from its cotangent, of the same shape, to
            :class:`Gradients`.
        """
        flag(training, "training")
        lead, rows = self._rows(x)
        pull_gate = None
        if coefficients is None:
            routed, pull_gate = self._route_vjp(rows, training)
            given = list(routed.coefficients)
        else:
            given = self._merged(coefficients, lead)
        result, pull = functional.experts_vjp(
            self.config, self.parameters, rows, given, self.backend
        )
        shape = (*lead, self.spec.out_features)

        def pullback(cotangent: Array) -> Gradients:
            check_cotangent(cotangent, shape, result.dtype, self.backend)
            found = pull(cotangent.reshape(result.shape))
            by_input = found.pop("x")
            by_level = [found.pop(f"coefficients_{e}") for e in range(self.spec.levels)]
            if pull_gate is not None:
                through_gate, gate = pull_gate(by_level)
                by_input += through_gate
                return Gradients(by_input.reshape(x.shape), found | gate)
            wide = tuple(each.reshape(*lead, each.shape[-1]) for each in by_level)
            return Gradients(by_input.reshape(x.shape), found, wide)

        return result.reshape(shape), pullback

    def route_vjp(
        self, x: Array, *, training: bool = True, logits: bool = False
    ) -> tuple[tuple[Array, ...], Callable[[Sequence[Array]], tuple[Array, dict[str, Array]]]]:
        """The coefficients (..., N_e) per level, with their backward pass.

        Args:
            x: (..., in), in the layer's dtype.
            training: as for :meth:`vjp`.
            logits: whether the logits (..., N_e) follow, one per level, before normalization.

        Returns:
            One array per level, or two; and a function from their cotangents, in the same order, to
            the gradient by ``x`` and the gate's parameters by canonical name.
        """
        flag(training, "training")
        flag(logits, "logits")
        lead, rows = self._rows(x)
        routed, pull = self._route_vjp(rows, training)
        made = [*routed.coefficients, *(routed.logits if logits else ())]

        def pullback(cotangents: Sequence[Array]) -> tuple[Array, dict[str, Array]]:
            if len(cotangents) != len(made):
                raise ShapeError(
                    f"there must be one cotangent per result, {len(made)}; got {len(cotangents)}."
                )
            for place, (each, result) in enumerate(zip(cotangents, made, strict=True)):
                functional.check_array(each, self.backend, f"cotangents[{place}]")
                if tuple(each.shape) != (*lead, result.shape[-1]):
                    raise ShapeError(
                        f"cotangents[{place}] must have the result's shape "
                        f"{(*lead, result.shape[-1])}; got {tuple(each.shape)}."
                    )
            merged = [each.reshape(-1, each.shape[-1]) for each in cotangents]
            levels = self.spec.levels
            by_input, named = pull(merged[:levels], merged[levels:] or None)
            return by_input.reshape(x.shape), named

        return _led(made, lead), pullback

    def _route_vjp(
        self, rows: Array, training: bool
    ) -> tuple[Routed, Callable[..., tuple[Array, dict[str, Array]]]]:
        buffers = dict(self.buffers)
        routed = self._route(rows, keep=True, training=training)

        def pullback(
            cotangents: Sequence[Array], by_logits: Sequence[Array] | None = None
        ) -> tuple[Array, dict[str, Array]]:
            total, named = functional.gate_vjp(
                self.config,
                self.parameters,
                rows,
                routed,
                cotangents,
                self.backend,
                buffers=buffers,
                training=training,
                by_logits=by_logits,
            )
            assert total is not None
            return total, named

        return routed, pullback

    def prepare(self) -> Prepared:
        """The layer for inference: work that depends on weights alone is done once, now."""
        return Prepared(self)

    def _route(self, rows: Array, *, keep: bool = False, training: bool = False) -> Routed:
        """Coefficients; the logits too with ``keep``; ``training`` updates the buffers."""
        routed = functional.route(
            self.config,
            self.parameters,
            rows,
            self.backend,
            buffers=self.buffers,
            keep=keep,
            training=training,
            noise=self._noise(len(rows)) if training else None,
        )
        self.buffers |= routed.buffers
        return routed

    def _noise(self, rows: int) -> list[Array] | None:
        """Noise for the choice of experts, one standard normal array (rows, N_e) per level."""
        if self.config.gate is None or not self.config.gate.noise:
            return None
        width = self.dtype if self.dtype.itemsize >= 4 else np.dtype("float32")
        # drawn on the host, as initial values are: a seed means one thing in every library
        return [
            self.backend.from_host(self._generator.standard_normal((rows, count)).astype(width))
            for count in self.spec.experts
        ]

    def _forward(self, rows: Array, given: list[Any] | None) -> Array:
        weights = self._route(rows).coefficients if given is None else given
        result: Array = functional.apply_experts(
            self.config, self.parameters, rows, weights, self.backend, consume=True
        )
        return result


class Prepared:
    """A layer whose weight-only work is done: for inference, made by :meth:`MuMoE.prepare`.

    It keeps the values that the layer had; train the layer, then prepare it again.
    """

    def __init__(self, layer: MuMoE) -> None:
        self._layer = layer
        # optimizers update arrays in place, so that those that are used as they are get copied
        parameters = {name: array.copy() for name, array in layer.parameters.items()}
        self._program, self._arrays = functional.prepare(layer.config, parameters, layer.backend)
        self._gate = {k: v for k, v in parameters.items() if k.startswith("gate.")}
        self._buffers = {name: array.copy() for name, array in layer.buffers.items()}

    def __repr__(self) -> str:
        return f"{self._layer!r}.prepare()"

    def __call__(self, x: Array, coefficients: Given | None = None) -> Array:
        """The layer's output (..., out) for (..., in); coefficients must be dense."""
        layer = self._layer
        lead, rows = layer._rows(x)
        if coefficients is None:
            weights: list[Any] = functional.route(
                layer.config, self._gate, rows, layer.backend, buffers=self._buffers
            ).coefficients
        else:
            weights = layer._merged(coefficients, lead)
            if any(isinstance(given, TopK) for given in weights):
                raise ShapeError(
                    "a prepared layer takes dense coefficients; got indexed ones. Call the layer."
                )
        named = {
            f"coefficients_{level}": given.astype(layer.dtype, copy=False)
            for level, given in enumerate(weights)
        }
        named |= {"x": rows} | self._arrays
        arrays = [named.pop(operand.name) for operand in self._program.operands]
        weights.clear()
        result: Array = execute(self._program, arrays, layer.backend)[0][0]
        return result.reshape(*lead, layer.spec.out_features)


def _led(rows: Sequence[Array], lead: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(each.reshape(*lead, each.shape[-1]) for each in rows)


def _slice(given: list[Any] | None, start: int, stop: int) -> list[Any] | None:
    if given is None:
        return None
    return [
        TopK(each.indices[start:stop], each.values[start:stop])
        if isinstance(each, TopK)
        else each[start:stop]
        for each in given
    ]

"""Layers on NumPy: forward, gradients without a framework, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe.backend import Backend
from tensormoe.checkpoint import match_arrays, read_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError, ShapeError, TensormoeError
from tensormoe.execution import execute
from tensormoe.factorizations import Factorization
from tensormoe.functional import BlockConfig, LayerConfig, Routed
from tensormoe.gates import Gate, TopK
from tensormoe.planning import Budget, Cost, Plan, Routing, plan_layer
from tensormoe_numpy._adapter import BACKEND
from tensormoe_numpy._random import checked_dtype, draw

__all__ = [
    "Given",
    "Gradients",
    "MuMoE",
    "MuMoEEmbedding",
    "Prepared",
    "check_cotangent",
    "read_block",
]

NDArray = npt.NDArray[Any]
Given = NDArray | TopK | Sequence[NDArray | TopK]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a pullback returns.

    Args:
        input: by the layer's input; None for ids.
        parameters: by canonical name, as the layer's ``parameters``.
        coefficients: by ready-made coefficients, one array a level; empty if the layer's own gate
            made them.
    """

    input: NDArray | None
    parameters: dict[str, NDArray]
    coefficients: tuple[NDArray, ...] = ()


class _Layer:
    """What the layers share: parameters by canonical name, and experts of given coefficients."""

    backend: ClassVar[Backend] = BACKEND
    config: LayerConfig
    parameters: dict[str, NDArray]
    buffers: dict[str, NDArray]

    @property
    def spec(self) -> Any:
        """The :class:`tensormoe.LayerSpec` of the layer."""
        return self.config.spec

    @property
    def gate(self) -> Gate | None:
        """How inputs become coefficients."""
        return self.config.gate

    @property
    def factors(self) -> dict[str, NDArray]:
        """The factors and the bias by their short names, as TensorLy's layouts take them."""
        named = (name.partition(".") for name in self.parameters)
        return {
            short: self.parameters[f"factors.{short}"] for k, _, short in named if k == "factors"
        }

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the parameters; inputs must have it."""
        dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
        return dtype

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.config.num_parameters

    def plan(self, batch: int) -> Plan:
        """How the layer runs ``batch`` inputs."""
        return plan_layer(self.config.spec, batch, Routing(None, self.config.indexed_input))

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """What one call costs for ``batch`` inputs, the gate included."""
        return self.plan(batch).cost(
            self.gate,
            training=training,
            itemsize=self.dtype.itemsize,
            row_block_bytes=self.backend.row_block_bytes,
        )

    def expert(self, *index: int) -> tuple[NDArray, NDArray | None]:
        """One expert's matrix (in, out) and bias (out,), without building 𝒲.

        Args:
            index: one number a level.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return functional.expert_weight(self.config, self.parameters, index, self.backend)

    def materialize(self) -> tuple[NDArray, NDArray | None]:
        """𝒲 (experts…, in, out) and the biases (experts…, out), built explicitly: N·I·O entries."""
        return functional.materialize(self.config, self.parameters, self.backend)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        arrays = {**self.parameters, **self.buffers}
        save_checkpoint(path, type(self).__name__, self.config.to_dict(), arrays)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        config, arrays = read_block(path, cls.__name__, LayerConfig, cls.backend)
        return cls.restore(config, arrays)

    @classmethod
    def restore(cls, config: LayerConfig, arrays: Mapping[str, NDArray]) -> Self:
        """A layer of arrays that exist already, by canonical name."""
        layer = cls.__new__(cls)
        layer.config = config
        layer.parameters = {name: arrays[name] for name in config.parameter_shapes()}
        layer.buffers = {name: arrays[name] for name in config.buffer_shapes()}
        return layer

    def _arguments(self) -> str:
        spec = self.config.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        return (
            f"experts={experts}, factorization={spec.factorization!r}, bias={spec.bias}, "
            f"gate={self.gate!r}, dtype={self.dtype.name!r}"
        )

    def _merged(self, coefficients: Given, lead: tuple[int, ...]) -> list[Any]:
        """Ready-made coefficients with their leading axes merged into one."""
        merged: list[Any] = []
        for given in functional.check_coefficients(self.config, coefficients, lead):
            if isinstance(given, TopK):
                count = self.config.spec.experts[len(merged)]
                functional.check_ids(given.indices, count, self.backend)
                k = given.values.shape[-1]
                merged.append(TopK(given.indices.reshape(-1, k), given.values.reshape(-1, k)))
            else:
                merged.append(given.reshape(prod(lead), given.shape[-1]))
        return merged


class MuMoE(_Layer):
    """A multilinear mixture of linear experts (Oldfield et al. 2024), on NumPy.

    ``y = Σ_n a_n(x) (W_nᵀ x + b_n)``, with all W_n stored as one tensor network that is never
    multiplied out.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        experts: N, or one size a level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name.
        budget: what the rank may cost instead (:class:`tensormoe.Budget`, a number of parameters,
            or ``"linear"``); the default is ``"linear"``, the parameters of the linear layer of
            the same size, gate not counted.
        bias: whether every expert has a bias.
        gate: how inputs become coefficients: a :class:`tensormoe.Gate` or the name of its
            activation; None for a layer that is always given coefficients.
        init: ``"variance"`` (every expert starts like ``torch.nn.Linear``) or ``"paper"``.
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``; inputs must have it.
        seed: of the first values; a NumPy generator is drawn from.

    Attributes:
        parameters: the trainable arrays by canonical name; update them in place.
        buffers: batch norm's running statistics, empty for other gates.

    Raises:
        SpecError: sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import numpy as np
    >>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, seed=0)
    >>> layer(np.ones((5, 7, 64), dtype="float32")).shape
    (5, 7, 10)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | tuple[int, ...],
        factorization: str | Factorization = "cp",
        *,
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        bias: bool = True,
        gate: Gate | str | None = "entmax",
        init: str = "variance",
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.config = functional.resolve_config(
            in_features,
            out_features,
            experts,
            factorization,
            rank=rank,
            budget=budget,
            bias=bias,
            gate=gate,
        )
        self.parameters, self.buffers = draw(
            self.config, checked_dtype(dtype), seed, init, self.backend
        )

    def __repr__(self) -> str:
        spec = self.config.spec
        return f"MuMoE({spec.in_features}, {spec.out_features}, {self._arguments()})"

    def coefficients(self, x: NDArray) -> tuple[NDArray, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) a level, rows summing to one.

        Raises:
            ShapeError: the input does not fit, or the layer has no gate.
        """
        lead = functional.check_input(x, self.spec.in_features, self.dtype)
        routed = self._route(x.reshape(-1, self.spec.in_features))
        return tuple(weights.reshape(*lead, weights.shape[-1]) for weights in routed.coefficients)

    def __call__(
        self,
        x: NDArray,
        coefficients: Given | None = None,
        *,
        memory_limit: int | None = None,
    ) -> NDArray:
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
        lead = functional.check_input(x, self.spec.in_features, self.dtype)
        rows = x.reshape(prod(lead), self.spec.in_features)
        given = None if coefficients is None else self._merged(coefficients, lead)
        if memory_limit is None:
            result = self._forward(rows, given)
        else:
            size = functional.chunk_size(
                self.config, len(rows), memory_limit, self.backend, self.dtype.itemsize
            )
            result = self.backend.concat(
                [
                    self._forward(rows[k : k + size], _slice(given, k, k + size))
                    for k in range(0, max(len(rows), 1), size)
                ]
            )
        return result.reshape(*lead, self.spec.out_features)

    def vjp(
        self, x: NDArray, coefficients: Given | None = None, *, training: bool = True
    ) -> tuple[NDArray, Callable[[NDArray], Gradients]]:
        """Run the layer and return its output with the way back.

        Args:
            x: (..., in), in the layer's dtype.
            coefficients: ready-made ones; the gate makes them otherwise.
            training: whether a batch-norm gate uses the batch's own statistics and updates
                ``buffers``.

        Returns:
            The output (..., out), and a function from its cotangent, of the same shape, to
            :class:`Gradients`.
        """
        lead = functional.check_input(x, self.spec.in_features, self.dtype)
        rows = x.reshape(prod(lead), self.spec.in_features)
        own = coefficients is None
        if own:
            given, pull_gate = self._route_vjp(rows, training)
        else:
            given = self._merged(coefficients, lead)
        result, pull = functional.experts_vjp(
            self.config, self.parameters, rows, given, self.backend
        )
        shape = (*lead, self.spec.out_features)

        def pullback(cotangent: NDArray) -> Gradients:
            check_cotangent(cotangent, shape)
            found = pull(cotangent.reshape(result.shape))
            by_input = found.pop("x")
            by_level = [found.pop(f"coefficients_{e}") for e in range(self.spec.levels)]
            if own:
                through_gate, gate = pull_gate(by_level)
                by_input += through_gate
                return Gradients(by_input.reshape(x.shape), found | gate)
            wide = tuple(each.reshape(*lead, each.shape[-1]) for each in by_level)
            return Gradients(by_input.reshape(x.shape), found, wide)

        return result.reshape(shape), pullback

    def route_vjp(
        self, x: NDArray, *, training: bool = True
    ) -> tuple[
        tuple[NDArray, ...], Callable[[Sequence[NDArray]], tuple[NDArray, dict[str, NDArray]]]
    ]:
        """The coefficients (..., N_e) a level, with their way back.

        Args:
            x: (..., in), in the layer's dtype.
            training: whether a batch-norm gate uses the batch's own statistics and updates
                ``buffers``.

        Returns:
            One array a level, and a function from their cotangents to the gradient by ``x`` and
            the gate's parameters by canonical name.
        """
        lead = functional.check_input(x, self.spec.in_features, self.dtype)
        weights, pull = self._route_vjp(x.reshape(prod(lead), x.shape[-1]), training)

        def pullback(cotangents: Sequence[NDArray]) -> tuple[NDArray, dict[str, NDArray]]:
            merged = [each.reshape(-1, each.shape[-1]) for each in cotangents]
            by_input, named = pull(merged)
            return by_input.reshape(x.shape), named

        return tuple(each.reshape(*lead, each.shape[-1]) for each in weights), pullback

    def _route_vjp(
        self, rows: NDArray, training: bool
    ) -> tuple[list[Any], Callable[[Sequence[NDArray]], tuple[NDArray, dict[str, NDArray]]]]:
        buffers = dict(self.buffers)
        routed = self._route(rows, keep=True, training=training)

        def pullback(cotangents: Sequence[NDArray]) -> tuple[NDArray, dict[str, NDArray]]:
            return functional.gate_vjp(
                self.config,
                self.parameters,
                rows,
                routed,
                cotangents,
                self.backend,
                buffers=buffers,
                training=training,
            )

        return list(routed.coefficients), pullback

    def prepare(self) -> Prepared:
        """The layer for inference: work that depends on weights alone is done once, now."""
        return Prepared(self)

    def _route(self, rows: NDArray, *, keep: bool = False, training: bool = False) -> Routed:
        """Coefficients; the logits too with ``keep``; ``training`` updates the statistics."""
        routed = functional.route(
            self.config,
            self.parameters,
            rows,
            self.backend,
            buffers=self.buffers,
            keep=keep,
            training=training,
        )
        if training and routed.statistics is not None:
            for level, found in enumerate(routed.statistics):
                self.buffers[f"gate.running_mean_{level}"] = found.mean
                self.buffers[f"gate.running_variance_{level}"] = found.variance
        return routed

    def _forward(self, rows: NDArray, given: list[Any] | None) -> NDArray:
        weights = self._route(rows).coefficients if given is None else given
        return functional.apply_experts(self.config, self.parameters, rows, weights, self.backend)


class Prepared:
    """A layer whose weight-only work is done: for inference, made by :meth:`MuMoE.prepare`.

    It keeps the values that the layer had; train the layer, then prepare it again.
    """

    def __init__(self, layer: MuMoE) -> None:
        self._layer = layer
        self._program, self._arrays = functional.prepare(
            layer.config, layer.parameters, layer.backend
        )
        self._gate = {k: v.copy() for k, v in layer.parameters.items() if k.startswith("gate.")}

    def __repr__(self) -> str:
        return f"{self._layer!r}.prepare()"

    def __call__(self, x: NDArray, coefficients: Given | None = None) -> NDArray:
        """The layer's output (..., out) for (..., in); coefficients must be dense."""
        layer = self._layer
        lead = functional.check_input(x, layer.spec.in_features, layer.dtype)
        rows = x.reshape(prod(lead), layer.spec.in_features)
        if coefficients is None:
            weights: list[Any] = functional.route(
                layer.config, self._gate, rows, layer.backend, buffers=layer.buffers
            ).coefficients
        else:
            weights = layer._merged(coefficients, lead)
            if any(isinstance(given, TopK) for given in weights):
                raise ShapeError(
                    "a prepared layer takes dense coefficients; got indexed ones. Call the layer."
                )
        named = {f"coefficients_{level}": given for level, given in enumerate(weights)}
        named |= {"x": rows} | self._arrays
        arrays = [named.pop(operand.name) for operand in self._program.operands]
        weights.clear()
        (result,), _ = execute(self._program, arrays, layer.backend)
        return result.reshape(*lead, layer.spec.out_features)


class MuMoEEmbedding(_Layer):
    """A mixture of embedding tables: token ids pick a row of every expert, coefficients mix them.

    An id is a one-hot input that is never built: the input mode is indexed by a gather. The layer
    has no gate of its own, since an id says nothing but itself; coefficients come from the model.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of an embedding.
        experts: N, or one size a level of hierarchy.
        factorization: a value such as ``CP(rank=64)``, or its name.
        rank: bond sizes, with a name.
        budget: what the rank may cost instead; by default the parameters of one table.
        init: ``"variance"`` or ``"paper"``.
        dtype: ``"float16"``, ``"float32"`` or ``"float64"``.
        seed: of the first values; a NumPy generator is drawn from.

    Raises:
        SpecError, RankError, BudgetError: as :class:`MuMoE`.

    >>> import numpy as np
    >>> table = MuMoEEmbedding(1000, 32, experts=4, factorization="cp", rank=8, seed=0)
    >>> even = np.full((2, 3, 4), 0.25, dtype="float32")
    >>> table(np.array([[1, 5, 7], [2, 2, 999]]), even).shape
    (2, 3, 32)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        experts: int | tuple[int, ...],
        factorization: str | Factorization = "cp",
        *,
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        init: str = "variance",
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.config = functional.resolve_config(
            num_embeddings,
            embedding_dim,
            experts,
            factorization,
            rank=rank,
            budget=budget,
            bias=False,
            gate=None,
            indexed_input=True,
        )
        self.parameters, self.buffers = draw(
            self.config, checked_dtype(dtype), seed, init, self.backend
        )

    def __repr__(self) -> str:
        spec = self.config.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        return (
            f"MuMoEEmbedding({spec.in_features}, {spec.out_features}, experts={experts}, "
            f"factorization={spec.factorization!r}, dtype={self.dtype.name!r})"
        )

    def __call__(self, ids: NDArray, coefficients: Given) -> NDArray:
        """Embeddings (..., dim) of ids (...), mixed by coefficients (..., N_e) a level.

        Raises:
            ShapeError: ids that are no integers or out of range, or coefficients of other shapes.
        """
        lead = functional.check_ids(ids, self.spec.in_features, self.backend)
        given = self._merged(coefficients, lead)
        result = functional.apply_experts(
            self.config, self.parameters, ids.reshape(-1), given, self.backend
        )
        return result.reshape(*lead, self.spec.out_features)

    def vjp(
        self, ids: NDArray, coefficients: Given
    ) -> tuple[NDArray, Callable[[NDArray], Gradients]]:
        """Run the layer and return its output with the way back, as :meth:`MuMoE.vjp`."""
        lead = functional.check_ids(ids, self.spec.in_features, self.backend)
        given = self._merged(coefficients, lead)
        result, pull = functional.experts_vjp(
            self.config, self.parameters, ids.reshape(-1), given, self.backend
        )
        shape = (*lead, self.spec.out_features)

        def pullback(cotangent: NDArray) -> Gradients:
            check_cotangent(cotangent, shape)
            found = pull(cotangent.reshape(result.shape))
            by_level = [found.pop(f"coefficients_{e}") for e in range(self.spec.levels)]
            wide = tuple(each.reshape(*lead, each.shape[-1]) for each in by_level)
            return Gradients(None, found, wide)

        return result.reshape(shape), pullback


C = TypeVar("C", LayerConfig, BlockConfig)


def read_block(
    path: str | PathLike[str], block: str, kind: type[C], backend: Backend
) -> tuple[C, Mapping[str, NDArray]]:
    """Configuration and arrays of a checkpoint, checked against one another."""
    saved = read_checkpoint(path, backend)
    if saved.block != block:
        raise CheckpointError(
            f"the file must hold a {block}; got a {saved.block}. Open it with {saved.block}.load."
        )
    try:
        config = kind.from_dict(saved.config)
    except TensormoeError as error:
        raise CheckpointError(f"the file describes no {block}: {error}") from error
    match_arrays({**config.parameter_shapes(), **config.buffer_shapes()}, saved.arrays)
    return config, saved.arrays


def check_cotangent(cotangent: NDArray, shape: tuple[int, ...]) -> None:
    if tuple(cotangent.shape) != shape:
        raise ShapeError(
            f"the cotangent must have the output's shape {shape}; got {tuple(cotangent.shape)}."
        )


def _slice(given: list[Any] | None, start: int, stop: int) -> list[Any] | None:
    if given is None:
        return None
    return [
        TopK(each.indices[start:stop], each.values[start:stop])
        if isinstance(each, TopK)
        else each[start:stop]
        for each in given
    ]

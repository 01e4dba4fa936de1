"""What the layers of Flax and Equinox share: all that follows from a configuration and arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax import Array

from tensormoe import LayerSpec, functional
from tensormoe._html import layer_html
from tensormoe.checkpoint import check_arrays
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.planning import Cost, Plan
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._dtypes import FLOATS
from tensormoe_jax._initialize import initial_buffers, initialize

__all__ = ["Block", "Layer", "Ready", "first_values", "ready"]

C = TypeVar("C", LayerConfig, BlockConfig)
Weights = tuple[Array, Array | None]


@dataclass(frozen=True, eq=False)
class Ready(Generic[C]):
    """A layer's arrays that exist already, in the place of a source of first values."""

    config: C
    arrays: Mapping[str, Array]


def ready(config: C, arrays: Mapping[str, Array]) -> Any:
    """Given arrays as a source of first values, checked.

    Raises:
        BackendError, CheckpointError, ShapeError: as ``check_arrays``.
    """
    check_arrays(config, arrays, BACKEND, FLOATS)
    return Ready(config, arrays)


def first_values(
    source: Any, resolve: Callable[[], C], init: str, dtype: Any, gate_dtype: Any = None
) -> tuple[C, dict[str, Array]]:
    """A layer's configuration, and its parameters and buffers by canonical name.

    Args:
        source: a key, or :class:`Ready`.
        resolve: makes the configuration of the constructor's arguments.
        init: ``"variance"`` or ``"paper"``.
        dtype: of the parameters.
        gate_dtype: of the gate's, if it is another one.
    """
    if isinstance(source, Ready):
        return source.config, dict(source.arrays)
    config = resolve()
    drawn = initialize(config, source, init=init, dtype=dtype, gate_dtype=gate_dtype)
    return config, drawn | initial_buffers(config, dtype=dtype)


class _Named:
    """Parameters by canonical name."""

    _repr_html_ = layer_html

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Array]:
        """The trainable arrays by canonical name, as the functional form takes them."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the factors; inputs must have it. A gate may be in float32 beside them."""
        dtype: np.dtype[Any] = next(iter(self.parameters.values())).dtype
        return dtype

    def _dtype_argument(self) -> str:
        # what transformations leave in the place of an array may have no dtype
        first, *_, last = self.parameters.values()
        if not hasattr(first, "dtype") or not hasattr(last, "dtype"):
            return ""
        gate = f", gate_dtype={last.dtype.name!r}" if last.dtype != first.dtype else ""
        return f", dtype={first.dtype.name!r}{gate}"


class Layer(_Named):
    """What layers share; their parameters are ``factors.<name>`` and ``gate.<name>``."""

    config: LayerConfig

    @property
    def spec(self) -> LayerSpec:
        """Sizes and factorization."""
        return self.config.spec

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.config.num_parameters

    def plan(self, batch: int) -> Plan:
        """How the layer runs ``batch`` inputs."""
        return functional.layer_plan(self.config, batch)

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """What one call costs for ``batch`` inputs, the gate included, before XLA fuses it."""
        return functional.layer_cost(
            self.config, batch, BACKEND, self.dtype.itemsize, training=training
        )

    def expert(self, *index: int) -> tuple[Array, Array | None]:
        """One expert's matrix (in, out) and bias (out,), without building 𝒲; differentiable.

        Args:
            index: one number a level; plain integers, no traced ones.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return functional.expert_weight(self.config, self.parameters, index, BACKEND)

    def materialize(self) -> tuple[Array, Array | None]:
        """𝒲 (experts…, in, out) and the biases (experts…, out), built explicitly: N·I·O entries."""
        return functional.materialize(self.config, self.parameters, BACKEND)

    def _describe(self, *, options: bool = True) -> str:
        spec = self.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        chosen = f", bias={spec.bias}, gate={self.config.gate!r}" if options else ""
        return (
            f"{type(self).__name__}({spec.in_features}, {spec.out_features}, experts={experts}, "
            f"factorization={spec.factorization!r}{chosen}{self._dtype_argument()})"
        )


class Block(_Named):
    """What blocks share: ``first.factors.<name>``, ``second.factors.<name>``, ``gate.<name>``."""

    config: BlockConfig
    first: Any
    second: Any
    act: Callable[[Array], Array] | None

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        own = (each for each in jax.tree.leaves(self.act) if isinstance(each, Array))
        return self.config.num_parameters + sum(each.size for each in own)

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.config.first.spec.in_features

    @property
    def hidden_features(self) -> int:
        """Size between the layers: of what the second is given."""
        return self.config.hidden_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.config.second.spec.out_features

    def plan(self, batch: int) -> tuple[Plan, Plan]:
        """How each of the two layers runs ``batch`` inputs."""
        return self.first.plan(batch), self.second.plan(batch)

    def expert(self, *index: int) -> tuple[Weights, Weights]:
        """One expert, an MLP of its own, as matrix and bias of both of its layers; differentiable.

        The block with coefficient 1 for this expert computes ``act(x @ W1 + b1) @ W2 + b2``, and if
        it is gated ``(act(g) * u) @ W2 + b2`` with ``g`` and ``u`` the halves of ``x @ W1 + b1``.

        Args:
            index: one number per level; plain integers, not traced ones.

        Returns:
            ``(W1, b1), (W2, b2)``: (in, hidden) and (hidden,), twice as many columns if the block
            is gated; (hidden, out) and (out,). Biases are None where the block has none.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return self.first.expert(*index), self.second.expert(*index)

    def materialize(self) -> tuple[Weights, Weights]:
        """The experts of both layers, built explicitly: of each as :meth:`MuMoE.materialize`."""
        return self.first.materialize(), self.second.materialize()

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """Cost of one call for ``batch`` inputs: both layers, gate and activation."""
        return functional.block_cost(
            self.config, batch, BACKEND, self.dtype.itemsize, training=training
        )

    def _describe(self, drop: float) -> str:
        first, second = self.config.first.spec, self.config.second.spec
        experts = first.experts[0] if first.levels == 1 else first.experts
        gated = "gated=True, " if self.config.gated else ""
        return (
            f"{type(self).__name__}({first.in_features}, {second.in_features}, "
            f"{second.out_features}, act_layer={self.config.act_layer or self.act!r}, "
            f"bias={first.bias}, drop={drop}, {gated}experts={experts}, "
            f"factorization={(first.factorization, second.factorization)!r}, "
            f"gate={self.config.first.gate!r}{self._dtype_argument()})"
        )

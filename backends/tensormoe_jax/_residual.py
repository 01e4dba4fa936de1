"""Parts that frozen layers with a mixture share in Flax and Equinox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tensormoe import functional
from tensormoe._residual_layers import ResidualMethods
from tensormoe.backend import Backend
from tensormoe.mixtures import ResidualConfig, add_residual, start_at_zero
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._keys import checked_key
from tensormoe_jax._layers import first_values

# of the key that draws what start_at_zero draws: others are counted from 0
_LAST = 2**31 - 1


def residual_values(
    config: ResidualConfig, key: Array, init: str, base: object, dtype: Any, gate_dtype: Any
) -> dict[str, Array]:
    """Initial parameters and buffers of the mixture; its outputs are zero.

    Args:
        config: the mixture.
        key: of ``jax.random``.
        init: of the factors that do not start at zero.
        base: whose dtype the mixture has by default.
        dtype: of the parameters.
        gate_dtype: of the gate's.
    """
    if dtype is None:
        floats = (each for each in jax.tree.leaves(base) if is_inexact(each))
        dtype = next((each.dtype for each in floats), None)
    arrays = first_values(config.layer, key, init, dtype, gate_dtype)
    last = jax.random.fold_in(checked_key(key), _LAST)
    kind = next(iter(arrays.values())).dtype

    def uniform(shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(last, shape, kind, -1.0, 1.0)

    return arrays | start_at_zero(config.layer, arrays, uniform, BACKEND)


def is_inexact(leaf: object) -> bool:
    """Whether it is an array of JAX's that has gradients."""
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def stopped(tree: Any) -> Any:
    """A pytree without gradients by its arrays."""
    stop = jax.lax.stop_gradient
    return jax.tree.map(lambda each: stop(each) if is_inexact(each) else each, tree)


class ResidualLayer(ResidualMethods[Array]):
    """Frozen layers with a mixture, called on arrays."""

    backend: ClassVar[Backend] = BACKEND

    adapter: Any

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the mixture."""
        dtype: np.dtype[Any] = self.adapter.dtype
        return dtype

    def _added(self, x: Array, base: Callable[[Array], Array], adapter: Callable[..., Any]) -> Any:
        """Outputs of both; ``adapter`` returns them alone, or with a state."""
        functional.check_array(x, BACKEND, "x")
        functional.check_input(x, self.in_features, x.dtype, BACKEND)
        made = adapter(self._for_adapter(x))
        output, *state = made if isinstance(made, tuple) else (made,)
        y = add_residual(self.config, base(x), output, BACKEND)
        return (y, *state) if state else y

    def _for_adapter(self, x: Array) -> Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(self.dtype) if floating and x.dtype != self.dtype else x

    def _adapter_arrays(self) -> Mapping[str, Array]:
        held = self.adapter.buffers
        return {**self.adapter.parameters, **(held() if callable(held) else held)}

    def _dtype_text(self) -> str:
        text: str = self.adapter._dtype_text()
        return text

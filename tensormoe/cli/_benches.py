"""Layers of each library, as ``tensormoe calibrate`` times them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from tensormoe.factorizations import Factorization
from tensormoe.planning import Cost

Call = Callable[[], object]
Experts = int | tuple[int, ...]


class Layer(Protocol):
    """A layer whose gate tells inputs apart, as after training."""

    def cost(self, batch: int, training: bool) -> Cost:
        """Cost of a call, as the library runs it."""

    def call(self, batch: int, training: bool) -> Call:
        """A forward call of a batch, or a forward and backward pass."""


class Bench(Protocol):
    """A library whose layers are timed."""

    @property
    def threads(self) -> int:
        """Number of threads that the library runs on."""

    def layer(
        self, in_features: int, out_features: int, experts: Experts, factorization: Factorization
    ) -> Layer:
        """A layer with the usual gate."""


class NumpyBench:
    """NumPy's layers."""

    @property
    def threads(self) -> int:
        return threads_now("numpy") or _cores()

    def layer(self, *sizes: Any) -> Layer:
        from tensormoe_numpy import MuMoE

        return _NumpyLayer(MuMoE(*sizes, seed=0))


class _NumpyLayer:
    def __init__(self, layer: Any) -> None:
        import numpy as np

        self._layer, self._rng = layer, np.random.default_rng(0)
        for name, array in layer.parameters.items():
            if name.startswith("gate."):
                array[...] = self._rng.standard_normal(array.shape) * array.shape[0] ** -0.5

    def cost(self, batch: int, training: bool) -> Cost:
        found: Cost = self._layer.cost(batch, training=training)
        return found

    def call(self, batch: int, training: bool) -> Call:
        layer, spec = self._layer, self._layer.spec
        x, cotangent = (
            self._rng.standard_normal((batch, size), dtype="float32")
            for size in (spec.in_features, spec.out_features)
        )

        def train() -> object:
            output, pull = layer.vjp(x)
            return output, pull(cotangent)

        return train if training else lambda: layer(x)


class TorchBench:
    """PyTorch's layers on the CPU."""

    @property
    def threads(self) -> int:
        import torch

        return torch.get_num_threads()

    def layer(self, *sizes: Any) -> Layer:
        from tensormoe_torch import MuMoE

        return _TorchLayer(MuMoE(*sizes))


class _TorchLayer:
    def __init__(self, layer: Any) -> None:
        import torch

        self._layer, self._generator = layer, torch.Generator().manual_seed(0)
        with torch.no_grad():
            for array in layer.gate.parameters():
                array.normal_(0.0, array.shape[0] ** -0.5, generator=self._generator)

    def cost(self, batch: int, training: bool) -> Cost:
        found: Cost = self._layer.cost(batch, training=training)
        return found

    def call(self, batch: int, training: bool) -> Call:
        import torch

        layer, spec = self._layer, self._layer.spec
        x, cotangent = (
            torch.randn((batch, size), generator=self._generator)
            for size in (spec.in_features, spec.out_features)
        )
        if not training:

            def forward() -> object:
                with torch.no_grad():
                    return layer(x)

            return forward
        x.requires_grad_()

        def train() -> object:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            output = layer(x)
            output.backward(cotangent)
            return output

        return train


class JaxBench:
    """JAX's layers, compiled, on its default device."""

    @property
    def threads(self) -> int:
        return threads_now("jax") or _cores()

    def layer(self, *sizes: Any) -> Layer:
        return _JaxLayer(*sizes)


class _JaxLayer:
    def __init__(
        self, in_features: int, out_features: int, experts: Experts, factorization: Factorization
    ) -> None:
        import jax

        from tensormoe.functional import Options
        from tensormoe_jax import initialize

        options = Options(experts, factorization)
        self._config = options.layer(in_features, out_features)
        self._parameters = initialize(self._config, jax.random.key(0))
        for name, array in self._parameters.items():
            if name.startswith("gate."):
                drawn = jax.random.normal(jax.random.key(1), array.shape)
                self._parameters[name] = drawn * array.shape[0] ** -0.5

    def cost(self, batch: int, training: bool) -> Cost:
        from tensormoe_jax import LIBRARY

        return self._config.cost(batch, training=training, library=LIBRARY)

    def call(self, batch: int, training: bool) -> Call:
        import jax

        from tensormoe_jax import apply

        config, spec = self._config, self._config.spec
        x, cotangent = (
            jax.random.normal(jax.random.key(2), (batch, size))
            for size in (spec.in_features, spec.out_features)
        )

        def forward(parameters: Any, x: Any) -> Any:
            return apply(config, parameters, x)

        def train(parameters: Any, x: Any, cotangent: Any) -> Any:
            output, pull = jax.vjp(forward, parameters, x)
            return output, pull(cotangent)

        given = (self._parameters, x, cotangent) if training else (self._parameters, x)
        compiled = jax.jit(train if training else forward).lower(*given).compile()
        return lambda: jax.block_until_ready(compiled(*given))  # type: ignore[no-untyped-call]


BENCHES: dict[str, Callable[[], Bench]] = {
    "numpy": NumpyBench,
    "torch": TorchBench,
    "jax": JaxBench,
}


def threads_now(library: str) -> int | None:
    """Number of threads that a library would run on, where that is known without importing it.

    PyTorch has one for each physical core unless the environment says another number.
    """
    if library == "torch":
        return _asked("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    found = None
    if library == "numpy":
        found = _asked("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    return _cores() if found is None else found


def _asked(*variables: str) -> int | None:
    """The number of threads in the first variable of the environment that has one."""
    for name in variables:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value):
            return int(value)
    return None


def _cores() -> int:
    """Cores that this process may use; an XLA client starts as many threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

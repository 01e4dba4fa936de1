"""JAX on a GPU: the contract of a backend, and the layers as functions.

Needs ``JAX_ENABLE_X64=1`` and ``JAX_DEFAULT_MATMUL_PRECISION=highest`` in the environment, which
JAX reads when it starts: by default it has no float64, and rounds what it multiplies on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# every example has shapes of its own, for which XLA compiles every operation
EXAMPLES = int(os.environ.get("TENSORMOE_TEST_JAX_EXAMPLES", "24"))
settings.register_profile("compiled", settings(), max_examples=EXAMPLES)
settings.load_profile("compiled")

from tensormoe.testing import BackendContract  # noqa: E402
from tests.gpu._matching import DEVICE, Found, LayersMatch  # noqa: E402

jax = pytest.importorskip("jax")
tensormoe_jax = pytest.importorskip("tensormoe_jax")


def test_the_device(record_testsuite_property: Callable[[str, object], None]) -> None:
    array = jax.numpy.asarray(np.ones(3))
    assert array.dtype == "float64"
    assert jax.config.jax_default_matmul_precision == "highest"
    (place,) = array.devices()
    assert place.platform == {"cuda": "gpu"}.get(DEVICE, DEVICE)
    record_testsuite_property("device", place.device_kind)
    record_testsuite_property("version", jax.__version__)


class TestContract(BackendContract):
    backend = tensormoe_jax.BACKEND

    def from_numpy(self, array: np.ndarray) -> Any:
        return jax.numpy.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


class TestLayers(LayersMatch):
    def run(self, layer: Any, path: Path, arguments: list[Any], cotangent: np.ndarray) -> Found:
        parameters = {k: jax.numpy.asarray(each) for k, each in layer.parameters.items()}
        x, *made = jax.tree.map(jax.numpy.asarray, arguments)
        by_x = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)

        @jax.jit
        def both(parameters: Any, x: Any, made: Any, upstream: Any) -> Any:
            def run(*moved: Any) -> Any:
                return tensormoe_jax.apply(layer.config, moved[0], *(moved[1:] or (x,)), *made)

            output, pull = jax.vjp(run, parameters, *([x] if by_x else []))
            return output, pull(upstream)

        output, gradients = both(parameters, x, made, jax.numpy.asarray(cotangent))
        found = dict(gradients[0]) | ({"x": gradients[1]} if by_x else {})
        return np.asarray(output), {name: np.asarray(each) for name, each in found.items()}

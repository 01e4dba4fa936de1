"""Table of a GPU report on JAX: jitted calls, and the seconds that compiling takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu_records import Cells, Recorder
from _gpu_roofline import Rooflines, bound, relative_error
from _gpu_settings import (
    FLOAT32,
    PRECISIONS,
    TF32,
    TOLERANCES,
    Precision,
    Setting,
    Sizes,
    check_rounding,
    settings,
)
from _gpu_timing import Turns, jax_elapsed
from _jax_layers import direct, products_of, trained
from _shared import Call, interleaved
from jax import Array

from tensormoe import CP
from tensormoe_jax import apply

MICRO = 1e6
TABLE = "JAX, jitted"


class JaxTables:
    """Measures on one device.

    Args:
        recorder: of this part.
        sizes: of the report.
        device: "cuda" or "cpu".
        rooflines: by name of a precision.
    """

    def __init__(self, recorder: Recorder, sizes: Sizes, device: str, rooflines: Rooflines) -> None:
        self.recorder, self.sizes, self.device = recorder, sizes, device
        self.rooflines = rooflines
        self.elapsed = jax_elapsed(device)
        self.precisions = tuple(each for each in PRECISIONS if _has(device, each))
        self._linears: dict[tuple[int, str], tuple[Any, Any, Any, float]] = {}

    def jitted(self) -> None:
        """Layer, products and einsum."""
        self.recorder.fact("device of JAX", jax.devices()[0].device_kind)
        for precision in self.precisions:
            what = f"error of a product on JAX, {precision.name}"
            self.recorder.tried(what, partial(self._product_error, what, precision))
        self.recorder.each(settings(self.sizes, self.precisions), self._row, self._clean)

    def _row(self, setting: Setting) -> None:
        with _multiplied(setting.precision):
            self.recorder.row(TABLE, setting.cells | self._cells(setting))

    def _cells(self, setting: Setting) -> Cells:
        dtype, features = setting.precision.dtype, self.sizes.features
        config, parameters, rank = trained(setting.factorization, setting.experts, features, dtype)
        # by NumPy: XLA would compile a generator for every shape
        rng = np.random.default_rng(0)
        x, cotangent = (
            jnp.asarray(rng.standard_normal((setting.batch, features)), dtype) for _ in range(2)
        )
        plain, linear, linear_step, linear_seconds = self._plain(setting, x)
        layer, seconds = compiled(partial(apply, config), parameters, x)
        products, operands = products_of(config, parameters, x)
        calls: list[Call] = [
            partial(layer, parameters, x),
            partial(linear, plain, x),
            partial(products, operands),
        ]
        cp = isinstance(config.spec.factorization, CP)
        einsum = self._einsum(setting, partial(direct, cp), parameters, x)
        if einsum is not None:
            check_equal(layer(parameters, x), einsum(), setting.precision)
            calls.append(einsum)
        mine, by_linear, alone, *other = self._compare(calls)
        del operands, calls
        step, step_seconds = compiled(_step(partial(apply, config)), parameters, x, cotangent)
        both, linear_both = self._compare(
            [partial(step, parameters, x, cotangent), partial(linear_step, plain, x, cotangent)]
        )
        bounds = [
            bound(config, setting.batch, setting.precision, self.rooflines, training)
            for training in (False, True)
        ]
        shares = [
            None if least is None else 100 * least / taken
            for least, taken in zip(bounds, (mine, both), strict=True)
        ]
        return {
            "rank": str(rank),
            "forward µs": mine * MICRO,
            "÷ products": mine / alone,
            "÷ linear": mine / by_linear,
            "einsum ÷ layer": other[0] / mine if other else None,
            "% of roofline": shares[0],
            "step µs": both * MICRO,
            "step ÷ linear": both / linear_both,
            "step, % of roofline": shares[1],
            "compiling s": seconds,
            "compiling step s": step_seconds,
            "compiling linear's step s": linear_seconds,
        }

    def _plain(self, setting: Setting, x: Array) -> tuple[Any, Any, Any, float]:
        """Parameters of a linear layer, its call and step, and seconds that the step compiled for.

        Rows with the same shapes share them.
        """
        key = setting.batch, setting.precision.name
        if key not in self._linears:
            features, dtype = self.sizes.features, setting.precision.dtype
            weight = np.random.default_rng(1).standard_normal((features, features))
            plain = {
                "weight": jnp.asarray(weight * features**-0.5, dtype),
                "bias": jnp.zeros(features, dtype),
            }
            call, _ = compiled(_linear, plain, x)
            self._linears[key] = plain, call, *compiled(_step(_linear), plain, x, x)
        return self._linears[key]

    def _einsum(
        self, setting: Setting, function: Callable[..., Array], *arguments: Any
    ) -> Callable[[], Array] | None:
        """The direct formulation, or None where it does not run, which is recorded."""
        made: list[Callable[[], Array]] = []

        def run() -> None:
            call = partial(compiled(function, *arguments)[0], *arguments)
            jax.block_until_ready(call())
            made.append(call)

        return None if self.recorder.tried(f"einsum of {setting}", run) else made[0]

    def _compare(self, calls: list[Call]) -> list[float]:
        turn = Turns(self.elapsed, self.sizes.turn)
        return interleaved(calls, self.sizes.seconds, turn=turn)

    def _product_error(self, what: str, precision: Precision) -> None:
        drawn = np.random.default_rng(0).standard_normal((2, 512, 512))
        left, right = (jnp.asarray(each, precision.dtype) for each in drawn)
        exact = np.asarray(left, "float64") @ np.asarray(right, "float64")
        with _multiplied(precision):
            made = np.asarray(left @ right, "float64")
        error = relative_error(made, exact)
        self.recorder.fact(what, f"{error:.1e}")
        check_rounding(precision, error)

    def _clean(self) -> None:
        gc.collect()


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """A jitted function, and seconds to trace, lower and compile it."""
    start = perf_counter()
    found = jax.jit(function).lower(*arguments).compile()
    return found, perf_counter() - start


def check_equal(mine: Array, other: Array, precision: Precision) -> None:
    """Raise if two formulations of the same layer are apart."""
    found, wanted = (np.asarray(each, "float32") for each in (mine, other))
    apart = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not apart <= TOLERANCES[precision.name]:
        raise ArithmeticError(f"layer and einsum differ by {apart:.1e} of the largest output")


def _step(function: Callable[..., Array]) -> Callable[..., Any]:
    """Output and all gradients for a cotangent."""

    def step(parameters: Any, x: Array, cotangent: Array) -> Any:
        output, pull = jax.vjp(function, parameters, x)
        return output, pull(cotangent)

    return step


def _linear(parameters: Any, x: Array) -> Array:
    made: Array = x @ parameters["weight"] + parameters["bias"]
    return made


def _multiplied(precision: Precision) -> AbstractContextManager[Any]:
    """Products of float32 in JAX: on a GPU, its own default rounds them to TF32."""
    return jax.default_matmul_precision("highest" if precision is FLOAT32 else "default")


def _has(device: str, precision: Precision) -> bool:
    if device == "cpu":
        return precision is not TF32
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    return not precision.tensor_cores or float(capability) >= 8.0

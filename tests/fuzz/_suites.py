"""Checks of each case: outputs, gradients and second derivatives against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tensormoe import TopK, convert
from tests._everywhere import EQUINOX, FORMS, JAX, NNX, TORCH
from tests._everywhere import _differentiated as differentiated
from tests._frameworks import NUMPY, Found, Framework, mapped, values_of
from tests.fuzz._cases import Case, draw_case
from tests.fuzz._reference import is_at_kink, reference

Named = dict[str, np.ndarray]

OUTPUT = {"float32": 2e-5, "float64": 1e-10}
SLOPE = {"float32": 2e-4, "float64": 1e-6}
CURVATURE = {"float32": 5e-3, "float64": 2e-4}


@dataclass(frozen=True)
class Suite:
    """A library's cases.

    Args:
        check: a case; raises AssertionError where it is wrong, and says whether it looked.
        count: how many make a full run.
        per_layer: cases in a row that share a layer.
        one_shape: whether they share shapes and dtype too, since each shape is compiled.
    """

    check: Callable[[Case], bool]
    count: int
    per_layer: int
    one_shape: bool

    def run(self, index: int) -> bool:
        """Check the case of a number; False where there is nothing to check."""
        case = draw_case(index, self.per_layer, one_shape=self.one_shape)
        return case is not None and self.check(case)


def check(
    case: Case, framework: Framework, curvature: Callable[[Case, Named], float] | None
) -> bool:
    """Compare a library with the reference, second derivatives too where ``curvature`` has them."""
    with framework.precision(case.dtype):
        found = framework.run(framework.restore(case.config, case.arrays), case.call)
        _check_outputs(case, found)
        directions = {
            name: case.rng.standard_normal(array.shape) for name, array in found.gradients.items()
        }
        along = partial(_along, case, directions)
        products = [
            np.sum(np.asarray(found.gradients[name], "float64") * way)
            for name, way in directions.items()
        ]
        size = sum(
            float(np.sum(np.abs(found.gradients[name] * way))) for name, way in directions.items()
        )
        bound = SLOPE[case.dtype] * (size + 1e-3)
        # small first: at a larger one a jump nearby may look like a slope
        slope = _settled(along, (1e-5, 1e-6, 1e-4), bound, first=True)
        if slope is None:
            return False
        _near(float(sum(products)), slope, bound, "gradient")
        bound = CURVATURE[case.dtype] * (abs(slope) + size + 1e-2)
        steps = (2e-3, 5e-4)
        if is_at_kink(case.config, case.arrays, case.call.x, case.call.made):
            return True
        bend = None if curvature is None else _settled(along, steps, bound, first=False)
        if curvature is not None and bend is not None:
            _near(curvature(case, directions), bend, bound + 1e-3 * abs(bend), "second derivative")
    return True


def _check_outputs(case: Case, found: Found) -> None:
    for training, got in ((False, found.output), (True, found.trained)):
        want = reference(case.config, case.arrays, case.call.x, case.call.made, training)
        assert got.shape == want.shape, f"shape {got.shape}, not {want.shape}"
        assert got.dtype == case.dtype, f"dtype {got.dtype}"
        largest = max(1.0, float(np.max(np.abs(want), initial=0.0)))
        off = float(np.max(np.abs(got - want), initial=0.0))
        _near(off, 0.0, OUTPUT[case.dtype] * largest, f"output, training={training}")


def _near(got: float, want: float, bound: float, what: str) -> None:
    assert abs(got - want) <= bound, f"{what}: {got!r}, not {want!r}; {bound:.1e} is admitted"


def _along(case: Case, directions: Mapping[str, np.ndarray], step: float) -> float:
    """The reference's output times the cotangent, ``step`` along all directions at once."""

    def moved(name: str, array: Any) -> Any:
        way = directions.get(name)
        return np.asarray(array, "float64") + (0.0 if way is None else step * way)

    arrays = {name: moved(name, array) for name, array in case.arrays.items()}
    call = case.call
    x = moved("input", call.x) if "input" in directions else call.x
    made = None if call.made is None else list(call.made)
    for level, given in enumerate(made or ()):
        assert made is not None
        name = f"coefficients_{level}"
        if isinstance(given, TopK):
            made[level] = TopK(given.indices, moved(name, given.values))
        else:
            made[level] = moved(name, given)
    output = reference(case.config, arrays, x, made, training=True)
    return float(np.sum(output * case.call.cotangent))


def _settled(
    along: Callable[[float], float], steps: Sequence[float], bound: float, *, first: bool
) -> float | None:
    """A derivative from differences of two steps; None where they disagree, as at a jump."""

    def difference(step: float) -> float:
        ahead, behind = along(step), along(-step)
        if first:
            return (ahead - behind) / (2.0 * step)
        return (ahead - 2.0 * along(0.0) + behind) / step**2

    for step in steps:
        wide, narrow = difference(step), difference(step / 2.0)
        if abs(narrow - wide) <= bound / 4.0:
            return (4.0 * narrow - wide) / 3.0
    return None


def torch_curvature(case: Case, directions: Named) -> float:
    """vᵀ H v of a PyTorch layer in training, by differentiating twice."""

    def tensor(array: Any) -> torch.Tensor:
        return convert(np.asarray(array, case.dtype), "torch", copy=True)

    layer = TORCH.restore(case.config, case.arrays).train()
    made = mapped(lambda a: convert(a, "torch", copy=True), case.call.made)
    x = convert(case.call.x, "torch", copy=True)
    sources = dict(layer.named_parameters())
    sources |= {f"coefficients_{level}": each for level, each in enumerate(values_of(made))}
    sources["input"] = x
    wanted = [sources[name].requires_grad_() for name in directions]
    ways = [tensor(way) for way in directions.values()]
    total = torch.sum(layer(x, made) * tensor(case.call.cotangent))
    slopes = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
    slope = sum(torch.sum(s * w) for s, w in zip(slopes, ways, strict=True) if s is not None)
    if not isinstance(slope, torch.Tensor) or not slope.requires_grad:
        return 0.0
    bends = torch.autograd.grad(slope, wanted, allow_unused=True)
    return sum(float(torch.sum(b * w)) for b, w in zip(bends, ways, strict=True) if b is not None)


def jax_curvature(case: Case, directions: Named) -> float:
    """vᵀ H v of JAX's functional form in training, forward over reverse, under ``jit``."""
    call = case.call
    made = mapped(jnp.asarray, call.made)
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    sources = dict(arrays)
    sources |= {f"coefficients_{level}": each for level, each in enumerate(values_of(made))}
    sources["input"] = jnp.asarray(call.x)
    ways = {name: jnp.asarray(way, case.dtype) for name, way in directions.items()}
    run = _twice(case.config, None if made is None else len(made))
    return float(run({n: sources[n] for n in ways}, ways, arrays, call.x, made, call.cotangent))


def _twice(config: Any, levels: int | None) -> Callable[..., Any]:
    key = (config, levels)
    if key not in _COMPILED:
        form = FORMS["JAX"]

        @jax.jit
        def run(sources: Any, ways: Any, arrays: Any, x: Any, made: Any, cotangent: Any) -> Any:
            def total(moved: Any) -> Any:
                given = None if made is None else list(made)
                for level, each in enumerate(given or ()):
                    own = moved.get(f"coefficients_{level}")
                    if own is not None:
                        given[level] = TopK(each.indices, own) if isinstance(each, TopK) else own
                named = {name: moved.get(name, array) for name, array in arrays.items()}
                _, trained, _ = form(config, named, moved.get("input", x), given)
                return jnp.sum(trained * cotangent)

            _, bends = jax.jvp(jax.grad(total), (sources,), (ways,))
            return sum(jnp.sum(bends[name] * way) for name, way in ways.items())

        _COMPILED[key] = run
    return _COMPILED[key]


_COMPILED: dict[Any, Callable[..., Any]] = {}


def check_jax(case: Case) -> bool:
    """One of the three forms, by the layer; what was compiled is forgotten from time to time."""
    if len(_COMPILED) > 50:
        _COMPILED.clear()
        differentiated.cache_clear()
        jax.clear_caches()
    framework = (JAX, NNX, EQUINOX)[hash(case.config) % 3]
    return check(case, framework, jax_curvature)


def _run_compiled(layer: Any, call: Any) -> Found:
    torch._dynamo.reset()
    return TORCH.run(layer, call)


def check_compiled(case: Case) -> bool:
    """PyTorch's layer compiled in one graph, without code generation."""

    def restore(config: Any, arrays: Any) -> Any:
        return _Compiled(TORCH.restore(config, arrays))

    return check(case, replace(TORCH, restore=restore, run=_run_compiled), None)


class _Compiled:
    """A module that compiles its calls, and is otherwise itself."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer
        self._call = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


SUITES = {
    "numpy": Suite(partial(check, framework=NUMPY, curvature=None), 100_000, 10, False),
    "torch": Suite(partial(check, framework=TORCH, curvature=torch_curvature), 100_000, 10, False),
    "jax": Suite(check_jax, 10_000, 10, True),
    "torch-compiled": Suite(check_compiled, 2_000, 4, True),
}

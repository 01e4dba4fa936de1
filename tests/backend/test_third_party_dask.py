"""Dask joins through an entry point, with nothing changed here: lazy, and the same layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import dask
import dask.array as da
import numpy as np
import pytest

from tensormoe import Gate, LayerSpec, TensorRing, entmax, functional, get_backend
from tensormoe.backend import Backend
from tensormoe.checkpoint import read_block, save_checkpoint
from tensormoe.functional import LayerConfig
from tensormoe.testing import BackendContract
from tests._examples import with_examples
from tests._third_party import installed_package

# chunks of a few entries are no way to compute, but a way to test
pytestmark = pytest.mark.filterwarnings("ignore:Increasing number of chunks")


@pytest.fixture(scope="module", autouse=True)
def dask_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site-packages")
    # threads cost more than they bring where arrays are small
    with installed_package("tensormoe-dask", site), dask.config.set(scheduler="synchronous"):
        yield


def chunked(array: np.ndarray) -> da.Array:
    """In two chunks along the first axis: inputs by rows, factors by their mode."""
    whole = array.shape[1:]
    first = array.shape[:1]
    return da.from_array(array.copy(), chunks=(*((size + 1) // 2 for size in first), *whole))


# thousands of tasks for each layer
@with_examples(operations=50, layers=15)
class TestDask(BackendContract):
    @property
    def backend(self) -> Any:
        return get_backend("dask")

    def from_numpy(self, array: np.ndarray) -> Any:
        return chunked(array)

    def all_to_numpy(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        return list(dask.compute(*arrays))


CONFIG = LayerConfig(LayerSpec(6, 4, (5, 3), TensorRing((2, 3, 2, 4))), Gate(bias=True))


@pytest.fixture
def parameters(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(size) for name, size in CONFIG.parameter_shapes().items()}


def run_layer(
    parameters: dict[str, Any], x: Any, upstream: Any, backend: Backend
) -> dict[str, Any]:
    """Everything that a layer does: forward, back, and its weights."""
    routed = functional.route(CONFIG, parameters, x, backend, keep=True)
    mixed = [*routed.coefficients]
    plain = functional.apply_experts(CONFIG, parameters, x, [*mixed], backend)
    output, pull = functional.experts_vjp(CONFIG, parameters, x, mixed, backend)
    found = {f"by {name}": gradient for name, gradient in pull(upstream).items()}
    cotangents = [found[f"by coefficients_{level}"] for level in range(CONFIG.spec.levels)]
    by_x, by_gate = functional.gate_vjp(CONFIG, parameters, x, routed, cotangents, backend)
    found |= {f"by {name}": gradient for name, gradient in by_gate.items()}
    found |= {"plain": plain, "output": output, "by x through the gate": by_x}
    found |= {f"coefficients {k}": each for k, each in enumerate(routed.coefficients)}
    found["one"], found["its bias"] = functional.expert_weight(CONFIG, parameters, (4, 1), backend)
    found["all"], found["their biases"] = functional.materialize(CONFIG, parameters, backend)
    return found | {"shares": entmax(x, alpha=3.0)}


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("computed before anybody asked")


def test_a_layer_is_recorded_and_equals_numpys(
    parameters: dict[str, np.ndarray], rng: np.random.Generator
) -> None:
    x, upstream = rng.standard_normal((10, 6)), rng.standard_normal((10, 4))
    want = run_layer(parameters, x, upstream, get_backend("numpy"))
    assert 0.0 < np.mean(want["coefficients 0"] == 0.0) < 1.0
    with dask.config.set(scheduler=refuse):
        # both axes of the data, and the mode of every factor
        lazy = {name: chunked(array) for name, array in parameters.items()}
        given = (da.from_array(each, chunks=(4, 3)) for each in (x, upstream))
        found = run_layer(lazy, *given, get_backend("dask"))
        assert all(isinstance(each, da.Array) for each in found.values())
        with pytest.raises(AssertionError, match="before anybody asked"):
            found["output"].compute()
    [computed] = dask.compute(found)
    assert set(computed) == set(want)
    for name, array in want.items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(computed[name], array, rtol=1e-9, atol=1e-11, err_msg=name)


def test_rows_stay_in_their_chunks(parameters: dict[str, np.ndarray]) -> None:
    """A chunk of the output needs that chunk of the input alone."""
    read = []

    def rows(block_info: Any = None) -> np.ndarray:
        place, _ = block_info[None]["chunk-location"]
        read.append(place)
        return np.random.default_rng(place).standard_normal((100, 6))

    x = da.map_blocks(rows, chunks=((100,) * 50, (6,)), dtype=float, meta=np.empty((0, 0)))
    lazy = {name: da.from_array(array) for name, array in parameters.items()}
    found = run_layer(lazy, x, da.ones((5000, 4), chunks=(100, 4)), get_backend("dask"))
    by_rows = ["output", "coefficients 0", "coefficients 1", "by x", "by x through the gate"]
    for name in by_rows:
        assert found[name].chunks[0] == x.chunks[0], name
        read.clear()
        found[name].blocks[7].compute()
        assert set(read) == {7}, name


def test_a_search_is_one_task_a_chunk(rng: np.random.Generator) -> None:
    # without a bound on its exponent, this one has the most rounds
    logits = rng.standard_normal((6, 1000))
    found = entmax(da.from_array(logits, chunks=(3, 1000)), alpha=3.0)
    assert len([key for key in found.dask if str(key[0]).startswith("while-loop")]) == 2
    assert len(found.dask) < 500
    np.testing.assert_allclose(found.compute(), entmax(logits, alpha=3.0), rtol=0, atol=1e-12)


def halved(value: Any) -> Any:
    return value * 0.5


def reversed_rows(value: Any) -> Any:
    return value[::-1] * 0.5


def shortened(value: Any) -> Any:
    return (value * 0.5).rechunk(1)


@pytest.mark.parametrize(
    ("change", "tasks"), [(halved, 2), (reversed_rows, 0), (shortened, 0)], ids=lambda it: it
)
def test_steps_that_mix_chunks_are_recorded_one_by_one(
    change: Callable[[Any], Any], tasks: int
) -> None:
    start = np.arange(4.0)[:, None]

    def step(value: Any) -> tuple[tuple[Any], Any]:
        following = change(value)
        return (following,), abs(following) + 1.0

    [found] = get_backend("dask").while_loop(step, (da.from_array(start, chunks=(2, 1)),), 3, 0.0)
    assert len([key for key in found.dask if str(key[0]).startswith("while-loop")]) == tasks
    want = start[::-1] if change is reversed_rows else start
    np.testing.assert_array_equal(found.compute(), want * 0.125)


def test_checkpoints_go_both_ways(parameters: dict[str, np.ndarray], tmp_path: Path) -> None:
    path, again = tmp_path / "numpy.safetensors", tmp_path / "dask.safetensors"
    save_checkpoint(path, "MuMoE", CONFIG.to_dict(), parameters)
    config, lazy = read_block(path, "MuMoE", LayerConfig, get_backend("dask"))
    assert config == CONFIG
    assert all(isinstance(array, da.Array) for array in lazy.values())
    save_checkpoint(again, "MuMoE", config.to_dict(), lazy)
    assert again.read_bytes() == path.read_bytes()

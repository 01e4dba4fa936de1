"""Calls without ``jax.jit``: compiled once, and nothing is tied to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tensormoe import CP, Factorization, Gate, LayerSpec, entmax
from tensormoe.functional import LayerConfig
from tensormoe.gates import top_k
from tensormoe_jax import apply, equinox, initialize, nnx
from tests._kinds import KINDS

X = jnp.linspace(-1.0, 1.0, 35).reshape(5, 7)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Compilation events while the test runs."""
    found: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def layers() -> dict[str, Callable[[jax.Array], Any]]:
    in_nnx = nnx.MuMoE(7, 4, experts=6, rank=2, rngs=0)
    in_equinox = equinox.MuMoE(7, 4, experts=6, rank=2, key=jax.random.key(0))
    block = nnx.MuMoEMLP(7, 9, experts=6, rank=2, gate="sparsemax", rngs=0)
    calls: dict[str, Callable[[jax.Array], Any]] = {
        f"alpha {alpha}": lambda x, alpha=alpha: entmax(x, alpha)
        for alpha in (1.0, 1.3, 1.5, 2.0, 3.0)
    }
    return calls | {
        "top-k": lambda x: top_k(x, 2),
        "nnx": in_nnx,
        "equinox": in_equinox,
        "block": block,
        "gradient": jax.grad(lambda x: in_nnx(x).sum()),
    }


@pytest.mark.parametrize("name", list(layers()))
def test_a_second_call_compiles_nothing(name: str, compiled: list[str]) -> None:
    call = layers()[name]
    first, *others = (factor * X for factor in (1.0, 3.0, 4.0))
    jax.block_until_ready(call(first))
    # compilation is recorded
    jax.jit(lambda x: x + len(name))(X)
    assert compiled
    compiled.clear()
    for other in others:
        jax.block_until_ready(call(other))
    assert not compiled


@pytest.mark.parametrize(
    ("kind", "init"),
    # either scheme draws factors one by one, whatever network they are of
    [*((kind, "variance") for kind in KINDS), *((kind, "paper") for kind in KINDS[::3])],
    ids=str,
)
def test_initial_values_are_committed_to_no_device(kind: Factorization, init: str) -> None:
    config = LayerConfig(LayerSpec(4, 3, (5, 2), kind), Gate(bias=True))
    parameters = initialize(config, jax.random.key(0), init=init)
    assert [name for name, array in parameters.items() if array.committed] == []


def test_results_are_committed_where_inputs_are() -> None:
    config = LayerConfig(LayerSpec(7, 3, 5, CP(2)), Gate("top_k", k=2))
    parameters = initialize(config, jax.random.key(0))
    assert not apply(config, parameters, X).committed
    there = jax.device_put(X, jax.devices()[0])
    assert apply(config, parameters, there).committed


@pytest.mark.skipif(jax.device_count() != 1, reason="of several devices none asks the others")
@pytest.mark.parametrize("gate", [Gate(), Gate("sparsemax"), Gate(alpha=3.0)], ids=str)
def test_a_single_device_ends_its_search_early(gate: Gate) -> None:
    config = LayerConfig(LayerSpec(7, 3, 5, CP(2)), gate)
    parameters = initialize(config, jax.random.key(0))
    loops = str(jax.make_jaxpr(lambda x: apply(config, parameters, x))(X))
    # a loop of all its rounds would be a scan
    assert "while[" in loops
    assert "reduce_or" in loops

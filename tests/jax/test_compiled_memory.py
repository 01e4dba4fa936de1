"""Memory that XLA plans for shapes is that of the call with arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tensormoe import CP, Dense, Gate, LayerSpec, TensorRing
from tensormoe.errors import SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_jax import apply, compiled_memory, initial_buffers, initialize

LAYER = LayerConfig(LayerSpec(24, 20, 6, TensorRing((2, 2, 5))), Gate())
NORMED = LayerConfig(LayerSpec(24, 20, 6, CP(5)), Gate(normalization="batch"))
IDS = LayerConfig(LayerSpec(24, 20, 6, CP(5)), None, True)
BLOCK = BlockConfig(LAYER, LayerConfig(LayerSpec(20, 24, 6, Dense()), None), "gelu")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [LAYER, NORMED, BLOCK], ids=["layer", "normed", "block"])
def test_it_is_that_of_the_call(config: Any, training: bool) -> None:
    parameters = initialize(config, jax.random.key(0))
    buffers = initial_buffers(config) or None
    x = jnp.ones((64, 24))

    def forward(parameters: Any, x: Any) -> Any:
        return apply(config, parameters, x, buffers=buffers)

    def train(parameters: Any, x: Any, cotangent: Any) -> Any:
        output, pull = jax.vjp(forward, parameters, x)
        return output, pull(cotangent)

    output = forward(parameters, x)
    given = (parameters, x, output) if training else (parameters, x)
    compiled = jax.jit(train if training else forward).lower(*given).compile()
    found = compiled.memory_analysis()
    wanted = found.temp_size_in_bytes + found.output_size_in_bytes
    assert compiled_memory(config, 64, training=training) == pytest.approx(wanted, rel=0.05)
    # gradients are as large as what they are of
    made = (output, parameters, x) if training else (output,)
    assert wanted >= sum(each.nbytes for each in jax.tree.leaves(made))


def test_dtypes_batches_and_ids() -> None:
    # XLA widens bfloat16 on the CPU: only results are sure to be narrow
    assert compiled_memory(LAYER, 64, dtype="bfloat16") >= 64 * 20 * 2
    assert compiled_memory(LAYER, 64) < compiled_memory(LAYER, 128)
    for config in (IDS, LayerConfig(IDS.spec, None)):
        assert 0 < compiled_memory(config, 64) < compiled_memory(config, 64, training=True)


def test_what_cannot_be_compiled_is_refused() -> None:
    for batch in (0, -1, 1.5, True, "64"):
        with pytest.raises(SpecError, match="batch must be"):
            compiled_memory(LAYER, batch)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="training"):
        compiled_memory(LAYER, 4, training="yes")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="dtype"):
        compiled_memory(LAYER, 4, dtype="complex64")
    with pytest.raises(Exception, match="activation"):
        compiled_memory(BlockConfig(BLOCK.first, BLOCK.second, None), 4)

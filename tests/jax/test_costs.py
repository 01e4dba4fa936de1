"""XLA's own counters agree with the cost model: FLOPs exactly, and nothing larger than planned."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import jax
import pytest

from tensormoe import Gate, LayerSpec
from tensormoe.functional import LayerConfig
from tensormoe.planning import Routing, plan_layer
from tensormoe_jax import apply
from tests._kinds import LARGE

LEVELS = [(12,), (5, 4), (4, 3, 2)]


def case(
    kind: Any, experts: tuple[int, ...], bias: bool, batch: int, gate: Gate | None, size: int = 14
) -> tuple[LayerConfig, dict[str, Any], Any, list[Any] | None]:
    """A layer's arguments as shapes, since compilers look at nothing else."""

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, "float32")

    config = LayerConfig(LayerSpec(size, size - 5, experts, kind, bias), gate)
    parameters = {name: shape(*sizes) for name, sizes in config.parameter_shapes().items()}
    made = None if gate else [shape(batch, count) for count in experts]
    return config, parameters, shape(batch, size), made


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", LEVELS, ids=str)
@pytest.mark.parametrize("kind", LARGE, ids=str)
def test_flops(kind: Any, experts: tuple[int, ...], bias: bool, batch: int) -> None:
    """Of products and elementwise work, as lowered, before XLA rewrites anything."""
    config, parameters, x, made = case(kind, experts, bias, batch, None)
    lowered = jax.jit(apply, static_argnums=0).lower(config, parameters, x, made)
    plan = plan_layer(config.spec.network, batch, Routing())
    # a sum of n numbers takes n operations here, and n - 1 there
    sums = batch * sum(step.kind == "reduce" for step in plan.program.steps)
    assert lowered.cost_analysis()["flops"] == plan.cost().flops - sums


@pytest.mark.parametrize("gate", [None, Gate()], ids=["given", "gate"])
@pytest.mark.parametrize("experts", LEVELS, ids=str)
@pytest.mark.parametrize("kind", LARGE, ids=str)
def test_memory(kind: Any, experts: tuple[int, ...], gate: Gate | None) -> None:
    """The compiled program holds no array larger than the plan's largest, and few at a time."""
    batch = 128
    config, parameters, x, made = case(kind, experts, True, batch, gate, size=64)
    compiled = jax.jit(apply, static_argnums=0).lower(config, parameters, x, made).compile()
    cost = plan_layer(config.spec.network, batch, Routing()).cost(gate)
    largest = max(step.bytes_written for step in cost.steps)
    assert max(written(compiled.as_text())) <= largest // 4
    # one copy more than planned: operands of a batched product are laid out anew on the CPU
    assert compiled.memory_analysis().temp_size_in_bytes <= cost.peak_memory + largest


def written(text: str) -> list[int]:
    """Entries of every array that the compiled program writes, those inside fusions left out."""
    entry = text[text.index("\nENTRY") :]
    views = "parameter|bitcast|get-tuple-element|tuple|while"
    found = re.finditer(rf"= \w+\[([\d,]*)\]\S* (?!(?:{views})\()", entry)
    return [prod(int(size) for size in each[1].split(",") if size) for each in found]

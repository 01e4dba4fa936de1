"""Cost of experts that are composed of halves."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from tensormoe._config import LayerConfig
from tensormoe._mixture import OwnArray
from tensormoe.mixtures._keys import Keys
from tensormoe.mixtures._product_cost import after_routing, keys_cost
from tensormoe.planning import Cost, Library, Routing, StepCost, plan_layer
from tensormoe.planning._block_cost import ACTIVATION_FLOPS
from tensormoe.planning._cost import INDEX_BYTES
from tensormoe.planning._gate_cost import GATE_ITEMSIZE


def monet_cost(
    keys: Keys,
    layers: Mapping[str, LayerConfig],
    biases: Mapping[str, OwnArray],
    top_k: int,
    batch: int,
    *,
    itemsize: int,
    library: Library,
    training: bool,
) -> Cost:
    """The cost of routing, of all halves, and of their sums.

    Args:
        keys: rule from tokens to logits.
        layers: all halves of a kind as one layer each, by name.
        biases: of the outputs of halves, (N_e, outputs) by name.
        top_k: halves per level and head.
        batch: number of tokens.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.
    """
    router = keys_cost(keys, top_k, batch, itemsize=itemsize, training=training, pairs=False)
    times, saved = 3 if training else 1, 0
    steps: list[StepCost] = []
    weights = itemsize * batch * keys.heads * sum(keys.experts)
    units = mixed = copied = 0
    for name, layer in layers.items():
        spec = layer.spec
        plan = plan_layer(spec.network, batch, Routing(), title=name)
        call = plan.cost(training=training, itemsize=itemsize, library=library)
        steps += call.steps
        saved += call.saved_memory
        rows = itemsize * batch * spec.in_features
        count = keys.experts[0 if name.startswith("left") else 1]
        if name.endswith("up_proj"):
            made = batch * spec.out_features
            size = itemsize * made
            steps.append(StepCost(f"{name}: act", 0, times * ACTIVATION_FLOPS * made, size, size))
            units += size
        elif name in ("left.down_proj", "right.down_proj"):
            # a side's own hidden units, times the weight of all experts that have its half
            uses = 2 * times * batch * keys.heads * count
            work = times * batch * spec.in_features
            steps.append(StepCost(f"{name}: weigh", uses, work, rows + weights, rows))
            mixed, copied = max(mixed, rows), max(copied, rows)
        else:
            # hidden units of the other level into heads, and out of the heads
            width = spec.in_features // count
            work = 2 * times * batch * keys.heads * width * sum(keys.experts)
            steps.append(StepCost(f"{name}: mix", work, 0, times * (rows + weights), rows))
            copied = max(copied, rows)
    for name, bias in biases.items():
        count = bias.shape[0]
        work = 2 * times * batch * (prod(bias.shape) + keys.heads * count)
        steps.append(StepCost(name, work, 0, times * itemsize * prod(bias.shape), 0))
    own = sum(prod(bias.shape) for bias in biases.values())
    parameters = own + sum(layer.num_parameters for layer in layers.values())
    # mixed hidden units, and once more times the coefficient of the one expert that a layer has
    working = max(2 * units, units + mixed + 2 * copied)
    held = weights + units + mixed + copied if training else 0
    experts = Cost(parameters, tuple(steps), weights + working + held, held + saved)
    record = batch * keys.heads
    record *= 2 * GATE_ITEMSIZE * sum(keys.experts) + keys.levels * top_k * (
        GATE_ITEMSIZE + INDEX_BYTES
    )
    return after_routing(router, record, experts)

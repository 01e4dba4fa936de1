"""Cost of experts that are composed of halves."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from tensormoe._config import LayerConfig
from tensormoe._mixture import OwnArray
from tensormoe.mixtures._keys import Keys
from tensormoe.mixtures._product_cost import keys_cost
from tensormoe.planning import Cost, Library, Routing, StepCost, plan_layer
from tensormoe.planning._block_cost import ACTIVATION_FLOPS


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
    times, steps, held, peak = 3 if training else 1, list(router.steps), router.saved_memory, 0
    weights = itemsize * batch * keys.heads * sum(keys.experts)
    held += weights if training else 0
    for name, layer in layers.items():
        spec = layer.spec
        plan = plan_layer(spec.network, batch, Routing(), title=name)
        call = plan.cost(training=training, itemsize=itemsize, library=library)
        steps += call.steps
        peak = max(peak, held + weights + call.peak_memory)
        held += call.saved_memory
        rows = itemsize * batch * spec.in_features
        if name.endswith("up_proj"):
            made = batch * spec.out_features
            size = itemsize * made
            steps.append(StepCost(f"{name}: act", 0, times * ACTIVATION_FLOPS * made, size, size))
            held += 2 * size if training else 0
        else:
            # hidden units of the other level into heads, and out of the heads
            heads = 2 * times * batch * keys.heads * spec.in_features
            steps.append(StepCost(f"{name}: mix", 2 * heads, 0, times * (rows + weights), rows))
            held += 2 * rows if training else 0
    for name, bias in biases.items():
        work = 2 * times * batch * prod(bias.shape)
        steps.append(StepCost(name, work, 0, times * itemsize * prod(bias.shape), 0))
    own = sum(prod(bias.shape) for bias in biases.values())
    parameters = own + sum(layer.num_parameters for layer in layers.values())
    whole = Cost(
        router.parameters + parameters, tuple(steps), max(router.peak_memory, peak, held), held
    )
    return whole

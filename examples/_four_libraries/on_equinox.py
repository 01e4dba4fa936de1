"""The run on JAX with Equinox."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from _four_libraries.task import DECAY, Result, Task
from tensormoe_jax.equinox import MuMoE

__all__ = ["run"]


class Classifier(eqx.Module):
    """A mixture, GELU and a linear head."""

    body: MuMoE
    head: eqx.nn.Linear

    def __init__(self, task: Task) -> None:
        self.body = MuMoE.load(task.checkpoint)
        empty = eqx.nn.Linear(*task.weight.shape, dtype=task.weight.dtype, key=jax.random.key(0))
        values = (jnp.asarray(task.weight.T), jnp.asarray(task.bias))
        self.head = eqx.tree_at(lambda head: (head.weight, head.bias), empty, values)

    def __call__(self, x: jax.Array) -> jax.Array:
        # Equinox's own layers take one example, ours any batch
        return jax.vmap(self.head)(jax.nn.gelu(self.body(x), approximate=False))


def run(task: Task) -> Result:
    model = Classifier(task)
    adam = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=DECAY)
    state = adam.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(
        model: Classifier, state: Any, x: jax.Array, labels: jax.Array, rate: jax.Array
    ) -> tuple[Classifier, Any, jax.Array]:
        @eqx.filter_value_and_grad
        def loss(model: Classifier) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, gradients = loss(model)
        state = state._replace(hyperparams={**state.hyperparams, "learning_rate": rate})
        updates, state = adam.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    start = perf_counter()
    for batch in task.batches:
        x, labels = jnp.asarray(batch.images), jnp.asarray(batch.labels)
        model, state, value = step(model, state, x, labels, jnp.asarray(batch.rate, x.dtype))
        losses.append(value)
    found = tuple(float(loss) for loss in losses)
    seconds = perf_counter() - start
    return Result(found, task.accuracy(model(jnp.asarray(task.test))), seconds)

"""The run on JAX with Flax NNX."""

from __future__ import annotations

from time import perf_counter

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from _four_libraries.task import DECAY, Result, Task
from tensormoe_jax.nnx import MuMoE

__all__ = ["run"]


class Classifier(nnx.Module):
    """A mixture, GELU and a linear head."""

    def __init__(self, task: Task) -> None:
        self.body = MuMoE.load(task.checkpoint)
        dtype = task.weight.dtype
        self.head = nnx.Linear(*task.weight.shape, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.head.kernel[...] = jnp.asarray(task.weight)
        assert self.head.bias is not None
        self.head.bias[...] = jnp.asarray(task.bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.gelu(self.body(x), approximate=False))


@nnx.jit
def step(
    model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array, rate: jax.Array
) -> jax.Array:
    def loss(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.opt_state.hyperparams["learning_rate"][...] = rate
    optimizer.update(model, gradients)
    return value


def run(task: Task) -> Result:
    model = Classifier(task)
    adam = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=DECAY)
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
    losses = []
    start = perf_counter()
    for batch in task.batches:
        x, labels = jnp.asarray(batch.images), jnp.asarray(batch.labels)
        losses.append(step(model, optimizer, x, labels, jnp.asarray(batch.rate, x.dtype)))
    found = tuple(float(loss) for loss in losses)
    seconds = perf_counter() - start
    return Result(found, task.accuracy(model(jnp.asarray(task.test))), seconds)

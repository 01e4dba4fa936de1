"""Sparse mixtures: loops over tokens and experts, the experts' call, hooks, noise, training."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense, TensorRing
from tensormoe.gates import load_balance_loss
from tensormoe.mixtures import sparse_config
from tensormoe.routing import Router
from tests._task import task
from tests.mixtures._forms import drawn, tokens, torch_layer
from tests.mixtures._loops import by_loops, expert


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Dense(), CP(4), TensorRing((2, 3, 2))], ids=str)
@pytest.mark.parametrize("experts", ["linear", "mlp", "swiglu", "tanh"])
def test_loops_over_tokens_and_experts(experts: str, kind: Any, bias: bool) -> None:
    options: dict[str, Any] = {"kind": experts, "bias": bias, "factorization": kind}
    if experts == "tanh":
        options |= {"kind": "mlp", "act_layer": "tanh", "router": Router(bias=True)}
    hidden = None if experts == "linear" else 7
    options["shared_features"] = 3 if bias and hidden else None
    options["mix_shared"] = bias and experts == "swiglu"
    config = sparse_config(6, hidden, 5, experts=4, top_k=2, **options)
    arrays, x = drawn(config), tokens(config, (9,))
    wanted = by_loops(config, arrays, x)
    for found in (
        tensormoe_numpy.SparseMoE.restore(config, arrays)(x),
        torch_layer(config, arrays)(torch.tensor(x)).detach().numpy(),
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())


CONFIG = sparse_config(6, 7, 5, experts=4, top_k=2, shared_features=3)


def test_the_experts_are_called_as_transformers_calls_them() -> None:
    arrays, x = drawn(CONFIG), tokens(CONFIG, (5,))
    layer = torch_layer(CONFIG, arrays)
    index = torch.tensor([[0, 3], [2, 2], [1, 0], [3, 1], [0, 0]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    found = layer.experts(torch.tensor(x), index, weights)
    for token in range(5):
        wanted = sum(
            float(weights[token, k]) * expert(CONFIG.experts, arrays, "experts", number, x[token])
            for k, number in enumerate(index[token].tolist())
        )
        np.testing.assert_allclose(found[token].detach(), wanted, rtol=1e-10)
    alone = layer.experts[2](torch.tensor(x))
    wanted = [expert(CONFIG.experts, arrays, "experts", 2, token) for token in x]
    np.testing.assert_allclose(alone.detach(), wanted, rtol=1e-10)


def test_hooks_see_records_and_change_them() -> None:
    layer, x = torch_layer(CONFIG, drawn(CONFIG)), torch.tensor(tokens(CONFIG, (2, 3)))
    seen: list[Any] = []
    hooks = [
        layer.router.register_forward_hook(lambda module, given, made: seen.append(made)),
        layer.experts.register_forward_hook(lambda module, given, made: seen.append(given)),
    ]
    before = layer(x)
    record, given = seen
    assert torch.equal(record.top_k_index, given[1])
    assert torch.equal(record.top_k_weights, given[2])
    assert record.logits.shape == (6, 4)
    hooks[1].remove()
    # an experiment: the experts are silenced, and the shared one remains
    hooks.append(layer.experts.register_forward_hook(lambda module, given, made: 0.0 * made))
    silent = layer(x)
    assert not torch.allclose(silent, before)
    torch.testing.assert_close(silent, layer.shared.everywhere(x))
    for hook in hooks:
        hook.remove()
    assert torch.equal(layer(x), before)


def test_losses_of_the_record_train_the_projection() -> None:
    layer, x = torch_layer(CONFIG, drawn(CONFIG)), torch.tensor(tokens(CONFIG, (20,)))
    routes = layer.route(x)
    load_balance_loss(routes.scores, routes.choices, experts=4).backward()
    assert layer.router.projection.grad.abs().min() > 0
    assert all(each.grad is None for each in layer.experts.parameters())
    # without a loss too, by way of the weights
    layer.zero_grad()
    layer(x, layer.route(x)).sum().backward()
    assert layer.router.projection.grad.abs().max() > 0


def test_transformations_see_the_tensors_of_a_record() -> None:
    layer, x = torch_layer(CONFIG, drawn(CONFIG)), torch.tensor(tokens(CONFIG, (2, 3)))
    assert len(torch.utils._pytree.tree_leaves(layer.route(x))) == 4
    tree = tensormoe_jax.equinox.SparseMoE(6, 7, experts=4, top_k=2, key=KEY)

    def counted(x: Any) -> Any:
        record = tree.route(x)
        return record, record.choices.values

    record, ones = jax.eval_shape(counted, jnp.ones((3, 6)))
    assert record.chosen.indices.shape == ones.shape == (3, 2)


NOISY = sparse_config(6, None, 5, experts=8, top_k=2, kind="linear", router=Router(noise=2.0))
KEY = jax.random.key(0)


def test_noise_is_drawn_in_training_alone_from_the_frameworks_generator() -> None:
    arrays, x = drawn(NOISY, "float32"), tokens(NOISY, (20,), "float32")
    quiet = tensormoe_numpy.SparseMoE.restore(NOISY, arrays).route(x).top_k_index
    layer = torch_layer(NOISY, arrays).train()
    records = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        records.append(layer.route(torch.tensor(x)).top_k_index.numpy())
    assert np.array_equal(records[0], records[1])
    assert not np.array_equal(records[0], records[2])
    assert not np.array_equal(records[0], quiet)
    before = torch.get_rng_state()
    assert np.array_equal(layer.eval().route(torch.tensor(x)).top_k_index, quiet)
    assert torch.equal(torch.get_rng_state(), before)
    given = {name: jnp.asarray(each) for name, each in arrays.items()}
    module = tensormoe_jax.nnx.SparseMoE.restore(NOISY, given, rngs=nnx.Rngs(0))
    first, second = (np.asarray(module.route(x_).top_k_index) for x_ in [jnp.asarray(x)] * 2)
    assert not np.array_equal(first, second)
    module.eval()
    assert np.array_equal(module.route(jnp.asarray(x)).top_k_index, quiet)
    tree = tensormoe_jax.equinox.SparseMoE.restore(NOISY, given)
    keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
    first, again, other = (np.asarray(tree.route(jnp.asarray(x), key=k).top_k_index) for k in keys)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(tree.route(jnp.asarray(x), inference=True).top_k_index, quiet)


def test_balance_evens_the_load_without_a_loss() -> None:
    router = Router("sigmoid", balance=0.02)
    layer = tensormoe_torch.SparseMoE(8, None, experts=6, top_k=2, kind="linear", router=router)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator) + 1.0

    def load() -> torch.Tensor:
        index = layer.eval().route(x).top_k_index
        return torch.bincount(index.flatten(), minlength=6) / 600

    torch.manual_seed(0)
    torch.nn.init.normal_(layer.router.projection)
    before, weights = load(), layer.route(x).scores
    for _ in range(60):
        layer.train().route(x)
    after = load()
    assert before.max() > 0.25
    assert after.max() < 0.2
    assert after.min() > 0.13
    # scores, and with them weights, are what they were
    assert torch.equal(layer.route(x).scores, weights)
    layer.eval()
    bias = layer.router.choice_bias.clone()
    layer(x)
    assert torch.equal(layer.router.choice_bias, bias)


def test_training_lowers_the_loss() -> None:
    x, target, linear = task()
    options: dict[str, Any] = {"experts": 4, "top_k": 2, "factorization": "cp", "rank": 12}
    torch.manual_seed(0)
    layer = tensormoe_torch.SparseMoE(8, 16, 3, **options)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    given, wanted = torch.tensor(x), torch.tensor(target)
    losses = []
    for _ in range(100):
        loss = ((layer(given) - wanted) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < linear / 2


def test_training_in_jax_lowers_the_loss() -> None:
    x, target, linear = (jnp.asarray(each) for each in task())
    options: dict[str, Any] = {"experts": 4, "top_k": 2, "kind": "mlp", "router": "sigmoid"}
    module = tensormoe_jax.nnx.SparseMoE(8, 16, 3, **options, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> Any:
        def loss(module: Any) -> Any:
            return ((module(x) - target) ** 2).mean()

        found, slopes = nnx.value_and_grad(loss)(module)
        optimizer.update(module, slopes)
        return found

    assert [float(step(module, optimizer)) for _ in range(100)][-1] < linear / 2
    options["router"] = Router("sigmoid", balance=0.001, noise=0.01)
    tree, state = eqx.nn.make_with_state(tensormoe_jax.equinox.SparseMoE)(
        8, 16, 3, **options, key=KEY
    )
    adam = optax.adam(0.02)
    kept = adam.init(eqx.filter(tree, eqx.is_inexact_array))
    start = tree.buffers(state)

    @eqx.filter_jit
    def turn(tree: Any, state: Any, kept: Any, key: Any) -> Any:
        def loss(tree: Any) -> Any:
            output, after = tree(x, state=state, key=key)
            return ((output - target) ** 2).mean(), after

        (found, after), slopes = eqx.filter_value_and_grad(loss, has_aux=True)(tree)
        updates, kept = adam.update(slopes, kept)
        return eqx.apply_updates(tree, updates), after, kept, found

    for key in jax.random.split(KEY, 100):
        tree, state, kept, found = turn(tree, state, kept, key)
    assert float(found) < linear / 2
    assert not np.array_equal(
        *(each["router.choice_bias"] for each in (start, tree.buffers(state)))
    )

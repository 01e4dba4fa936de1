"""Probes of what frameworks do in their own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import tensormoe_cupy
import tensormoe_jax
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Gate, LayerSpec, convert, editing
from tensormoe.functional import LayerConfig
from tests._cupy_standin import device, host
from tests._everywhere import FORMS, PACKAGES
from tests._frameworks import NUMPY, Config, Framework
from tests._one_layer import assert_found, assert_near
from tests.support._features import BLOCK, LAYER
from tests.support._layers import STEP, prepared


def check_second(framework: Framework) -> None:
    """The second derivative by the input, along a direction, is the slope of the gradient."""
    arrays, call = prepared(LAYER, "gate", (3,))
    direction = np.random.default_rng(1).standard_normal(call.x.shape)
    with framework.precision("float64"):
        layer = framework.restore(LAYER, arrays)
        moved = [
            framework.run(layer, replace(call, x=call.x + sign * direction)).gradients["input"]
            for sign in (STEP, -STEP)
        ]
        want = (moved[0] - moved[1]) / (2 * STEP)
        if framework.name == "PyTorch":
            x = convert(call.x, "torch", copy=True).requires_grad_()
            summed = (layer(x) * convert(call.cotangent, "torch")).sum()
            (first,) = torch.autograd.grad(summed, x, create_graph=True)
            (second,) = torch.autograd.grad((first * convert(direction, "torch")).sum(), x)
            got = convert(second, "numpy")
        else:
            form = FORMS[framework.name]

            def total(x: Any) -> Any:
                return jnp.sum(form(LAYER, layer.arrays, x, None)[0] * call.cotangent)

            along = jax.jit(lambda x, d: jax.jvp(jax.grad(total), (x,), (d,))[1])
            got = np.asarray(along(call.x, direction))
    assert_near(got, want, 1e-6, "second derivative")


def as_function(framework: Framework, config: Config, arrays: Any) -> Callable[[Any], Any]:
    """The layer outside training, as a function of its framework's arrays."""
    layer = framework.restore(config, arrays)
    if framework.name == "PyTorch":
        return layer.eval()  # type: ignore[no-any-return]
    form = FORMS[framework.name]
    return lambda x: form(config, layer.arrays, x, None)[0]


def _same_as(framework: Framework, run: Callable[[Any], Any], arrays: Any, x: np.ndarray) -> None:
    want = NUMPY.restore(LAYER, arrays)(x)
    library = "torch" if framework.name == "PyTorch" else "jax"
    got = run(convert(x, library, copy=True))
    if library == "torch":
        got = convert(got.detach(), "numpy")
    assert_near(np.asarray(got), want, 1e-5, str(framework))


def check_compile(framework: Framework) -> None:
    """As one graph, at more than one batch size."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    run = as_function(framework, LAYER, arrays)
    if framework.name == "PyTorch":
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    else:
        wrappers = {"JAX": jax.jit, "Flax NNX": nnx.jit, "Equinox": eqx.filter_jit}
        compiled = wrappers[framework.name](run)
    for x in (call.x, np.concatenate([call.x] * 3)):
        _same_as(framework, compiled, arrays, x)


def check_export(framework: Framework) -> None:
    """A file's content that runs without tensormoe, at any batch size."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    run: Any = as_function(framework, LAYER, arrays)
    if framework.name == "PyTorch":
        sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        exported = torch.export.export(run, (torch.randn(3, 4),), dynamic_shapes=sizes).module()
    else:
        (batch,) = jax.export.symbolic_shape("batch")
        written = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, 4), jnp.float32))
        exported = jax.export.deserialize(written.serialize()).call
    for x in (call.x, np.concatenate([call.x] * 3)):
        _same_as(framework, exported, arrays, x)


def check_vmap(framework: Framework) -> None:
    """One input at a time, in a batch."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    run = as_function(framework, LAYER, arrays)
    if framework.name == "PyTorch":
        _same_as(framework, torch.func.vmap(run), arrays, call.x)
        return
    _same_as(framework, jax.jit(jax.vmap(run)), arrays, call.x)


def check_dropout(framework: Framework) -> None:
    """Half of the entries are dropped in training, and none outside."""
    config = replace(BLOCK, drop=0.5)
    arrays, _ = prepared(config, "gate", (3,), "float32")
    x = np.random.default_rng(0).standard_normal((200, 4)).astype("float32")
    for output, wanted in zip(_with_dropout(framework, config, arrays, x), (0.0, 0.5), strict=True):
        assert abs(float(np.mean(output == 0.0)) - wanted) < 0.1


def _with_dropout(
    framework: Framework, config: Any, arrays: Any, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    layer = framework.restore(config, arrays)
    if framework.name == "NumPy":
        return layer(x), layer.vjp(x)[0]
    if framework.name == "CuPy":
        return host(layer(device(x))), host(layer.vjp(device(x))[0])
    if framework.name == "PyTorch":
        there = convert(x, "torch")
        return layer.eval()(there).detach().numpy(), layer.train()(there).detach().numpy()
    there, key = jnp.asarray(x), jax.random.key(0)
    if framework.name == "JAX":
        plain = tensormoe_jax.apply(config, layer.arrays, there)
        return plain, tensormoe_jax.train(config, layer.arrays, there, key=key)[0]
    if framework.name == "Flax NNX":
        block = PACKAGES["Flax NNX"].MuMoEMLP.restore(config, layer.arrays, rngs=nnx.Rngs(0))
        block.eval()
        plain = block(there)
        block.train()
        return plain, block(there)
    block = PACKAGES["Equinox"].MuMoEMLP.restore(config, layer.arrays)
    return eqx.nn.inference_mode(block)(there), block(there, key=key)


def check_training(framework: Framework) -> None:
    """Fifty steps of the framework's own Adam bring the error of a regression below a fifth."""
    arrays, _ = prepared(LAYER, "gate", (3,), "float32")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype("float32")
    y = (x @ rng.standard_normal((4, 3))).astype("float32")
    losses = _trained(framework, arrays, x, y)
    assert losses[-1] < 0.2 * losses[0], (losses[0], losses[-1])


def _trained(framework: Framework, arrays: Any, x: np.ndarray, y: np.ndarray) -> list[float]:
    layer, rate, steps, losses = framework.restore(LAYER, arrays), 0.05, 50, []
    if framework.name in ("NumPy", "CuPy"):
        ours = framework.name == "NumPy"
        package = tensormoe_numpy if ours else tensormoe_cupy
        inputs, wanted = (x, y) if ours else (device(x), device(y))
        adam = package.Adam(layer.parameters, lr=rate)
        for _ in range(steps):
            output, pull = layer.vjp(inputs)
            losses.append(float(((output - wanted) ** 2).mean()))
            adam.step(pull(2 * (output - wanted) / wanted.size).parameters)
        return losses
    if framework.name == "PyTorch":
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        for _ in range(steps):
            loss = torch.nn.functional.mse_loss(layer(torch.tensor(x)), torch.tensor(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses
    form, chain = FORMS[framework.name], optax.adam(rate)
    inputs, wanted = jnp.asarray(x), jnp.asarray(y)

    @jax.jit
    def step(held: Any, state: Any) -> Any:
        def error(held: Any) -> Any:
            return jnp.mean((form(LAYER, held, inputs, None)[1] - wanted) ** 2)

        loss, slopes = jax.value_and_grad(error)(held)
        moves, state = chain.update(slopes, state)
        return optax.apply_updates(held, moves), state, loss

    held = dict(layer.arrays)
    state = chain.init(held)
    for _ in range(steps):
        held, state, loss = step(held, state)
        losses.append(float(loss))
    return losses


def check_memory_limit(framework: Framework) -> None:
    """A batch in chunks, none of which takes more than the limit."""
    arrays, _ = prepared(LAYER, "gate", (3,))
    x = np.random.default_rng(0).standard_normal((200, 4))
    layer, put = framework.restore(LAYER, arrays), _put(framework)
    got = layer(put(x), memory_limit=layer.cost(200).peak_memory // 2)
    assert_near(_get(framework)(got), NUMPY.restore(LAYER, arrays)(x), 1e-12, "output")


def check_prepare(framework: Framework) -> None:
    """Work on weights alone is done once."""
    arrays, call = prepared(LAYER, "gate", (3,))
    got = framework.restore(LAYER, arrays).prepare()(_put(framework)(call.x))
    want = NUMPY.restore(LAYER, arrays)(call.x)
    assert_near(_get(framework)(got), want, 1e-12, "output")


def _put(framework: Framework) -> Callable[[Any], Any]:
    return device if framework.name == "CuPy" else lambda array: array


def _get(framework: Framework) -> Callable[[Any], Any]:
    return host if framework.name == "CuPy" else lambda array: array


def check_autocast(framework: Framework) -> None:
    """Parameters stay float32 while products run in bfloat16."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    layer = framework.restore(LAYER, arrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.tensor(call.x))
    assert output.dtype == torch.bfloat16
    assert_near(output.float().detach().numpy(), NUMPY.restore(LAYER, arrays)(call.x), 5e-2, "out")


def check_surgery(framework: Framework) -> None:
    """A linear layer of a model becomes experts that start from its weights, outputs unchanged."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    x = torch.randn(4, 6)
    want = model(x)
    surgery = tensormoe_torch.replace(model, "0", experts=3, factorization=CP(30))
    assert surgery.names == ("0",)
    assert isinstance(model[0], tensormoe_torch.MuMoE)
    # what a rank below that of the weights loses is in the report; this one loses nothing
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def check_editing(framework: Framework) -> None:
    """An expert that is silenced says nothing, and comes back."""
    arrays, _ = prepared(LAYER, "gate", (3,), "float32")
    layer = framework.restore(LAYER, arrays)
    with tensormoe_torch.restored(layer):
        tensormoe_torch.silence_experts(layer, 1)
        assert not torch.any(layer.expert(1, 0)[0])
        assert torch.any(layer.expert(0, 0)[0])
    for name, each in layer.state_dict().items():
        np.testing.assert_array_equal(each, arrays[name])


def check_editing_of_arrays(framework: Framework) -> None:
    """An expert is silenced, and all are permuted, as functions of the framework's own arrays."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    wanted = dict(arrays)
    wanted["factors.expert_0"] = arrays["factors.expert_0"].copy()
    wanted["factors.expert_0"][1] = 0.0
    library = {"NumPy": "numpy", "PyTorch": "torch"}.get(framework.name, "jax")
    cupy = framework.name == "CuPy"
    own = device(arrays) if cupy else convert(dict(arrays), library, copy=True)
    silent = editing.silence_experts(LAYER, own, 1)
    turned = editing.permute_experts(LAYER, silent, [2, 0, 1])
    for found in (silent, turned):
        back = host(found) if cupy else convert(dict(found), "numpy")
        layer = framework.restore(LAYER, back)
        want = NUMPY.run(NUMPY.restore(LAYER, wanted), call).output
        assert_near(framework.run(layer, call).output, want, 1e-5, "output")


def check_official(framework: Framework) -> None:
    """A layer goes through the names and layouts of the paper's released code, and back."""
    config = LayerConfig(LayerSpec(4, 3, 3, CP(2)), Gate.paper())
    arrays, call = prepared(config, "gate", (3,), "float32")
    layer = framework.restore(config, arrays)
    again = tensormoe_torch.from_official(tensormoe_torch.to_official(layer))
    assert_found(framework.run(again, call), framework.run(layer, call), 0.0, "again")

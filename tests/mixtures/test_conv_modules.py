"""Factorized convolutions in use: compiled, exported, saved, copied, narrow, trained."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import tensormoe
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import Gate
from tensormoe.checkpoint import read_block
from tensormoe.errors import (
    CheckpointError,
    SpecError,
    TensormoeError,
)
from tensormoe.mixtures import ConvConfig, conv_config
from tests.mixtures._convolutions import SMALL, drawn, images, last, layer_of

RING = SMALL["ring of two levels"]
CP = conv_config(4, 6, 3, experts=4, rank=5, padding=1)
# each image has a kernel of its own where nobody traces
WIDE = conv_config(4, 6, 3, experts=4, rank=40, padding=1)


@pytest.mark.parametrize("config", [WIDE, replace(CP, experts_per="position")])
def test_compiled_for_any_size(config: ConvConfig) -> None:
    torch._dynamo.reset()
    layer = layer_of(config, drawn(config))
    fast = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=3):
        for count, side in [(2, 9), (3, 9), (4, 12), (6, 20), (8, 5)]:
            x = torch.tensor(images(config, (side, side + 1), count))
            torch.testing.assert_close(fast(x), layer(x))
    for each in (fast, layer):
        each(x).square().sum().backward()
    for (name, one), other in zip(layer.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_exported_for_any_size() -> None:
    layer = layer_of(WIDE, drawn(WIDE, "float32")).eval()
    sizes = [torch.export.Dim(name, min=3, max=99) for name in ("n", "h", "w")]
    shapes = {"x": {0: sizes[0], 2: sizes[1], 3: sizes[2]}}
    example = torch.tensor(images(WIDE, (9, 8), 4, "float32"))
    program = torch.export.export(layer, (example,), dynamic_shapes=shapes)
    # compilers generate no code for groups whose number is open
    for node in program.graph.nodes:
        groups = [each for each in node.args if isinstance(each, torch.fx.Node)]
        assert "conv" not in str(node.target) or len(groups) <= 3
    exported = program.module()
    for count, size in ((3, (20, 7)), (5, (3, 4))):
        x = torch.tensor(images(WIDE, size, count, "float32"))
        torch.testing.assert_close(exported(x), layer(x))
    held = jax.tree.map(jnp.asarray, drawn(WIDE, "float32"))
    module = tensormoe_jax.equinox.ConvMoE.restore(WIDE, held)
    scope = jax.export.symbolic_shape("n,4,h,w", constraints=["h>=3", "w>=3"])
    given = jax.ShapeDtypeStruct(scope, jnp.float32)
    run = jax.export.export(jax.jit(lambda x: module(x)))(given)
    np.testing.assert_allclose(run.call(x.numpy()), layer(x).detach().numpy(), atol=1e-4)


def test_batch_shapes() -> None:
    arrays = drawn(CP, "float32")
    layer = layer_of(CP, arrays)
    ours = tensormoe_numpy.ConvMoE.restore(CP, arrays)
    held = jax.tree.map(jnp.asarray, arrays)
    forms = {
        "Equinox": tensormoe_jax.equinox.ConvMoE.restore(CP, held),
        "Flax": tensormoe_jax.nnx.ConvMoE.restore(CP, held),
    }
    whole = torch.tensor(images(CP, (5, 6), 6, "float32"))
    wanted = layer(whole)
    for shape in ((), (6,), (2, 3), (0,), (2, 0), (1, 2, 3)):
        count = int(np.prod(shape))
        x = whole[:count].reshape(*shape, 4, 5, 6) if count != 1 else whole[0]
        found = layer(x)
        assert found.shape == (*shape, 6, 5, 6)
        torch.testing.assert_close(found.reshape(-1, 6, 5, 6), wanted[: found.numel() // 180])
        assert layer.coefficients(x)[0].shape == (*shape, 4)
        turned = np.moveaxis(x.numpy(), -3, -1)
        np.testing.assert_allclose(
            np.moveaxis(ours(turned), -1, -3), found.detach().numpy(), atol=1e-5
        )
        for name, module in forms.items():
            given = x.numpy() if name == "Equinox" else turned
            traced = jax.eval_shape(lambda x, run=module: run(x), given)
            assert traced.shape == (found.shape if name == "Equinox" else ours(turned).shape)


def test_memory_formats() -> None:
    layer, x = layer_of(CP, drawn(CP, "float32")), torch.tensor(images(CP, (9, 8), 3, "float32"))
    plain = layer(x)
    assert plain.is_contiguous()
    plain.view(3, -1)
    turned = layer(x.contiguous(memory_format=torch.channels_last))
    assert turned.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(turned, plain)


@pytest.mark.parametrize("config", [CP, RING, replace(CP, experts_per="position")])
def test_files_and_copies(config: ConvConfig, tmp_path: Path) -> None:
    arrays = drawn(config, "float32")
    x = images(config, (7, 6), dtype="float32")
    layer = layer_of(config, arrays)
    layer.save(tmp_path / "torch")
    assert {*layer.state_dict()} == {*arrays}
    wanted = layer(torch.tensor(x)).detach().numpy()
    ours = tensormoe_numpy.ConvMoE.load(tmp_path / "torch")
    ours.save(tmp_path / "numpy")
    for package, run in (
        (tensormoe_numpy, lambda one: last_first(one(last(x)))),
        (tensormoe_jax.nnx, lambda one: last_first(np.asarray(one(jnp.asarray(last(x)))))),
        (tensormoe_jax.equinox, lambda one: np.asarray(one(jnp.asarray(x)))),
        (tensormoe_torch, lambda one: one(torch.tensor(x)).detach().numpy()),
    ):
        one = package.ConvMoE.load(tmp_path / "numpy")
        assert one.config == config
        np.testing.assert_allclose(run(one), wanted, atol=1e-5 * np.abs(wanted).max())
        for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert copied.config == config
            assert np.array_equal(run(copied), run(one))
        if package in (tensormoe_numpy, tensormoe_torch):
            known = {name: getattr(tensormoe, name) for name in tensormoe.__all__}
            again = eval(repr(one), {**known, "torch": torch, "ConvMoE": package.ConvMoE})
            assert again.config == config
        assert config.arguments() in repr(one)
        one.save(tmp_path / "again")
        again, _ = read_block(tmp_path / "again", "ConvMoE", ConvConfig, tensormoe_numpy.BACKEND)
        assert again == config
    with pytest.raises(CheckpointError, match="must hold a MuMoE; got a ConvMoE"):
        tensormoe_torch.MuMoE.load(tmp_path / "torch")


def last_first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 1)


def test_descriptions() -> None:
    for config in SMALL.values():
        values = config.to_dict()
        assert ConvConfig.from_dict(values) == config
        for name, damage in product(values, ({"junk": 1}, "junk", None)):
            if (name, damage) != ("gate", None):
                with pytest.raises(TensormoeError, match=r"\.$"):
                    ConvConfig.from_dict({**values, name: damage})
        for name in values["window"]:
            for damage in ({"junk": 1}, "junk", None, [0, -1], [[1, 2, 3]] * 2):
                damaged = {**values["window"], name: damage}
                with pytest.raises(SpecError, match=r"\.$"):
                    ConvConfig.from_dict({**values, "window": damaged})


def test_narrow_and_mixed() -> None:
    arrays, x = drawn(CP, "float32"), torch.tensor(images(CP, (7, 6), 3, "float32"))
    wide = layer_of(CP, arrays)
    narrow = {name: torch.tensor(each).bfloat16() for name, each in arrays.items()}
    narrow["gate.projection_0"] = torch.tensor(arrays["gate.projection_0"])
    for config in (CP, replace(CP, experts_per="position")):
        wanted = layer_of(config, arrays)(x)
        layer = tensormoe_torch.ConvMoE.restore(config, narrow)
        found = layer(x.bfloat16())
        assert found.dtype == layer.dtype == torch.bfloat16
        assert layer.coefficients(x.bfloat16())[0].dtype == torch.float32
        assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
        found.sum().backward()
        assert layer.gate.get_parameter("projection_0").grad.dtype == torch.float32
        held = {name: jnp.asarray(each.float().numpy()) for name, each in narrow.items()}
        held = {
            name: each if name.startswith("gate.") else each.astype("bfloat16")
            for name, each in held.items()
        }
        module = tensormoe_jax.equinox.ConvMoE.restore(config, held)
        theirs = jax.jit(lambda x, run=module: run(x))(jnp.asarray(x.numpy()).astype("bfloat16"))
        assert theirs.dtype == jnp.bfloat16
        assert "gate_dtype='float32'" in repr(module)
        gap = np.abs(np.asarray(theirs, "float32") - wanted.detach().numpy()).max()
        assert gap < 0.05 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x).dtype == torch.bfloat16
    half = tensormoe_numpy.ConvMoE.restore(
        CP, {name: each.astype("float16") for name, each in arrays.items()}
    )
    # a sum of pixels that float16 does not hold
    bright = np.full((1, 300, 300, 4), 60.0, "float16")
    assert np.isfinite(half.coefficients(bright)[0]).all()
    assert np.allclose(half.route(bright)[1][0], 60 * arrays["gate.projection_0"].sum(0), rtol=1e-2)


def test_states_and_noise() -> None:
    gate = Gate("top_k", k=2, normalization="batch", noise=0.5, balance=0.1)
    options: Any = {"experts": 4, "rank": 3, "padding": 1, "gate": gate}
    x = images(CP, (5, 5), 8, "float32")
    flax = tensormoe_jax.nnx.ConvMoE(4, 6, 3, **options, rngs=0)
    before = dict(flax.buffers)
    given = jnp.asarray(last(x))
    run = nnx.jit(lambda m, x: m(x))
    first = run(flax, given)
    assert any(np.any(before[name] != each) for name, each in flax.buffers.items())
    assert not np.array_equal(first, run(flax, given))
    flax.eval()
    kept = dict(flax.buffers)
    quiet = run(flax, given)
    assert np.array_equal(quiet, run(flax, given))
    assert all(np.array_equal(kept[name], each) for name, each in flax.buffers.items())
    module, state = eqx.nn.make_with_state(tensormoe_jax.equinox.ConvMoE)(
        4, 6, 3, **options, key=jax.random.key(0)
    )
    old = module.buffers(state)
    with pytest.raises(SpecError, match="needs a key"):
        module(jnp.asarray(x), state=state)
    y, state = module(jnp.asarray(x), state=state, key=jax.random.key(1))
    assert y.shape == (8, 6, 5, 5)
    assert any(np.any(old[name] != each) for name, each in module.buffers(state).items())
    with pytest.raises(tensormoe.errors.GateError, match="State"):
        module(jnp.asarray(x))
    layer = tensormoe_torch.ConvMoE(4, 6, 3, **options)
    given = torch.tensor(x)
    assert not torch.equal(layer(given), layer(given))
    assert layer.gate.get_buffer("running_mean_0").abs().max() > 0
    layer.eval()
    assert torch.equal(layer(given), layer(given))


def test_cupy_standin() -> None:
    pytest.importorskip("cupy")
    from tests._cupy_standin import assert_same, device, installed

    arrays, x = drawn(CP), last(images(CP, (5, 6)))
    wanted = tensormoe_numpy.ConvMoE.restore(CP, arrays)(x)
    with installed():
        import tensormoe_cupy

        assert_same(tensormoe_cupy.ConvMoE.restore(CP, device(arrays))(device(x)), wanted)


def test_initial_values_are_those_of_a_convolution() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(24, 48, 3, padding=1)
    weight = theirs.weight.detach()
    for factorization, rank in (("cp", 96), ("tensor_ring", (4, 6, 12)), ("dense", None)):
        layer = tensormoe_torch.ConvMoE(
            24, 48, 3, experts=8, padding=1, factorization=factorization, rank=rank
        )
        kernel = layer.expert(3)[0].detach()
        assert 0.7 < float(kernel.std() / weight.std()) < 1.3, factorization


def test_training_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 6, 6)
    label = x[:, 0].mean((1, 2)) > 0
    # a sign that depends on the mean of a channel: no one convolution followed by a mean has it
    wanted = torch.where(label, 1.0, -1.0) * x[:, 1].mean((1, 2))
    layer = tensormoe_torch.ConvMoE(3, 1, 3, experts=4, rank=6, padding=1, gate="softmax")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    first = None
    for _ in range(60):
        loss = (layer(x).mean((1, 2, 3)) - wanted).square().mean()
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first

"""Contract of mixtures: one suite that every configuration passes in every framework.

A mixture's tests derive a class from :class:`MixtureContract`, and list its configurations::

    class TestSparseMoE(MixtureContract):
        configs = {"linear": sparse_config(6, None, 5, experts=4, top_k=2, kind="linear"), ...}
        other = sparse_config(6, None, 5, experts=3, top_k=1, kind="linear")
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
import torch

import tensormoe
import tensormoe_numpy
import tensormoe_torch
from tensormoe import convert
from tensormoe.checkpoint import read_block
from tensormoe.errors import CheckpointError, ShapeError, TensormoeError
from tensormoe.mixtures import MixtureConfig
from tensormoe.routing import Router
from tests.mixtures._forms import (
    FORMS,
    PACKAGES,
    by_jax,
    differentiated_by_jax,
    differentiated_by_torch,
    drawn,
    jax_module,
    noisy,
    of,
    state_of,
    tokens,
    torch_layer,
)


class MixtureContract:
    """Contract of every mixture.

    Attributes:
        configs: small configurations by name; each is compiled by JAX twice.
        other: a layer of the same ``in_features`` whose routing records are refused by all of them.
        compiled: names of those that PyTorch compiles; the first one by default.
    """

    configs: ClassVar[Mapping[str, MixtureConfig]]
    other: ClassVar[MixtureConfig]
    compiled: ClassVar[tuple[str, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "config" in metafunc.fixturenames:
            names = [*self.configs]
            if metafunc.function.__name__ == "test_compiled":
                names = [*(self.compiled or names[:1])]
            metafunc.parametrize("config", [self.configs[name] for name in names], ids=names)

    def test_one_function_in_float64(self, config: MixtureConfig) -> None:
        arrays, x = drawn(config), tokens(config)
        wanted = of(tensormoe_numpy, config).restore(config, arrays)(x)
        cotangent = np.random.default_rng(2).standard_normal(wanted.shape)
        theirs = differentiated_by_torch(config, arrays, x, cotangent)
        _same(theirs.output, wanted, 1e-10, "PyTorch's output")
        for name, found in differentiated_by_jax(config, arrays, x, cotangent).items():
            _same(found.output, wanted, 1e-10, f"{name}'s output")
            _same(found.trained, theirs.trained, 1e-10, f"{name}'s output in training")
            assert found.gradients.keys() == theirs.gradients.keys()
            assert found.buffers.keys() == theirs.buffers.keys()
            for key, gradient in theirs.gradients.items():
                assert np.any(gradient), f"nothing depends on {key}"
                _same(found.gradients[key], gradient, 1e-9, f"{name}'s gradient of {key}")
            for key, buffer in theirs.buffers.items():
                _same(found.buffers[key], buffer, 1e-6, f"{name}'s {key} after training")

    def test_one_function_in_float32(self, config: MixtureConfig) -> None:
        arrays, x = drawn(config, "float32"), tokens(config, dtype="float32")
        wanted = of(tensormoe_numpy, config).restore(config, arrays)(x)
        assert wanted.dtype == x.dtype
        with torch.no_grad():
            theirs = torch_layer(config, arrays).eval()(torch.tensor(x))
        _same(theirs.numpy(), wanted, 1e-5, "PyTorch's output")
        for name, found in by_jax(config, arrays, x).items():
            assert found.dtype == wanted.dtype
            _same(found, wanted, 1e-5, f"{name}'s output")

    def test_cupy(self, config: MixtureConfig) -> None:
        pytest.importorskip("cupy")
        from tests._cupy_standin import assert_same, device, installed

        arrays, x = drawn(config), tokens(config)
        wanted = of(tensormoe_numpy, config).restore(config, arrays)(x)
        with installed():
            import tensormoe_cupy

            layer = of(tensormoe_cupy, config).restore(config, device(arrays))
            assert_same(layer(device(x)), wanted)

    def test_batch_shapes(self, config: MixtureConfig) -> None:
        arrays, x = drawn(config), tokens(config, (2, 5))
        ours = of(tensormoe_numpy, config).restore(config, arrays)
        theirs = torch_layer(config, arrays).eval()
        with jax.enable_x64(True):
            forms = {name: jax_module(name, config, arrays) for name in FORMS}
        whole = ours(x)
        assert whole.shape == config.output_shape((2, 5))
        capped = _capped(config)
        for part, wanted in _parts_of(x, whole, config.mixes_tokens):
            found = ours(part)
            assert found.shape == wanted.shape
            if not capped:
                _same(found, wanted, 1e-10, f"the output for {part.shape}")
            with torch.no_grad():
                _same(theirs(torch.tensor(part)).numpy(), found, 1e-10, f"{part.shape} in PyTorch")
            with jax.enable_x64(True):
                for name, module in forms.items():
                    traced = jax.eval_shape(lambda x, run=FORMS[name], of=module: run(of, x), part)
                    assert (traced.shape, traced.dtype) == (found.shape, found.dtype), name
        empty = torch.zeros(_empty(config), dtype=torch.float64, requires_grad=True)
        theirs.train()(empty).sum().backward()
        assert empty.grad is not None
        assert all(each.grad is None or not each.grad.any() for each in theirs.parameters())

    def test_files(self, config: MixtureConfig, tmp_path: Path) -> None:
        arrays = drawn(config, "float32")
        first = tmp_path / "first"
        of(tensormoe_numpy, config).restore(config, arrays).save(first)
        theirs = of(tensormoe_torch, config).load(first)
        assert {*theirs.state_dict()} == {*arrays}
        files = {"PyTorch": tmp_path / "torch"}
        theirs.save(files["PyTorch"])
        for name, package in PACKAGES.items():
            layer, state = state_of(of(package, config).load)(first)
            files[name] = tmp_path / name
            layer.save(files[name], *([state] if config.buffer_shapes() and state else []))
        for name, file in files.items():
            again = of(tensormoe_numpy, config).load(file)
            assert again.config == config
            assert again.arrays.keys() == arrays.keys(), name
            for key, array in arrays.items():
                assert np.array_equal(again.arrays[key], array), f"{key} by {name}"
        with pytest.raises(CheckpointError, match=f"must hold a MuMoE; got a {config.block}"):
            tensormoe_torch.MuMoE.load(first)

    def test_compiled(self, config: MixtureConfig) -> None:
        x = torch.tensor(tokens(config))
        eager = torch_layer(config, drawn(config))
        eager.train(not noisy(config))
        # every configuration is one more version of the same code, of which there may be eight
        torch._dynamo.reset()
        fast = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
        for layer in (eager, fast):
            layer(x).square().sum().backward()
        torch.testing.assert_close(fast(x), eager(x))
        for (name, one), other in zip(eager.named_parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, msg=name)

    def test_narrow_factors_and_a_wide_router(self, config: MixtureConfig, tmp_path: Path) -> None:
        arrays, x = drawn(config, "float32"), tokens(config, dtype="float32")
        routing = [name for name in config.parameter_shapes() if name.startswith("router.")]
        half = [name for name in config.parameter_shapes() if name not in routing]
        narrow = {name: torch.tensor(each) for name, each in arrays.items()}
        narrow |= {name: narrow[name].bfloat16() for name in half}
        layer = of(tensormoe_torch, config).restore(config, narrow).eval()
        output = layer(torch.tensor(x).bfloat16())
        assert output.dtype == layer.dtype == torch.bfloat16
        assert output.shape == config.output_shape(x.shape[:-1])
        assert torch.isfinite(output).all()
        layer.save(tmp_path / "narrow")
        again = of(tensormoe_torch, config).load(tmp_path / "narrow").eval()
        for name, array in again.state_dict().items():
            assert array.dtype == narrow[name].dtype, name
            assert torch.equal(array, narrow[name]), name
        assert torch.equal(again(torch.tensor(x).bfloat16()), output)
        for name, package in PACKAGES.items():
            module, state = state_of(of(package, config).load)(tmp_path / "narrow")
            kept = {key: str(each.dtype) for key, each in module.parameters.items()}
            assert {kept[key] for key in half} == {"bfloat16"}, name
            assert {kept[key] for key in routing} <= {"float32"}, name
            given = jax.ShapeDtypeStruct(x.shape, "bfloat16")
            buffers = module.buffers(state) if callable(module.buffers) else module.buffers
            quiet = jax_module(name, config, {**module.parameters, **buffers})
            found = jax.eval_shape(lambda x, run=FORMS[name], of=quiet: run(of, x), given)
            assert found.dtype == "bfloat16", name

    def test_values(self, config: MixtureConfig) -> None:
        x, arrays = tokens(config), drawn(config)
        known = {name: getattr(tensormoe, name) for name in tensormoe.__all__} | {"Router": Router}
        for package, options in ((tensormoe_numpy, {}), (tensormoe_torch, {"torch": torch})):
            layer = of(package, config).restore(config, convert(arrays, _library(package)))
            again = eval(repr(layer), {**known, **options, config.block: of(package, config)})
            assert again.config == config
            assert again.dtype == layer.dtype
            given = x if package is tensormoe_numpy else torch.tensor(x)
            if package is tensormoe_torch:
                layer.eval()
            for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert np.array_equal(_plain(copied(given)), _plain(layer(given)))
        with jax.enable_x64(True):
            for name in FORMS:
                module = jax_module(name, config, arrays)
                for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                    assert copied.config == config
                    for key, array in copied.parameters.items():
                        assert np.array_equal(np.asarray(array), arrays[key])
                assert config.arguments() in repr(module)

    def test_cost(self, config: MixtureConfig) -> None:
        layer = of(tensormoe_numpy, config).restore(config, drawn(config))
        sizes = sum(array.size for array in layer.parameters.values())
        assert config.num_parameters == layer.num_parameters == sizes
        for batch in (0, 1, 6):
            for training in (False, True):
                cost = layer.cost(batch, training=training)
                assert cost.parameters == sizes
                assert cost.peak_memory >= 0
        assert 0 < layer.cost(6).flops < layer.cost(6, training=True).flops

    def test_description(self, config: MixtureConfig, tmp_path: Path) -> None:
        kind, values = type(config), config.to_dict()
        assert kind.from_dict(values) == config
        assert kind.from_dict(values).parameter_shapes() == config.parameter_shapes()
        for path, damaged in _damaged(values):
            with pytest.raises(TensormoeError) as caught:
                kind.from_dict(damaged)
            assert str(caught.value).endswith("."), path
        file = tmp_path / "file"
        of(tensormoe_numpy, config).restore(config, drawn(config, "float32")).save(file)
        read, _ = read_block(file, config.block, kind, tensormoe_numpy.BACKEND)
        assert read == config

    def test_routing_records(self, config: MixtureConfig) -> None:
        arrays, x = drawn(config), tokens(config, (2, 3))
        ours = of(tensormoe_numpy, config).restore(config, arrays)
        theirs = torch_layer(config, arrays).eval()
        assert np.array_equal(ours(x, ours.route(x)), ours(x))
        with torch.no_grad():
            wide = torch.tensor(x)
            assert torch.equal(theirs(wide, theirs.route(wide)), theirs(wide))
        turned = np.swapaxes(x, 0, 1)
        stranger = of(tensormoe_numpy, self.other).restore(self.other, drawn(self.other))
        for routes in (ours.route(turned), stranger.route(x), object()):
            with pytest.raises(ShapeError, match=r"routes must be .* got .*\. Pass what route"):
                ours(x, routes)
        stranger = torch_layer(self.other, drawn(self.other)).eval()
        for routes in (theirs.route(torch.tensor(turned)), stranger.route(wide), object()):
            with pytest.raises(ShapeError, match=r"routes must be"):
                theirs(wide, routes)
        with jax.enable_x64(True):
            for name in FORMS:
                module, other = (
                    jax_module(name, *each)
                    for each in ((config, arrays), (self.other, drawn(self.other)))
                )

                def run(x: Any, turned: Any, module: Any = module, other: Any = other) -> None:
                    for routes in (module.route(turned), other.route(x), object()):
                        with pytest.raises(ShapeError, match=r"routes must be"):
                            module(x, routes)

                if not config.buffer_shapes():
                    jax.eval_shape(run, x, turned)


def _same(found: Any, wanted: Any, tolerance: float, what: str) -> None:
    """Assert equality, relative to the largest entry."""
    size = max(float(np.max(np.abs(wanted), initial=0.0)), 1e-30)
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(wanted), rtol=0, atol=tolerance * size, err_msg=what
    )


def _parts_of(
    x: np.ndarray, whole: np.ndarray, mixes: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of an input (2, 5, in), by themselves, and what their outputs must be."""
    yield x[0], whole[0]
    yield x[None], whole[None]
    yield x[:0], whole[:0]
    if mixes:
        return
    yield x[1, 2], whole[1, 2]
    yield x[:, :0], whole[:, :0]
    yield x[0, :0], whole[0, :0]
    yield x.reshape(10, -1), whole.reshape(10, *whole.shape[2:])


def _empty(config: MixtureConfig) -> tuple[int, ...]:
    return (0, 5, config.in_features) if config.mixes_tokens else (0, config.in_features)


def _capped(config: MixtureConfig) -> bool:
    """Whether which tokens are dropped depends on the whole batch."""
    return getattr(getattr(config, "router", None), "capacity", None) is not None


def _library(package: Any) -> str:
    return "numpy" if package is tensormoe_numpy else "torch"


def _plain(output: Any) -> np.ndarray:
    return np.asarray(output.detach() if isinstance(output, torch.Tensor) else output)


def _damaged(values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Descriptions with a name missing, a name too many, or a value that cannot be."""
    yield "", [values]  # type: ignore[misc]
    for name, value in values.items():
        yield f"without {name}", {key: each for key, each in values.items() if key != name}
        yield name, {**values, name: {"junk": 1}}
        if isinstance(value, dict):
            for path, damaged in _damaged(value):
                yield f"{name}.{path}", {**values, name: damaged}
    yield "junk", {**values, "junk": 1}

"""Factorized convolutions are their experts' convolutions, summed: in every way and framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
from tensormoe import Gate
from tensormoe.mixtures import ConvConfig, conv_config, convolve
from tensormoe.planning._convolved import ConvDraft, way_of
from tensormoe.planning._regimes import regimes_of
from tests._third_party import code_blocks
from tests.mixtures._convolutions import (
    PLAIN,
    SMALL,
    drawn,
    images,
    last,
    layer_of,
    the_long_way,
)

SIZES = {1: ((11,), (40,)), 2: ((7, 6), (20, 18)), 3: ((4, 3, 5),)}
PER = ("image", "position")

CASES = [
    pytest.param(replace(config, experts_per=per), size, id=f"{name} per {per}, {size}")
    for name, config in SMALL.items()
    for per in PER
    for size in SIZES[config.window.axes]
]


@pytest.mark.parametrize(("config", "size"), CASES)
def test_sum_of_convolutions(config: ConvConfig, size: tuple[int, ...]) -> None:
    arrays = drawn(config)
    layer, x = layer_of(config, arrays), torch.tensor(images(config, size), requires_grad=True)
    y = layer(x)
    wanted = the_long_way(layer, x, layer.coefficients(x))
    _close(y, wanted)
    assert y.shape == (2, config.out_channels, *config.window.out_size(size))
    with torch.no_grad():
        _close(layer(x), wanted)
    sources = {**dict(layer.named_parameters()), "input": x}
    found, theirs = (
        torch.autograd.grad(each.square().sum(), list(sources.values())) for each in (y, wanted)
    )
    for name, one, other in zip(sources, found, theirs, strict=True):
        assert other.any(), name
        _close(one, other, 1e-9)
    ours = tensormoe_numpy.ConvMoE.restore(config, arrays)
    _close(ours(last(x.detach().numpy())), last(wanted.detach().numpy()))


@pytest.mark.parametrize(("config", "size"), CASES[::3])
@pytest.mark.parametrize("way", ["patches", "convolution", "kernels"])
def test_ways_agree(config: ConvConfig, size: tuple[int, ...], way: Any) -> None:
    layer, x = layer_of(config, drawn(config)), torch.tensor(images(config, size))
    chosen = layer(x)
    programs = layer.experts.factors.programs
    if way not in programs.form.ways:
        assert not config.per_image
        return
    network, form = config.experts.spec.network, programs.form
    layer.experts.factors.programs = replace(
        programs, groups=(regimes_of([ConvDraft(network, form, way, 64)]),)
    )
    assert way_of(layer.experts.factors.programs.program(2, 64)) == way
    _close(layer(x), chosen)


@pytest.mark.parametrize(
    ("name", "per"),
    [("cp", "image"), ("ring of two levels", "position"), ("dense", "image"), ("signals", "image")],
)
def test_jax(name: str, per: str) -> None:
    config = replace(SMALL[name], experts_per=per)
    arrays, size = drawn(config), SIZES[config.window.axes][0]
    x = images(config, size)
    layer, given = layer_of(config, arrays), torch.tensor(x, requires_grad=True)
    y = layer(given)
    cotangent = np.random.default_rng(3).standard_normal(y.shape)
    sources = [*layer.parameters(), given]
    gradients = torch.autograd.grad(y, sources, torch.tensor(cotangent))
    names = [*(each for each, _ in layer.named_parameters()), "input"]
    wanted = {key: each.numpy() for key, each in zip(names, gradients, strict=True)}

    def flax(held: Mapping[str, Any], x: Any) -> Any:
        module = tensormoe_jax.nnx.ConvMoE.restore(config, held)
        return jnp.moveaxis(module(jnp.moveaxis(x, 1, -1)), -1, 1)

    def equinox(held: Mapping[str, Any], x: Any) -> Any:
        return tensormoe_jax.equinox.ConvMoE.restore(config, held)(x)

    @jax.jit
    def run(held: Any, x: Any, cotangent: Any) -> Any:
        found = []
        for form in (flax, equinox):
            made, pull = jax.vjp(form, held, x)
            found.append((made, *pull(cotangent)))
        return found

    with jax.enable_x64(True):
        for made, by_array, by_input in run(arrays, x, cotangent):
            _close(made, y)
            for key, gradient in {**by_array, "input": by_input}.items():
                _close(gradient, wanted[key], 1e-9)


def test_strict_arrays() -> None:
    # a library with nothing but the standard's functions runs over patches
    adapter: dict[str, Any] = {"__name__": "tensormoe_strict"}
    exec(code_blocks("docs/adding-a-backend.md", "python")[0], adapter)
    config = SMALL["cp"]
    arrays, x = drawn(config), last(images(config, (5, 4)))
    given = np.random.default_rng(4).dirichlet(np.ones(4), 2)
    wanted = tensormoe_numpy.ConvMoE.restore(config, arrays)(x, given)
    strict = {
        name.removeprefix("experts."): array_api_strict.asarray(each)
        for name, each in arrays.items()
    }
    found = convolve(
        config.window,
        config.programs(),
        strict,
        array_api_strict.asarray(x),
        [array_api_strict.asarray(given)],
        adapter["BACKEND"],
    )
    _close(np.asarray(found), wanted)


@given(
    data=st.data(),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(*(st.tuples(st.integers(0, 2), st.integers(0, 2)),) * 2),
    per=st.sampled_from(PER),
    factorization=st.sampled_from(["cp", "dense"]),
)
def test_any_window(
    data: st.DataObject,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    per: str,
    factorization: str,
) -> None:
    config = conv_config(
        2,
        3,
        kernel,
        experts=3,
        stride=stride,
        padding=padding,
        dilation=dilation,
        experts_per=per,
        factorization=factorization,
        rank=2 if factorization == "cp" else None,
        gate=PLAIN,
    )
    size = tuple(
        data.draw(st.integers(max(1, each * (k - 1) + 1 - sum(pair)), 9))
        for k, each, pair in zip(kernel, dilation, padding, strict=True)
    )
    count = data.draw(st.integers(0, 3))
    arrays = drawn(config)
    layer, x = layer_of(config, arrays), torch.tensor(images(config, size, count))
    y = layer(x)
    _close(y, the_long_way(layer, x, layer.coefficients(x)))
    ours = tensormoe_numpy.ConvMoE.restore(config, arrays)
    _close(ours(last(x.numpy())), last(y.detach().numpy()))


@pytest.mark.parametrize("per", PER)
def test_coefficients_are_those_of_means(per: str) -> None:
    config = conv_config(
        3, 5, 3, experts=(4, 2), rank=3, padding=1, stride=2, experts_per=per, gate=PLAIN
    )
    layer, x = layer_of(config, drawn(config)), torch.tensor(images(config, (7, 6)))
    means = x.mean((-2, -1))
    if per == "position":
        means = torch.nn.functional.avg_pool2d(x, 3, 2, 1).movedim(1, -1)
    for level, (found, logits) in enumerate(zip(*layer.route(x), strict=True)):
        projection = layer.gate.get_parameter(f"projection_{level}")
        _close(logits, means @ projection)
        _close(found, (means @ projection).softmax(-1))
    _close(layer(x, layer.coefficients(x)), layer(x))


def test_experts_are_kernels() -> None:
    config = SMALL["ring of two levels"]
    arrays = drawn(config)
    layer, x = layer_of(config, arrays), torch.tensor(images(config, (7, 6)))
    given = [torch.zeros(2, 2, dtype=x.dtype), torch.zeros(2, 3, dtype=x.dtype)]
    given[0][:, 1] = given[1][:, 2] = 1.0
    kernel, bias = layer.expert(1, 2)
    conv = torch.nn.functional.conv2d
    padded = torch.nn.functional.pad(x, (1, 2, 0, 0))
    _close(layer(x, given), conv(padded, kernel, bias, (1, 2), 0, (2, 1)))
    kernels, biases = layer.materialize()
    assert kernels.shape == (2, 3, 5, 2, 2, 3)
    _close(kernels[1, 2], kernel)
    _close(biases[1, 2], bias)
    theirs, _ = tensormoe_numpy.ConvMoE.restore(config, arrays).expert(1, 2)
    assert theirs.shape == (2, 3, 2, 5)
    _close(np.moveaxis(theirs, (0, 1, 2, 3), (2, 3, 1, 0)), kernel)


@pytest.mark.parametrize(
    "gate", [Gate("top_k", k=2), Gate("relu_top_k", k=1), Gate("entmax", normalization="batch")]
)
def test_gates(gate: Gate) -> None:
    for per in PER:
        config = replace(SMALL["cp"], gate=gate, experts_per=per)
        arrays = drawn(config)
        layer, x = layer_of(config, arrays).eval(), torch.tensor(images(config, (7, 6)))
        _close(layer(x), the_long_way(layer, x, layer.coefficients(x)))
        ours = tensormoe_numpy.ConvMoE.restore(config, arrays)
        _close(ours(last(x.numpy())), last(layer(x).detach().numpy()), 1e-6)


def _close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Assert equality, relative to the largest entry."""
    found, wanted = (
        each.detach().numpy() if isinstance(each, torch.Tensor) else np.asarray(each)
        for each in (found, wanted)
    )
    assert found.shape == wanted.shape
    size = max(float(np.max(np.abs(wanted), initial=0.0)), 1e-30)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * size)


def test_empty_batches_have_gradients() -> None:
    for config in (SMALL["cp"], SMALL["dense"]):
        layer = layer_of(config, drawn(config))
        empty = torch.zeros(0, 3, 9, 9, dtype=torch.float64, requires_grad=True)
        layer(empty).sum().backward()
        assert not any(each.grad.any() for each in layer.parameters())
        assert functional_call(layer, dict(layer.named_parameters()), (empty,)).shape[0] == 0

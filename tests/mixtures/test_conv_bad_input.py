"""Arguments, budgets and images that no factorized convolution takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import Budget, TopK
from tensormoe.errors import (
    BackendError,
    BudgetError,
    RankError,
    ShapeError,
    SpecError,
)
from tensormoe.mixtures import conv_config
from tests.mixtures._convolutions import PLAIN, drawn, layer_of

CP = conv_config(4, 6, 3, experts=4, rank=5, padding=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_size": 0}, SpecError, "kernel_size must be a positive integer; got 0"),
        ({"kernel_size": (3,) * 4}, SpecError, "from 1 to 3 spatial axes; got 4"),
        ({"kernel_size": ()}, SpecError, "from 1 to 3 spatial axes; got 0"),
        ({"stride": (1, 2, 3)}, SpecError, "stride must be one number, or one per spatial axis, 2"),
        ({"padding": -1}, SpecError, "padding must be a non-negative integer; got -1"),
        ({"padding": (1, (1, 2, 3))}, SpecError, r"got \(1, 2, 3\) for one"),
        ({"padding": "full"}, SpecError, "got 'full'. Write one of them"),
        ({"padding": "same", "stride": 2}, SpecError, r'"same" with stride \(2, 2\)'),
        ({"dilation": 0}, SpecError, "dilation must be a positive integer; got 0"),
        ({"groups": 2}, SpecError, "groups must be 1, .*; got 2. Leave it out"),
        ({"dims": 4}, SpecError, "spatial axes; got 4"),
        ({"experts_per": "pixel"}, SpecError, "one of 'image', 'position'; got 'pixel'"),
        ({"experts": 0}, SpecError, "experts must be positive integers; got 0"),
        ({"in_channels": 1.5}, SpecError, "in_channels must be a positive integer; got 1.5"),
        ({"rank": 3, "budget": 1000}, RankError, "rank and budget exclude one another"),
        ({"budget": 10}, BudgetError, "of which 16 are not its experts'; got 10"),
        ({"budget": "linear"}, BudgetError, "must be a number of parameters"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tensormoe_torch.ConvMoE(
            **{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "experts": 4, **options}
        )


def test_budgets() -> None:
    for limit in (500, 2000):
        layer = tensormoe_torch.ConvMoE(4, 6, 3, experts=4, budget=limit)
        assert layer.num_parameters <= limit
        assert sum(each.numel() for each in layer.parameters()) == layer.num_parameters
        more = tensormoe_torch.ConvMoE(
            4, 6, 3, experts=(4, 2), budget=Budget(parameters=limit, gate=False)
        )
        assert more.config.experts.spec.num_parameters <= limit
    same = tensormoe_torch.ConvMoE(4, 6, 3, experts=4)
    assert same.config.experts.spec.num_parameters <= 4 * 6 * 9 + 6


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 9, 9), r"shape \(..., 4, height, width\); got \(2, 3, 9, 9\)"),
        ((9, 9), r"got \(9, 9\). Check the layer's in_channels"),
        ((2, 9, 9, 4), "move the axis of channels"),
        (
            (2, 4, 9, 0),
            r"got 0 pixels with 2 of padding for a kernel that spans 3 \(spatial axis 1",
        ),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    layer = layer_of(CP, drawn(CP, "float32"))
    with pytest.raises(ShapeError, match=message):
        layer(torch.zeros(shape))
    arrays = jax.tree.map(jnp.asarray, drawn(CP, "float32"))
    with pytest.raises(ShapeError, match=message):
        tensormoe_jax.equinox.ConvMoE.restore(CP, arrays)(jnp.zeros(shape))


def test_inputs_that_do_not_fit() -> None:
    layer, x = layer_of(CP, drawn(CP, "float32")), torch.zeros(2, 4, 9, 9)
    with pytest.raises(ShapeError, match=r"dtype torch.float32; got torch.float64"):
        layer(x.double())
    with pytest.raises(BackendError):
        layer(x.numpy())
    for given, message in (
        (torch.rand(3, 4), r"shape \(2, 4\); got \(3, 4\)"),
        ([torch.rand(2, 4)] * 2, "one array per level, 1; got 2"),
        (TopK(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)), "got TopK"),
        (torch.rand(2, 9, 9, 4), r"got \(2, 9, 9, 4\)"),
    ):
        with pytest.raises(ShapeError, match=message):
            layer(x, given)
    bare = layer_of(replace(CP, gate=None), drawn(replace(CP, gate=None), "float32"))
    for call in (bare, bare.coefficients, bare.route):
        with pytest.raises(ShapeError, match="this layer has no gate"):
            call(x)
    for size in (None, 9, (9,), (9, 0), "99"):
        with pytest.raises(SpecError, match="size must be"):
            layer.cost(2, size=size)
    with pytest.raises(ShapeError, match="as large as the kernel"):
        conv_config(4, 6, 5, experts=4).plan((4, 9))
    ours = tensormoe_numpy.ConvMoE.restore(CP, drawn(CP, "float32"))
    with pytest.raises(ShapeError, match=r"\(..., height, width, 4\)"):
        ours(np.zeros((2, 4, 9, 9), "float32"))
    with pytest.raises(SpecError, match=r"patches of 9 pixels; got 36 features, gate Gate"):
        replace(CP, experts=replace(CP.experts, gate=PLAIN))

"""Costs, plans and windows of factorized convolutions."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tensormoe_numpy
import tensormoe_torch
from tensormoe.mixtures import Window, conv_config, window
from tensormoe.planning import Library
from tensormoe.planning._convolved import ConvDraft, Convolved, conv_programs, way_of
from tensormoe.planning._regimes import best_candidate
from tests.mixtures._convolutions import SMALL, last

FORM = Convolved("each", channels_first=True)
STARTS = ((0, 4), (16, 64), (256, 1024), (4096, 16384))
CP = conv_config(4, 6, 3, experts=4, rank=5, padding=1)


@pytest.mark.parametrize("training", [False, True])
def test_flops(training: bool) -> None:
    for config, size, way in (
        (conv_config(16, 64, 3, experts=8, rank=12, padding=1), (12, 11), "convolution"),
        (conv_config(16, 8, 3, experts=4, rank=64), (12, 11), "kernels"),
        (replace(CP, experts_per="position"), (12, 11), "convolution"),
        (conv_config(4, 6, 3, experts=4, rank=50, gate=None), (3, 3), "patches"),
    ):
        layer = tensormoe_torch.ConvMoE.of(config)
        assert layer.plan(size, 3).way == way
        x = torch.randn(3, config.in_channels, *size, requires_grad=training)
        given = torch.rand(3, 4, requires_grad=training) if config.gate is None else None
        with FlopCounterMode(display=False) as counter:
            y = layer(x, given)
            if training:
                y.sum().backward()
        found = layer.cost(3, size=size, training=training)
        if not training:
            assert found.matmul_flops == counter.get_total_flops()
        elif way == "kernels":
            # the counter takes the backward pass of a grouped convolution for that of a whole one
            assert found.matmul_flops < counter.get_total_flops()
        else:
            # PyTorch multiplies and sums for the gradient of coefficients, where we count a product
            assert found.matmul_flops == pytest.approx(counter.get_total_flops(), rel=0.03)
        assert (
            found.parameters
            == layer.num_parameters
            == sum(each.numel() for each in layer.parameters())
        )
        assert (found.saved_memory > 0) == training


@pytest.mark.parametrize("per", ["image", "position"])
def test_memory(per: str) -> None:
    for kind, size in (("cp", 3), ("dense", 3), ("cp", 1)):
        layer = tensormoe_numpy.ConvMoE(
            16, 32, size, experts=8, padding=size // 2, experts_per=per, factorization=kind, seed=0
        )
        projection = layer.parameters["gate.projection_0"]
        projection[...] = np.random.default_rng(0).standard_normal(projection.shape)
        x = last(np.random.default_rng(1).standard_normal((8, 16, 28, 28)).astype("float32"))
        x = np.ascontiguousarray(x)
        layer(x)
        tracemalloc.start()
        layer(x)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak == pytest.approx(layer.cost(8, size=(28, 28)).peak_memory, rel=0.02)


def test_plans_are_the_cheapest() -> None:
    for config in SMALL.values():
        network = config.experts.spec.network
        for per in (True, False):
            form = replace(FORM, per_image=per)
            programs = conv_programs(network, form)
            for rows, (start, sought) in zip(programs.groups, STARTS, strict=False):
                size = sought if per else 1
                for batch in (1, 7, 300):
                    costs = {
                        way: best_candidate([ConvDraft(network, form, way, size)], batch).cost(
                            batch
                        )
                        for way in form.ways
                    }
                    assert costs[way_of(rows.program(batch))] == min(costs.values())
                    assert programs.program(batch, start if per else 1) == rows.program(batch)


def test_plans_in_words() -> None:
    config = conv_config(16, 64, 3, experts=8, rank=12, padding=1)
    plans = [config.plan((28, 28), 4, library=Library(convolves=each)) for each in ("", "shared")]
    assert [plan.way for plan in plans] == ["patches", "convolution"]
    assert plans[1].describe().splitlines()[1] == "convolution: into 12 channels"
    assert "kernel 3×3, 28×28 → 28×28, per image" in plans[0].describe()
    assert config.plan((28, 28), 4) == config.plan([28, 28], 4)
    wide = conv_config(16, 8, 3, experts=8, rank=200)
    assert wide.plan((28, 28), 4, library=Library(convolves="each")).way == "kernels"


def test_windows() -> None:
    assert window(3, dims=1).kernel_size == (3,)
    assert window((3, 5), padding="same").padding == ((1, 1), (2, 2))
    assert window((2, 4), padding="same", dilation=(1, 3)).padding == ((0, 1), (4, 5))
    assert window(4, padding="same").out_size((9, 10)) == (9, 10)
    assert window(3, padding="valid") == window(3)
    assert window(3, padding=(1, (0, 2))).padding == ((1, 1), (0, 2))
    assert Window.from_dict(window(3, 2, 1, 2).to_dict()) == window(3, 2, 1, 2)

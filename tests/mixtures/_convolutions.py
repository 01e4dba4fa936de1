"""A factorized convolution the long way: every expert by itself, in PyTorch's own convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

import tensormoe_torch
from tensormoe import Gate, convert
from tensormoe.mixtures import ConvConfig, conv_config

RUN = (F.conv1d, F.conv2d, F.conv3d)

PLAIN = Gate("softmax", normalization=None)


def drawn(config: ConvConfig, dtype: str = "float64", seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters and buffers, variances positive."""
    rng = np.random.default_rng(seed)
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    arrays = {name: 0.7 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {
        name: (array**2 + 0.1 if "variance" in name else array).astype(dtype)
        for name, array in arrays.items()
    }


def images(
    config: ConvConfig, size: tuple[int, ...], count: int = 2, dtype: str = "float64"
) -> np.ndarray:
    """Random images, channels first."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, config.in_channels, *size)).astype(dtype)


def layer_of(config: ConvConfig, arrays: dict[str, np.ndarray]) -> Any:
    """PyTorch's layer of copies of NumPy's arrays."""
    return tensormoe_torch.ConvMoE.restore(config, convert(dict(arrays), "torch", copy=True))


def the_long_way(layer: Any, x: Tensor, given: tuple[Tensor, ...]) -> Tensor:
    """Every expert's convolution by itself, summed with its coefficients.

    Args:
        layer: PyTorch's.
        x: (images, in, *size).
        given: coefficients of each level.
    """
    window, levels = layer.config.window, layer.config.experts.spec.levels
    kernels, biases = layer.materialize()
    weights = given[0]
    for each in given[1:]:
        weights = (weights[..., :, None] * each[..., None, :]).flatten(-2)
    padded = F.pad(x, [zeros for pair in reversed(window.padding) for zeros in pair])
    run, total = RUN[window.axes - 1], 0.0
    for n, kernel in enumerate(kernels.flatten(0, levels - 1)):
        bias = None if biases is None else biases.flatten(0, levels - 1)[n]
        made = run(padded, kernel, bias, window.stride, 0, window.dilation)
        # one per image, or one per position
        share = weights[..., n]
        shape = (*share.shape, *(1,) * window.axes) if layer.config.per_image else share.shape
        total = total + made * share.reshape(shape).unsqueeze(1 if share.ndim > 1 else -1).reshape(
            (shape[0], 1, *shape[1:])
        )
    return total


def last(x: np.ndarray) -> np.ndarray:
    """Images with their channels last."""
    return np.moveaxis(x, 1, -1)


SMALL = {
    "cp": conv_config(3, 5, 3, experts=4, rank=3, padding=1, gate=PLAIN),
    "wide cp": conv_config(3, 5, 3, experts=4, rank=40, padding=1, gate=PLAIN),
    "dense": conv_config(3, 4, 3, experts=3, factorization="dense", stride=2, gate=PLAIN),
    "ring of two levels": conv_config(
        2,
        5,
        (2, 3),
        experts=(2, 3),
        factorization="tensor_ring",
        rank=(2, 2, 2, 3),
        padding=(0, (1, 2)),
        dilation=(2, 1),
        stride=(1, 2),
    ),
    "tucker, no bias": conv_config(
        3, 5, 3, experts=4, factorization="tucker", rank=(2, 3, 4), bias=False, gate=PLAIN
    ),
    "hadamard": conv_config(3, 5, 2, experts=3, factorization="hadamard", padding="same"),
    "shared basis": conv_config(3, 5, 3, experts=4, factorization="shared_basis", rank=2),
    "base and deltas": conv_config(3, 5, 3, experts=4, factorization="base_delta", rank=2),
    "signals": conv_config(3, 5, (3,), experts=4, rank=3, padding="same", dilation=2, gate=PLAIN),
    "volumes": conv_config(2, 3, 2, dims=3, experts=3, rank=4, padding=1, gate=PLAIN),
    "pixels": conv_config(3, 5, 1, experts=4, rank=3, gate=PLAIN),
}
"""Layers of each factorization and geometry, an image each."""

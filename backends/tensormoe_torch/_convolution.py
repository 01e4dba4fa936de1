"""Convolutions of PyTorch, with kernels of all images or of each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def convolution(
    images: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Cross-correlation of images (images, in, *size) with kernels (*size, in, out).

    Args:
        images: in the dtype of the kernels.
        kernels: for all images; or of each, (images, *size, in, out).
        bias: (out,), or of each image, (images, out).
        stride: for each spatial axis.
        padding: zeros before and behind each spatial axis.
        dilation: for each spatial axis.
    """
    axes = len(stride)
    run = _CONVOLUTIONS[axes - 1]
    even = all(before == behind for before, behind in padding)
    if not even:
        # pairs for the last axis come first
        images = F.pad(images, [zeros for pair in reversed(padding) for zeros in pair])
    zeros = tuple(before for before, _ in padding) if even else (0,) * axes
    if kernels.ndim == axes + 2:
        weight = kernels.permute(axes + 1, axes, *range(axes))
        return run(images, weight, bias, stride, zeros, dilation)
    count, channels, *size = images.shape
    out = kernels.shape[-1]
    weight = kernels.permute(0, axes + 2, axes + 1, *range(1, axes + 1))
    if count == 0:
        # no groups: all kernels of no images are one of zeros
        shared = None if bias is None else bias.sum(0)
        return run(images, weight.sum(0), shared, stride, zeros, dilation)
    made = run(
        images.reshape(1, count * channels, *size),
        weight.reshape(count * out, *weight.shape[2:]),
        None if bias is None else bias.reshape(count * out),
        stride,
        zeros,
        dilation,
        count,
    )
    return made.reshape(count, out, *made.shape[2:])

"""Mixtures of convolutions from a convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensormoe import Gate
from tensormoe.errors import SpecError
from tensormoe_torch import from_conv

WINDOWS: tuple[dict[str, Any], ...] = (
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2), "bias": False},
)


# PyTorch's own convolution says what it does with an odd padding
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("per", ["image", "position"])
@pytest.mark.parametrize(
    ("factorization", "rank"),
    [("cp", 6), ("tensor_ring", (2, 3, 6)), ("tucker", (2, 6, 6)), ("dense", None)],
)
def test_experts_equal_the_convolution(
    options: dict[str, Any], per: str, factorization: str, rank: Any
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **options).double().eval()
    layer, fit = from_conv(conv, 5, factorization, rank=rank, experts_per=per)
    assert not layer.training
    assert layer.dtype == torch.float64
    assert fit.parameters_after == sum(each.numel() for each in layer.parameters())
    assert fit.parameters_before == sum(each.numel() for each in conv.parameters())
    assert fit.error < 1e-10
    with torch.no_grad():
        for parameter in layer.gate.parameters():
            parameter.normal_()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer.expert(2)[0], conv.weight)


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (9,)), (nn.Conv3d, (4, 5, 6))])
def test_axes(kind: Any, size: tuple[int, ...]) -> None:
    conv = kind(3, 4, 2, padding=1).double()
    layer, _ = from_conv(conv, 3, rank=4)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))


def test_low_ranks_and_noise() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3)
    layer, fit = from_conv(conv, 4, rank=5)
    table = torch.cat([layer.expert(0)[0].flatten(1), layer.expert(0)[1][:, None]], 1)
    theirs = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1)
    values = torch.linalg.svdvals(theirs.detach())
    best = values[5:].square().sum().sqrt() / values.square().sum().sqrt()
    torch.testing.assert_close(torch.tensor(fit.error), best, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((table - theirs).detach().norm() / values.norm(), best)
    noisy, fit = from_conv(conv, 4, "dense", noise=0.1)
    x = torch.randn(2, 8, 7, 7)
    assert fit.noise == 0.1
    assert not torch.allclose(noisy.expert(0)[0], noisy.expert(1)[0])
    torch.testing.assert_close(noisy(x), conv(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Linear(3, 4), "that runs as one; got Linear"),
        (nn.ConvTranspose2d(3, 4, 3), "got ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, groups=2), "got groups=2 and"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Conv2d(4, 4, 3, device="meta"), "conv must hold values"),
        (nn.LazyConv2d(4, 3), "Run a lazy layer once"),
        (None, "got NoneType"),
    ],
)
def test_what_cannot_be(conv: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_conv(conv, 4)
    with pytest.raises(SpecError, match="coefficients that sum to one"):
        from_conv(nn.Conv2d(3, 4, 3), 4, gate=Gate("relu_top_k", k=2))

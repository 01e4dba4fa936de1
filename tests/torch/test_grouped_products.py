"""Grouped products of matrices that lie in memory as what made them left them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from tensormoe_torch._grouped import grouped_matmul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", [*permutations(range(3))])
@pytest.mark.parametrize("sizes", [(16, 20, 128), (3, 8, 16), (4, 5, 7), (1, 16, 16)])
def test_matrices_in_any_order(
    dtype: torch.dtype, order: tuple[int, int, int], sizes: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn([sizes[each] for each in order], generator=generator).to(dtype)
    matrices = stored.permute(*(order.index(each) for each in range(3)))
    assert tuple(matrices.shape) == sizes
    counts = torch.tensor([3, 0, *[2] * (sizes[0] - 2)])[: sizes[0]]
    rows = torch.randn((int(counts.sum()), sizes[1]), generator=generator).to(dtype)
    found = grouped_matmul(rows, matrices, counts)
    start, tolerance = 0, 2e-2 if dtype == torch.bfloat16 else 1e-4
    for matrix, count in zip(matrices, counts.tolist(), strict=True):
        wanted = rows[start : start + count].double() @ matrix.double()
        own = found[start : start + count].double()
        torch.testing.assert_close(own, wanted, rtol=tolerance, atol=5 * tolerance)
        start += count

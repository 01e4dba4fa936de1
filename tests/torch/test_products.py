"""Products of eager tensors on the CPU, however their operands are stored."""

from __future__ import annotations

import pytest
import torch

from tensormoe_torch._products import product


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 200), (300, 5000), (5, 1), (1, 7), (0, 3), (3, 0)])
def test_products_of_few_rows(
    rows: int, by_columns: bool, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    inner, columns = sizes
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(rows, inner, generator=generator).to(dtype)
    right = torch.randn(inner, columns, generator=generator).to(dtype)
    if by_columns:
        right = right.t().contiguous().t()
    found = product(left, right)
    assert found.shape == (rows, columns)
    assert found.dtype == dtype
    rough = {"rtol": 2e-2, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), left.double() @ right.double(), **rough)


def test_few_rows_of_a_matrix_by_columns_are_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []
    mm = torch.mm

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        called.append(tuple(left.shape))
        return mm(left, right)

    monkeypatch.setattr(torch, "mm", counted)
    matrix = torch.randn(40, 30)
    for rows in (1, 2, 3, 4):
        product(torch.randn(rows, 30), matrix.t())
        product(torch.randn(rows, 40), matrix)
    assert called == [(40, 30), (40, 30)]

"""Coefficients by index in a compiled layer whose program has not been run before."""

from __future__ import annotations

import torch

from tensormoe import TensorRing, TopK
from tensormoe_torch import MuMoEEmbedding


def test_joint_gathers_of_two_levels_are_one_graph() -> None:
    # a size that no other test has: programs are cached, and this one must be new
    layer = MuMoEEmbedding(37, 11, (3, 5), TensorRing((2, 3, 2, 2)))
    ids = torch.tensor([0, 36, 5])
    made = [
        TopK(torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.rand(3, 2)),
        TopK(torch.tensor([[4, 0], [1, 3], [2, 2]]), torch.rand(3, 2)),
    ]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(ids, made)
    torch.testing.assert_close(found, layer(ids, made))

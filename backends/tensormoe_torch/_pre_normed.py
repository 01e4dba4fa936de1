"""A block behind a norm that its gate does not see."""

from __future__ import annotations

from torch import Tensor, nn

from tensormoe_torch._checks import Given, check_input
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._mlp import MuMoEMLP


class PreNormed(nn.Module):
    """A layer or block whose experts read a normed input, and whose gate reads the input itself.

    The GPT-2 models of Oldfield et al. 2024 are built so, in place of an MLP with a norm before it:
    routing keeps the scale of the residual stream, which the norm takes from the experts' input.

    Args:
        block: a :class:`MuMoE` or :class:`MuMoEMLP`.
        norm: the norm; by default a ``LayerNorm`` with the block's size, dtype and device.

    Attributes:
        block: the layer or block.
        norm: the norm in front of its experts.

    Raises:
        TypeError: another kind of block.

    >>> import torch
    >>> from tensormoe_torch import MuMoEMLP
    >>> block = PreNormed(MuMoEMLP(8, 16, experts=4, rank=2))
    >>> block(torch.ones(5, 8)).shape
    torch.Size([5, 8])
    """

    def __init__(self, block: MuMoE | MuMoEMLP, norm: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(block, MuMoE | MuMoEMLP):
            raise TypeError(
                f"block must be a MuMoE or a MuMoEMLP; got {type(block).__qualname__}. An "
                "embedding has no input to norm."
            )
        self.block = block
        if norm is None:
            like = self._experts._weight
            size = self._experts.spec.in_features
            norm = nn.LayerNorm(size, device=like.device, dtype=like.dtype)
        self.norm = norm

    @property
    def _experts(self) -> MuMoE:
        """The layer that the norm stands before."""
        return self.block.first if isinstance(self.block, MuMoEMLP) else self.block

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients (..., N_e) per level of inputs (..., in), which are not normed.

        Raises:
            BackendError, ShapeError: as the block's own.
        """
        return self.block.coefficients(x)

    def forward(self, x: Tensor, coefficients: Given | None = None) -> Tensor:
        """Run the block: (..., in) → (..., out).

        Args:
            x: (..., in), in the block's dtype; under autocast, in any dtype that it narrows.
            coefficients: ready-made ones; the block's gate makes them from ``x`` otherwise.

        Raises:
            BackendError, ShapeError: as the block's own.
        """
        experts = self._experts
        check_input(x, experts.spec.in_features, experts._weight)
        given = self.block.coefficients(x) if coefficients is None else coefficients
        result: Tensor = self.block(self.norm(x), given)
        return result

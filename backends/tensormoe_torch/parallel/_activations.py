"""Activations between layers whose hidden features are cut: each device has a slice of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tensormoe.errors import SpecError

Activation = Callable[[Tensor], Tensor]


@torch.no_grad()
def cut_pieces(act: Activation, width: int, devices: int, place: str) -> int:
    """Pieces to cut the inputs of an activation into, so that outputs are slices: by trying.

    Args:
        act: the activation, elementwise or of both halves of gated units.
        width: number of its inputs.
        devices: P, the number of slices.
        place: of the activation, for messages.

    Returns:
        1 for one slice of all inputs, also where gates and what they gate lie side by side; 2 for
        a slice of each half.

    Raises:
        SpecError: an activation with parameters, or one that needs all hidden features.
    """
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        raise SpecError(
            f"an activation between layers that are cut must have no parameters; got "
            f"{type(act).__name__} at {place!r}. Take another one, or leave these layers whole."
        )
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    # an activation may write in place
    wanted = act(values.clone())
    features = wanted.shape[-1]
    # one device has all slices of what several devices would have
    count = devices if devices > 1 else _divisor(features)
    size, step = features // count, width // count
    for pieces in (1, 2):
        halves = values.chunk(pieces, dim=-1)
        for position in range(count):
            start = position * step // pieces
            own = torch.cat([each[:, start : start + step // pieces] for each in halves], dim=-1)
            made, slice_ = act(own), wanted[:, position * size : (position + 1) * size]
            if made.shape != slice_.shape or not torch.allclose(made, slice_, atol=1e-5):
                break
        else:
            return pieces
    raise SpecError(
        "an activation between layers that are cut must make each hidden feature of its own "
        f"inputs alone; the one at {place!r} does not. Leave these layers whole."
    )


def _divisor(number: int) -> int:
    """The smallest divisor above one."""
    return next((each for each in range(2, number + 1) if number % each == 0), 1)

"""Whether something follows the operations on a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced(x: Tensor) -> bool:
    """Whether something follows the operations on ``x``: a compiler, an exporter, a transform.

    Differentiation in forward mode is one of those.
    """
    return (
        torch.compiler.is_compiling()
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
    )

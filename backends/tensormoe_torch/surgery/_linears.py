"""Linear layers of other code: their weights as (in, out), whichever way they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensormoe.errors import SpecError
from tensormoe_torch._dtypes import FLOATS


@dataclass(frozen=True, eq=False)
class Linear:
    """``y = x W + b``: views of a layer's own weights.

    Args:
        weight: W (in, out).
        bias: b (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        """In and out."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def num_parameters(self) -> int:
        """Stored entries."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())


def is_linear(module: object) -> bool:
    """Whether it is an ``nn.Linear`` or the ``Conv1D`` that Hugging Face's GPT-2 uses."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def read_linear(module: object, name: str, values: bool = True) -> Linear:
    """The weights of a linear layer.

    Args:
        module: an ``nn.Linear``, or a Hugging Face ``Conv1D``, which stores (in, out).
        name: of the argument or the module, for messages.
        values: whether finite values are needed, not only sizes.

    Raises:
        SpecError: another module, one whose forward may do more, or weights without values.
    """
    if not is_linear(module):
        raise SpecError(
            f"{name} must be an nn.Linear, or a Conv1D of Hugging Face; got "
            f"{type(module).__name__}."
        )
    assert isinstance(module, nn.Module)
    if (isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward) or (
        "forward" in vars(module)
    ):
        raise SpecError(
            f"{name} must run as a linear layer; got {type(module).__name__}, which has a forward "
            "of its own. Merge what it adds into a plain nn.Linear first."
        )
    weight: Any = module.weight
    bias: Any = module.bias
    if is_lazy(weight):
        raise SpecError(f"{name} must know its sizes; got a lazy layer. Run the model once first.")
    table = weight.detach().t() if isinstance(module, nn.Linear) else weight.detach()
    if table.dtype not in FLOATS:
        raise SpecError(
            f"{name} must have floating-point weights; got {table.dtype}. Dequantize them first."
        )
    found = Linear(table, None if bias is None else bias.detach())
    if values:
        check_values(found, name)
    return found


def check_values(linear: Linear, name: str) -> None:
    """Refuse weights on the meta device, and those that are not finite.

    Raises:
        SpecError: such weights.
    """
    for array in (linear.weight, linear.bias):
        if array is None:
            continue
        if array.device.type == "meta":
            raise SpecError(
                f"{name} must hold values; its weights are on the meta device. Load them first, or "
                "replace layers by fresh ones with start='variance'."
            )
        if not bool(torch.isfinite(array).all()):
            raise SpecError(f"{name} must hold finite weights; got NaN or infinity. Load it anew.")


def _is_conv1d(module: object) -> bool:
    # by name: importing the library only to recognize its layers would take seconds
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")

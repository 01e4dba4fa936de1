"""The weight of a layer that has none: its shape, dtype and device, and no values.

Code around a linear layer reads ``layer.weight.dtype`` to cast what it hands over, as T5 does. A
mixture can say that much about the matrices of its experts, but there is no matrix to hand out: the
mean of the experts, or zeros, would be used in silence where the layer's own output was meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormoe.errors import SpecError

# numel is not among them: what the layer stores is another number
_KNOWN = ("dtype", "device", "shape", "ndim", "itemsize", "requires_grad", "is_cuda", "is_meta")
_METHODS = ("size", "dim", "is_floating_point", "is_complex", "element_size")
_OPEN = {
    *(getattr(Tensor, name).__get__ for name in _KNOWN),
    *(getattr(Tensor, name) for name in _METHODS),
}


class _Declared(Tensor):
    """A tensor with a shape, dtype and device; whatever needs its values is refused."""

    said: str

    @staticmethod
    def __new__(
        cls: type[_Declared],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
        said: str,
    ) -> _Declared:
        made: _Declared = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        made.said = said
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<no values: {self.said}>"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _OPEN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        _refuse((*args, *(kwargs or {}).values()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        _refuse(args)


def _refuse(given: tuple[Any, ...]) -> None:
    said = next((each.said for each in given if isinstance(each, _Declared)), "a mixture's weight")
    # no TypeError: PyTorch would take it for "not implemented here" in arithmetic
    raise SpecError(
        f"{said} has no values: the layer's experts are factors, and it is not computed by one "
        "matrix. Call the layer; or take factors for its parameters, expert(…) for one expert's "
        "matrix."
    )


def declared(shape: tuple[int, ...], like: Tensor, requires_grad: bool, said: str) -> Tensor:
    """A tensor with a shape, and with the dtype and device of another one, that has no values.

    Args:
        shape: what it says.
        like: whose dtype and device it says.
        requires_grad: what it says.
        said: what it stands for, for messages.
    """
    if torch.compiler.is_compiling():
        # compilers can't make the class; they refuse to compute with the meta device too
        return torch.empty(shape, dtype=like.dtype, device="meta")
    return _Declared(shape, like.dtype, like.device, requires_grad, said)

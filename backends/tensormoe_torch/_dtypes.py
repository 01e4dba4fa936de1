"""Dtypes and devices in which a layer may be stored."""

from __future__ import annotations

import torch

from tensormoe._validation import brief
from tensormoe.errors import SpecError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` if a layer can be stored in it; PyTorch's default one for None.

    Raises:
        SpecError: not a floating-point type.
    """
    found = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(found, torch.dtype) or found not in FLOATS:
        names = ", ".join(str(each) for each in FLOATS)
        raise SpecError(f"dtype must be one of {names}; got {brief(dtype)}.")
    return found


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """``device`` as PyTorch's value; None for the default one.

    Raises:
        SpecError: no device of this PyTorch's.
    """
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SpecError(
            "device must be a torch.device or its name, such as 'cpu' or 'cuda:0'; got "
            f"{brief(device)}."
        ) from error

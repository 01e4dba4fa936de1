"""Tensors of safetensors files, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormoe.checkpoint._safetensors import DTYPES, Placed
from tensormoe.compression._shards import Shard, read_range

_CODES = {name: code for code, name in DTYPES.items()}


def code_of(array: Tensor) -> str:
    """The format's name of a dtype."""
    return _CODES[str(array.dtype).removeprefix("torch.")]


def tensor_bytes(array: Tensor) -> bytes:
    """Entries of a tensor on the host, as files have them."""
    found: bytes = array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def read_tensor(shard: Shard, placed: Placed) -> Tensor:
    """A tensor of a file."""
    dtype: torch.dtype = getattr(torch, DTYPES[placed.code])
    data = bytearray(b"".join(read_range(shard, placed.begin, placed.end)))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(placed.shape)

"""Codes and scales as numbers, by code that is not ours: entry by entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tensormoe.functional import LayerConfig
from tensormoe.testing import reconstruct


def decoded(codes: Any, scales: Any, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The array that codes and scales stand for, in float64."""
    plain = np.asarray(codes).reshape(-1)
    values = []
    for place in range(int(np.prod(shape))):
        if bits == 8:
            code = int(plain[place])
        else:
            group, entry = divmod(place, 64)
            byte = int(plain[32 * group + entry % 32])
            code = (byte // 16 if entry >= 32 else byte % 16) - 8
        values.append(code * float(scales[place // 64]))
    return np.array(values, "float64").reshape(shape)


def stored(path: Path) -> np.ndarray:
    """The tensor of a file of rounded factors, whose values are in the dtype of the scales."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        config = LayerConfig.from_dict(json.loads(metadata["config"]))
        factors = {}
        for name, shape in config.spec.shapes.items():
            full = f"{metadata.get('prefix', '')}factors.{name}"
            codes, scales = (opened.get_tensor(f"{full}.{part}") for part in ("codes", "scales"))
            wide = decoded(codes.numpy(), scales.double().numpy(), shape, int(metadata["bits"]))
            import torch

            factors[name] = torch.tensor(wide).to(scales.dtype).double().numpy()
    return reconstruct(config.spec.factorization, factors)

"""A GPU's roofline for each precision: published if its name is known, measured otherwise.

With TF32 off, products of float32 run on the vector units; with TF32 on, and in bfloat16, on tensor
cores. Devices older than A100 have the first only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from _gpu_settings import BFLOAT16, FLOAT32, TF32, Precision, Sizes
from _gpu_timing import Turns
from _shared import Call

from tensormoe.functional import LayerConfig
from tensormoe.planning import Roofline, published_roofline

# others of the same chip have other clocks or memory: an A100 of 40 GB, an H100 on PCIe, a slice
NAMES = {
    "t4": r"(NVIDIA |Tesla )?T4",
    "v100": r"(NVIDIA |Tesla )?V100-SXM[23]-(16|32)GB",
    "a100": r"(NVIDIA )?A100-SXM4-80GB",
    "l4": r"(NVIDIA )?L4",
    "h100": r"(NVIDIA )?H100 80GB HBM3",
    "h200": r"(NVIDIA )?H200",
}
BEFORE_TF32 = ("t4", "v100")
NO_OVERHEAD = 1e-15

Rooflines = dict[str, Roofline]
"""By the name of a precision."""


def published(device: str) -> Rooflines | None:
    """Rooflines of a device by the name that its driver gives; None for one that is not known."""
    for name, pattern in NAMES.items():
        if re.fullmatch(pattern, device):
            precisions = (FLOAT32,) if name in BEFORE_TF32 else (FLOAT32, TF32, BFLOAT16)
            return {
                each.name: replace(
                    published_roofline(name, "tfloat32" if each.tf32 else each.dtype),
                    name=f"{name}, published",
                )
                for each in precisions
            }
    return None


def measured(
    device: str, precisions: tuple[Precision, ...], sizes: Sizes, turn: Turns
) -> Rooflines:
    """Rooflines by PyTorch: large products, a large copy, and the smallest operation.

    Elementwise work gets the rate of products with TF32 off, which run on the vector units.
    """
    import torch

    def fastest(call: Call) -> float:
        return min(turn(call) for _ in range(5))

    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * sizes.copied / fastest(partial(target.copy_, source))
    del source, target
    one = torch.zeros(1, device=device)
    overhead = fastest(lambda: one.add_(1))
    rates = {}
    for precision in dict.fromkeys((FLOAT32, *precisions)):
        rows = sizes.product // (1 if precision.tensor_cores else 2)
        dtype = getattr(torch, precision.dtype)
        torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
        left, right = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
        rates[precision] = 2 * rows**3 / fastest(partial(torch.matmul, left, right))
    return {
        each.name: Roofline("measured", rates[each], rates[FLOAT32], bandwidth, overhead)
        for each in precisions
    }


def bound(
    config: LayerConfig,
    batch: int,
    precision: Precision,
    rooflines: Mapping[str, Roofline],
    training: bool = False,
) -> float | None:
    """Seconds that arithmetic and memory alone take, no overhead; None without a roofline."""
    roofline = rooflines.get(precision.name)
    if roofline is None:
        return None
    bare = replace(roofline, overhead=NO_OVERHEAD, backward_overhead=None)
    return bare.time(config.cost(batch, itemsize=precision.itemsize, training=training))


def relative_error(product: object, exact: object) -> float:
    """Error of a product relative to its largest entry, both as arrays of NumPy."""
    import numpy as np

    left, right = np.asarray(product, "float64"), np.asarray(exact, "float64")
    return float(np.abs(left - right).max() / np.abs(right).max())

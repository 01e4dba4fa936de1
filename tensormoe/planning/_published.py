"""Rooflines that makers publish: peaks per device and dtype, from their data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tensormoe._validation import choice
from tensormoe.errors import PlanError
from tensormoe.planning._roofline import Roofline

DTYPES = ("float32", "tfloat32", "bfloat16", "float16", "float64")
"""Dtypes of products; ``tfloat32`` is float32 whose products tensor cores round to TF32."""

# starting a kernel takes a few microseconds on every current GPU
_OVERHEAD = 5e-6


@dataclass(frozen=True)
class _DataSheet:
    """Figures of one device: TFLOP/s of dense products, and GB/s.

    Args:
        matmul: by dtype; float32 is that of the vector units, or of matrix units that do not round.
        vector: of elementwise work, in float32 and in float64; narrower dtypes are computed in
            float32.
        bandwidth: of memory.
        link: to a neighbour, in one direction.
    """

    matmul: Mapping[str, float]
    vector: tuple[float, float]
    bandwidth: float
    link: float


def _rates(
    float32: float,
    float64: float,
    float16: float,
    bfloat16: float | None = None,
    tfloat32: float | None = None,
) -> dict[str, float]:
    found = {
        "float32": float32,
        "tfloat32": tfloat32,
        "bfloat16": bfloat16,
        "float16": float16,
        "float64": float64,
    }
    return {name: rate for name, rate in found.items() if rate is not None}


# Each with the title of the maker's document. Rates printed with sparsity alone are halved.
# Float64 of T4 is 1/32 of float32 (CUDA C++ Programming Guide, arithmetic instructions), that of
# L4, L40S and RTX 4090 1/64 (NVIDIA Ada GPU Architecture). Links are NVLink, Infinity Fabric, or
# PCIe 3 and 4 of 16 lanes.
_SHEETS: Mapping[str, _DataSheet] = {
    "t4": _DataSheet(  # NVIDIA T4 Tensor Core GPU, data sheet
        _rates(8.1, 0.253, 65.0), (8.1, 0.253), 320, 16
    ),
    "v100": _DataSheet(  # NVIDIA V100 Tensor Core GPU, data sheet, SXM2
        _rates(15.7, 7.8, 125.0),
        (15.7, 7.8),
        900,
        150,
    ),
    "a100": _DataSheet(  # NVIDIA A100 Tensor Core GPU, data sheet, 80 GB SXM
        _rates(19.5, 19.5, 312.0, 312.0, 156.0),
        (19.5, 9.7),
        2039,
        300,
    ),
    "l4": _DataSheet(  # NVIDIA L4 Tensor Core GPU, data sheet
        _rates(30.3, 0.473, 121.0, 121.0, 60.0),
        (30.3, 0.473),
        300,
        32,
    ),
    "l40s": _DataSheet(  # NVIDIA L40S, data sheet
        _rates(91.6, 1.43, 362.05, 362.05, 183.0),
        (91.6, 1.43),
        864,
        32,
    ),
    # products that are summed in float32, as libraries sum them
    "rtx4090": _DataSheet(  # NVIDIA Ada GPU Architecture, appendix A
        _rates(82.6, 1.29, 165.2, 165.2, 82.6),
        (82.6, 1.29),
        1008,
        32,
    ),
    "h100": _DataSheet(  # NVIDIA H100 Tensor Core GPU, data sheet, SXM
        _rates(67.0, 67.0, 989.5, 989.5, 494.5),
        (67.0, 34.0),
        3350,
        450,
    ),
    "h200": _DataSheet(  # NVIDIA H200 Tensor Core GPU, data sheet, SXM
        _rates(67.0, 67.0, 989.5, 989.5, 494.5),
        (67.0, 34.0),
        4800,
        450,
    ),
    "b200": _DataSheet(  # NVIDIA Blackwell Architecture Technical Brief, HGX B200
        _rates(80.0, 40.0, 2250.0, 2250.0, 1100.0),
        (80.0, 40.0),
        8000,
        900,
    ),
    "mi300x": _DataSheet(  # AMD Instinct MI300X Accelerator, data sheet
        _rates(163.4, 163.4, 1307.4, 1307.4, 653.7),
        (163.4, 81.7),
        5300,
        448,
    ),
}

# one current server core pair: what a laptop or a CI machine has; ten-gigabit Ethernet
_CPU = {
    "float32": Roofline("cpu", 1.5e11, 1.5e10, 5e10, 5e-6, 3e9, 1e-5, 1.25e9),
    "float64": Roofline("cpu, float64", 7.5e10, 7.5e9, 5e10, 5e-6, 3e9, 1e-5, 1.25e9),
}
_NAMES = (*_SHEETS, "cpu")


def published_roofline(name: str, dtype: str = "float32") -> Roofline:
    """A device's published peaks, for layers of one dtype.

    Rates are those of dense products. Data sheets: T4, V100 (SXM2), A100 (80 GB, SXM), L4, L40S,
    H100 and H200 (SXM), MI300X; white papers: RTX 4090 ("NVIDIA Ada GPU Architecture") and B200
    ("NVIDIA Blackwell Architecture Technical Brief", HGX). ``cpu`` is a rough two-core machine.

    Args:
        name: of the device, a key of :data:`PUBLISHED_ROOFLINES`.
        dtype: ``"float32"``, which nothing rounds; ``"tfloat32"``, float32 whose products tensor
            cores round to TF32; ``"bfloat16"``, ``"float16"`` or ``"float64"``.

    Raises:
        PlanError: an unknown device or dtype, or a dtype that the device has no units for.

    >>> from tensormoe.planning import published_roofline
    >>> [published_roofline("a100", each).matmul_rate / 1e12 for each in ("float32", "tfloat32")]
    [19.5, 156.0]
    """
    choice(name, _NAMES, "name of a published roofline", PlanError)
    choice(dtype, DTYPES, "dtype", PlanError)
    sheet = _SHEETS.get(name)
    known = tuple(_CPU if sheet is None else sheet.matmul)
    if dtype not in known:
        raise PlanError(
            f"dtype must be one that {name} has units for, {', '.join(known)}; got {dtype!r}. "
            "Choose one of them, or another device."
        )
    if sheet is None:
        return _CPU[dtype]
    single, double = sheet.vector
    return Roofline(
        name if dtype == "float32" else f"{name}, {dtype}",
        sheet.matmul[dtype] * 1e12,
        (double if dtype == "float64" else single) * 1e12,
        sheet.bandwidth * 1e9,
        _OVERHEAD,
        link_bandwidth=sheet.link * 1e9,
    )


PUBLISHED_ROOFLINES: Mapping[str, Roofline] = MappingProxyType(
    {name: published_roofline(name) for name in _NAMES}
)
"""Peaks in float32 that makers publish, by device; :func:`published_roofline` has the other dtypes.
Measure your own with ``tensormoe calibrate``."""

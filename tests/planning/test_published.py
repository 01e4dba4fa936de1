"""Published rooflines: a rate per dtype, as makers print it, and none that a device lacks."""

from __future__ import annotations

from typing import Any

import pytest

from tensormoe import CP, LayerSpec
from tensormoe.errors import PlanError
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline, published_roofline

GPUS = ("t4", "v100", "a100", "l4", "l40s", "rtx4090", "h100", "h200", "b200", "mi300x")
ROUNDED = ("tfloat32", "bfloat16", "float16")


def test_devices() -> None:
    assert tuple(PUBLISHED_ROOFLINES) == (*GPUS, "cpu")
    for name, found in PUBLISHED_ROOFLINES.items():
        assert found == published_roofline(name) == published_roofline(name, "float32")
        assert found.name == name
        assert found.link_bandwidth


def test_float32_is_never_rounded() -> None:
    """Products of float32 run at the rate of the vector units, and TF32 is a dtype of its own."""
    for name in GPUS:
        plain = published_roofline(name)
        assert plain.matmul_rate == plain.elementwise_rate, name
        for dtype in ROUNDED:
            if dtype == "float16" or name not in ("t4", "v100"):
                found = published_roofline(name, dtype)
                slowest = plain.matmul_rate if name == "rtx4090" else 1.9 * plain.matmul_rate
                assert found.matmul_rate >= slowest, (name, dtype)
                # elementwise work is in float32
                assert found.elementwise_rate == plain.elementwise_rate
                assert found.name == f"{name}, {dtype}"


@pytest.mark.parametrize(
    ("name", "dtype", "matmul"),
    [
        ("a100", "tfloat32", 156e12),
        ("a100", "bfloat16", 312e12),
        ("a100", "float64", 19.5e12),
        ("h100", "float32", 67e12),
        ("h100", "bfloat16", 989.5e12),  # 1,979 with sparsity
        ("l4", "float16", 121e12),  # 242 with sparsity
        ("b200", "bfloat16", 2250e12),
        ("mi300x", "bfloat16", 1307.4e12),
        ("v100", "float16", 125e12),
        ("cpu", "float64", 7.5e10),
    ],
)
def test_figures_of_data_sheets(name: str, dtype: str, matmul: float) -> None:
    assert published_roofline(name, dtype).matmul_rate == pytest.approx(matmul)


def test_half_of_the_bytes_on_tensor_cores_is_faster() -> None:
    spec = LayerSpec(4096, 4096, 64, CP(2048))
    wide, narrow = published_roofline("h200"), published_roofline("h200", "bfloat16")
    rounded = published_roofline("h200", "tfloat32")
    times = [
        wide.time(spec.cost(8192)),
        rounded.time(spec.cost(8192)),
        narrow.time(spec.cost(8192, itemsize=2)),
    ]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", ["t4", "v100"])
@pytest.mark.parametrize("dtype", ["bfloat16", "tfloat32"])
def test_a_dtype_that_a_device_lacks(name: str, dtype: str) -> None:
    rule = (
        f"dtype must be one that {name} has units for, float32, float16, float64; got '{dtype}'. "
        "Choose one of them, or another device."
    )
    with pytest.raises(PlanError) as caught:
        published_roofline(name, dtype)
    assert str(caught.value) == rule


@pytest.mark.parametrize("junk", ["abacus", "A100", None, 3, ["a100"], b"a100"])
def test_names_that_cannot_be(junk: Any) -> None:
    with pytest.raises(PlanError, match="name of a published roofline must be one of 't4', "):
        published_roofline(junk)
    with pytest.raises(PlanError, match="dtype must be one of 'float32', "):
        published_roofline("a100", junk)


def test_profiles_are_plain_values() -> None:
    for dtype in ("float32", "float64"):
        found = published_roofline("mi300x", dtype)
        assert Roofline.from_dict(found.to_dict()) == found

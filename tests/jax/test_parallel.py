"""Layers that are cut over devices: one device's results, and only the predicted communication.

With ``TENSORMOE_DISTRIBUTED=1``, every factorization also on 4 and 8 devices, which takes minutes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests._python import run_python

HERE = Path(__file__).resolve().parent
WIDE = bool(os.environ.get("TENSORMOE_DISTRIBUTED"))
KINDS = (
    *("cp", "tensor_ring", "tensor_train", "tucker", "low_rank", "shared_basis", "base_delta"),
    *("shared_delta", "hadamard", "dense"),
)
NAMES = [
    *(f"{kind} on 2 devices" for kind in KINDS),
    "tensor_ring by the compiler",
    *(f"two {kind} axes" for kind in ("automatic", "explicit")),
    "explicit axes, rows on both",
    "explicit axes, the same rows everywhere",
    "inside of a shard_map",
    "a slice of the input, inside of a shard_map",
    "types that say something else",
    "chosen experts",
    "rows that are sorted by expert",
    "embeddings",
    "ten training steps",
    "batches of any shape, of 16 bits, under transformations",
    "tensor_ring block",
    "gated hadamard block",
    *(f"block of 8 devices, gated {gated}" for gated in (False, True)),
    "slices of both halves",
    *(f"blocks on two {kind} axes" for kind in ("automatic", "explicit")),
    "blocks inside of a shard_map",
    "ten training steps of a gated block",
    "an activation of its own",
    "sparse mixture, leg hidden",
    "what is refused",
    "a model of Flax",
    "a model of Flax, made under jit, on explicit axes",
    "a model of Equinox",
    "one sum in a block of each framework",
    "embeddings of each framework",
    "orbax",
    "files",
    "models that are refused",
]
MORE = [
    *(f"{kind} on {count} devices" for kind in KINDS for count in (4, 8)),
    *(f"{kind} by the compiler" for kind in KINDS if kind != "tensor_ring"),
    *(f"{kind} block" for kind in KINDS if kind != "tensor_ring"),
    *(f"gated {kind} block" for kind in KINDS if kind != "hadamard"),
    *(f"sparse mixture, leg {leg}" for leg in ("n0", "r")),
    *(f"soft mixture, leg {leg}" for leg in ("hidden", "n0", "r")),
]
ALL = [*NAMES, *(MORE if WIDE else ())]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """All checks in one process, as starting JAX takes longer than most of them."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    script = HERE / "_on_eight_devices.py"
    words = ["wide"] if WIDE else []
    options = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ended = run_python("-W", "error", script, *words, timeout=3600 if WIDE else 1800, **options)
    assert not ended.returncode, ended.stderr
    found: dict[str, str] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("name", ALL)
def test_on_eight_devices(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]


def test_every_check_has_been_looked_at(outcomes: dict[str, str]) -> None:
    assert {*outcomes} == {*ALL}

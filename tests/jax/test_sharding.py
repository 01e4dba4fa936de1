"""Layers on several devices: the single device's results, and no talk between them in the gate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests._python import run_python

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """All checks in one process, as starting JAX takes longer than most of them."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=4"
    script = HERE / "_on_four_devices.py"
    ended = run_python("-W", "error", script, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert not ended.returncode, ended.stderr
    found: dict[str, str] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("shard_map entmax", "shard_map alpha 3", "automatic axes entmax"),
        *(f"explicit axes {gate}" for gate in ("entmax", "sparsemax", "top-k")),
        "leading axes",
        "batch norm",
        "ids and chosen experts",
        "blocks and modules",
    ],
)
def test_on_four_devices(name: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[name], outcomes[name]


def test_every_check_has_been_looked_at(outcomes: dict[str, str]) -> None:
    assert len(outcomes) == 10

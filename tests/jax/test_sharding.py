"""Layers on several devices: the single device's results, and no talk between them in the gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """All checks in one process, as starting JAX takes longer than most of them."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
    }
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "_on_four_devices.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
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

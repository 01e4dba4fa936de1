"""Layers that are cut over devices: one device's results, and only the predicted communication."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests._python import run_python

HERE = Path(__file__).resolve().parent
WIDE = bool(os.environ.get("TENSORMOE_DISTRIBUTED"))
KINDS = (
    *("cp", "tensor_ring", "tensor_train", "tucker", "shared_basis", "base_delta"),
    *("shared_delta", "hadamard", "dense"),
)

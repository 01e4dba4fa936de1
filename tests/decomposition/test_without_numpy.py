"""Error messages where NumPy is not installed."""

from __future__ import annotations

import pytest

from tests._python import run_python

SCRIPT = """
import sys

# as where it is not installed
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")
import torch
from tensormoe.decomposition import decompose, error_curves
from tensormoe.errors import MissingDependencyError

for call in (
    lambda weights: decompose(weights, "cp", rank=2),
    lambda weights: error_curves(weights, ["cp"]),
):
    try:
        call(torch.ones(4, 8, 6))
    except MissingDependencyError as error:
        print(error)
"""


def test_decompose_says_what_to_install() -> None:
    """With PyTorch alone: small problems are solved on the host, by NumPy's LAPACK."""
    pytest.importorskip("torch")
    done = run_python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "decompose needs numpy, which is not installed" in line
        assert "pip install 'tensormoe[numpy]'" in line

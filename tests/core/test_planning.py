"""Planning works where no array library can be imported."""

from __future__ import annotations

import pytest

from tests._python import run_python

PLAN = """
import sys

for name in ("cupy", "jax", "jaxlib", "numpy", "scipy", "torch"):
    sys.modules[name] = None  # importing it now fails as if it weren't installed

from tensormoe import CP, BaseDelta, Dense, Hadamard, LayerSpec, LowRank, SharedBasis, SharedDelta
from tensormoe import TensorRing, TensorTrain, Tucker

spec = LayerSpec(16, 12, experts=(6, 5), factorization={factorization})
spec.cost(32)
print(spec.plan(32).describe())
"""


@pytest.mark.parametrize(
    "factorization",
    [
        "CP(rank=4)",
        "TensorRing(rank=(2, 3, 4, 5))",
        "TensorTrain(rank=(2, 3, 4))",
        "Tucker(rank=(2, 3, 4, 5))",
        "Hadamard()",
        "SharedBasis((2, 3))",
        "LowRank(2)",
        "BaseDelta(2)",
        "SharedDelta(2)",
        "Dense()",
    ],
)
def test_plans_and_costs_need_no_array_library(factorization: str) -> None:
    done = run_python("-W", "error", "-c", PLAN.format(factorization=factorization))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

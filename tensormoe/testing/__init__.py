"""Prove a model, a factorization or a backend of your own: oracle, strategies, contract suites.

Everything compares with independent code: TensorLy's reconstructions and plain ``numpy.einsum`` in
float64. Coefficients are random, sparse and different for each token; uniform ones would not see a
permuted expert axis.

- A *model*: :func:`reconstruct` and :func:`reference_output` say what a layer must return, and
  :func:`assert_output` compares.
- A *factorization*: subclass :class:`FactorizationContract`.
- A *backend*: subclass :class:`BackendContract`.

The contract suites are classes for pytest whose tests draw their examples with Hypothesis; the
active Hypothesis profile decides how many.

>>> import numpy as np
>>> from tensormoe.testing import assert_output
>>> from tensormoe_numpy import MuMoE
>>> layer = MuMoE(6, 4, experts=(3, 2), factorization="tensor_ring", rank=3, dtype="float64")
>>> x = np.random.default_rng(0).standard_normal((5, 6))
>>> factors, coefficients = layer.factors, layer.coefficients(x)
>>> assert_output(layer(x), layer.spec.factorization, factors, coefficients, x)

The module needs NumPy, pytest, Hypothesis and TensorLy: ``pip install 'tensormoe[testing]'``.
"""

from __future__ import annotations

from tensormoe._extras import missing

if absent := missing("tensormoe.testing", ("numpy", "pytest", "hypothesis", "tensorly"), "testing"):
    raise absent

import pytest

# so that a failed assertion of a contract shows its values, as one in a test file does
pytest.register_assert_rewrite(
    "tensormoe.testing._backend_contract",
    "tensormoe.testing._comparison",
    "tensormoe.testing._factorization_contract",
    "tensormoe.testing._layer_checks",
)

from tensormoe.testing._backend_contract import BackendContract as BackendContract  # noqa: E402
from tensormoe.testing._comparison import TOLERANCES as TOLERANCES  # noqa: E402
from tensormoe.testing._comparison import assert_close as assert_close  # noqa: E402
from tensormoe.testing._comparison import assert_output as assert_output  # noqa: E402
from tensormoe.testing._factorization_contract import (  # noqa: E402
    FactorizationContract as FactorizationContract,
)
from tensormoe.testing._oracle import reconstruct as reconstruct  # noqa: E402
from tensormoe.testing._oracle import reconstruct_by_einsum as reconstruct_by_einsum  # noqa: E402
from tensormoe.testing._oracle import reference_output as reference_output  # noqa: E402
from tensormoe.testing._strategies import batch_shapes as batch_shapes  # noqa: E402
from tensormoe.testing._strategies import coefficients as coefficients  # noqa: E402
from tensormoe.testing._strategies import dtypes as dtypes  # noqa: E402
from tensormoe.testing._strategies import factorizations as factorizations  # noqa: E402
from tensormoe.testing._strategies import factors as factors  # noqa: E402
from tensormoe.testing._strategies import gates as gates  # noqa: E402
from tensormoe.testing._strategies import inputs as inputs  # noqa: E402
from tensormoe.testing._strategies import sizes as sizes  # noqa: E402
from tensormoe.testing._strategies import specs as specs  # noqa: E402

__all__ = [
    "TOLERANCES",
    "BackendContract",
    "FactorizationContract",
    "assert_close",
    "assert_output",
    "batch_shapes",
    "coefficients",
    "dtypes",
    "factorizations",
    "factors",
    "gates",
    "inputs",
    "reconstruct",
    "reconstruct_by_einsum",
    "reference_output",
    "sizes",
    "specs",
]

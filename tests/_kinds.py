"""One of each factorization, and gates of every activation and normalization.

Nothing here needs an array library.
"""

from __future__ import annotations

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Factorization,
    Gate,
    Hadamard,
    LowRank,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)

DELTAS: list[Factorization] = [BaseDelta(2), SharedDelta(2)]
"""Sums of two networks."""

_OTHERS: list[Factorization] = [*DELTAS, Hadamard(), Dense()]

KINDS: list[Factorization] = [
    CP(3),
    TensorRing(3),
    TensorTrain(3),
    Tucker(2),
    LowRank(3),
    SharedBasis((2, 3)),
    *_OTHERS,
]
"""For any number of levels."""

UNEVEN: list[Factorization] = [
    CP(3),
    TensorRing((2, 3, 2, 3)),
    TensorTrain((2, 3, 4)),
    Tucker((2, 3, 2, 3)),
    LowRank(3),
    SharedBasis((2, 3)),
    *_OTHERS,
]
"""For two levels, with bonds of different sizes."""

LARGE: list[Factorization] = [
    CP(12),
    TensorRing(4),
    TensorTrain(4),
    Tucker(5),
    LowRank(5),
    SharedBasis(5),
    *_OTHERS,
]
"""For any number of levels, with bonds that count in what a layer costs."""

ABLE: list[Factorization] = [
    CP(12),
    TensorRing((2, 2, 8)),
    TensorTrain((4, 8)),
    Tucker((4, 8, 8)),
    LowRank(4),
    SharedBasis((2, 4)),
    *_OTHERS,
]
"""For one level of eight experts that learn two maps of three features."""

ONE_LEVEL: list[Factorization] = [
    CP(4),
    TensorRing((2, 3, 2)),
    TensorTrain((3, 4)),
    Tucker((3, 4, 5)),
    LowRank(2),
    SharedBasis((2, 3)),
    BaseDelta(2),
]
"""For one level, with bonds of different sizes; those that are searched for."""

GATES = [
    Gate(),
    Gate(alpha=1.25, bias=True),
    Gate("sparsemax", normalization=None),
    Gate("softmax", normalization=None, bias=True),
    Gate("top_k", k=2),
    Gate("relu_top_k", k=2, bias=True),
    Gate(normalization="batch", bias=True),
]
"""Every activation and every normalization."""

"""Every mixture in every framework: one function, one file format, one set of rules."""

from __future__ import annotations

from typing import Any, ClassVar

from tensormoe import CP, TensorRing
from tensormoe.mixtures import sparse_config
from tensormoe.routing import Router
from tests.mixtures._contract import MixtureContract


def _sparse(hidden: int | None = None, **options: Any) -> Any:
    kind = "linear" if hidden is None else "swiglu"
    return sparse_config(6, hidden, 5, **{"experts": 4, "top_k": 2, "kind": kind} | options)


class TestSparseMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "swiglu": _sparse(7, shared_features=3, bias=True),
        "linear, cp, capacity": _sparse(
            factorization=CP(3), router=Router(bias=True, capacity=1.0, scale=2.0), top_k=3
        ),
        "mlp, ring, balance": _sparse(
            7,
            kind="mlp",
            factorization=(TensorRing((2, 3, 2)), CP(4)),
            router=Router("sigmoid", balance=0.01),
        ),
        "noise": _sparse(router=Router(noise=1.0, renormalize=False), top_k=1),
    }
    other = _sparse(experts=3, top_k=1)
    compiled = ("swiglu", "mlp, ring, balance")

"""Every mixture in every framework: one function, one file format, one set of rules."""

from __future__ import annotations

from typing import Any, ClassVar

from tensormoe import CP, TensorRing
from tensormoe.mixtures import cartesian_config, soft_config, sparse_config
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
        "mixed with a shared expert": _sparse(7, kind="mlp", shared_features=3, mix_shared=True),
        "merged": _sparse(
            7, experts=3, top_k=2, router=Router(balance=0.01), groups=(0, 2, 0, 1, 2)
        ),
    }
    other = _sparse(experts=3, top_k=1)
    compiled = ("swiglu", "mlp, ring, balance", "mixed with a shared expert", "merged")


def _soft(hidden: int | None = None, **options: Any) -> Any:
    kind = "linear" if hidden is None else "mlp"
    return soft_config(6, hidden, 5, **{"experts": 4, "kind": kind} | options)


class TestSoftMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "mlp": _soft(7, slots=2, bias=True),
        "swiglu, ring, cp": _soft(
            7, kind="swiglu", factorization=(TensorRing((2, 3, 2)), CP(4)), bias=True
        ),
        "linear, noise": _soft(normalize=False, noise=1.0),
    }
    other = _soft(experts=3)
    compiled = ("mlp", "swiglu, ring, cp")


def _cartesian(**options: Any) -> Any:
    return cartesian_config(6, 7, **{"experts": 4, "top_k": 2} | options)


class TestCartesianMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "swiglu, shared": _cartesian(shared_features=3),
        "mlp, ring and cp, balance, pre-norm": _cartesian(
            kind="mlp",
            factorization=(TensorRing((2, 3, 2)), CP(4)),
            router=Router("sigmoid", balance=0.01),
            pre_norm=True,
            bias=True,
        ),
        "noise": _cartesian(router=Router(noise=1.0, bias=True), shared_features=2),
    }
    other = _cartesian(experts=3, top_k=1)
    compiled = ("swiglu, shared", "mlp, ring and cp, balance, pre-norm")

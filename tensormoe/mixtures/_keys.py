"""Logits of experts that are numbered by one index per level: product keys, or one projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod, sqrt
from typing import Any

from tensormoe._mixture import OwnArray, checked_fields
from tensormoe._validation import flag, positive_int, positive_ints
from tensormoe.backend import Array, Backend
from tensormoe.errors import GateError, SpecError
from tensormoe.functional._dtypes import widened
from tensormoe.mixtures._parts import Parts
from tensormoe.routing import Router
from tensormoe.routing._product import check_product_router

MOST = 2**31 - 1
"""Largest number of experts: numbers must fit the smallest integers that libraries count with."""

_EPS = 1e-5


@dataclass(frozen=True)
class Keys:
    """Rule from tokens to one array of logits per level, for each of several heads.

    With ``key_features``, each head has a query per level, a linear function of the token, and a
    logit is the product of a query with the expert's sub-key (Lample et al. 2019). Without, logits
    are linear functions of the token.

    Args:
        in_features: size of a token.
        experts: N_e of each level.
        heads: H, each with a choice of its own.
        key_features: size of a query and of a sub-key; None for logits that are projected from
            the token.
        share_keys: whether all heads have the same sub-keys.
        query_norm: whether queries are normalized to mean zero and variance one, each by itself.
        router: rule from logits to experts.

    Raises:
        SpecError: sizes that cannot be, or more than 2³¹ - 1 experts.
        GateError: a router with a bias, balance or capacity.
    """

    in_features: int
    experts: tuple[int, ...]
    heads: int
    key_features: int | None
    share_keys: bool
    query_norm: bool
    router: Router

    def __post_init__(self) -> None:
        for name in ("in_features", "heads"):
            object.__setattr__(self, name, positive_int(getattr(self, name), name))
        sizes = positive_ints(self.experts, "experts", "level")
        object.__setattr__(self, "experts", sizes)
        if prod(sizes) > MOST:
            raise SpecError(
                f"experts must have a product of at most {MOST}; got {prod(sizes)} of {sizes}. "
                "Lower the sizes of levels."
            )
        if self.key_features is not None:
            key = positive_int(self.key_features, "key_features")
            object.__setattr__(self, "key_features", key)
        flag(self.share_keys, "share_keys")
        flag(self.query_norm, "query_norm")
        check_product_router(self.router)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.experts)

    @property
    def num_experts(self) -> int:
        """Product of the levels' sizes."""
        return prod(self.experts)

    @cached_property
    def own(self) -> dict[str, OwnArray]:
        """The arrays by canonical name."""
        span, key = 1.0 / sqrt(self.in_features), self.key_features
        if key is None:
            return {
                f"router.projection_{level}": OwnArray(
                    (self.in_features, self.heads * size), "uniform", span
                )
                for level, size in enumerate(self.experts)
            }
        width = self.heads * self.levels * key
        arrays = {"router.query": OwnArray((self.in_features, width), "uniform", span)}
        for level, size in enumerate(self.experts):
            shape = (size, key) if self.share_keys else (self.heads, size, key)
            arrays[f"router.keys_{level}"] = OwnArray(shape, "normal", 1.0 / sqrt(key))
        return arrays

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        """Shape of the noise of all levels, one behind the other; None for none."""
        return (*tokens, self.heads, sum(self.experts)) if self.router.noise else None

    def split(self, noise: Array) -> list[Array]:
        """The noise of each level."""
        starts = [sum(self.experts[:level]) for level in range(self.levels)]
        return [
            noise[..., start : start + size]
            for start, size in zip(starts, self.experts, strict=True)
        ]

    def logits(self, parts: Parts, x: Array) -> list[Array]:
        """Logits (tokens, heads, N_e) per level of tokens (tokens, in), in float32 at least."""
        backend, tokens = parts.backend, x.shape[0]
        wide = widened(x, backend)
        arrays = {name: widened(parts.arrays[name], backend) for name in self.own}
        if self.key_features is None:
            return [
                backend.reshape(
                    backend.matmul(wide, arrays[f"router.projection_{level}"]),
                    (tokens, self.heads, size),
                )
                for level, size in enumerate(self.experts)
            ]
        queries = backend.matmul(wide, arrays["router.query"])
        shape = tokens, self.heads, self.levels, self.key_features
        queries = backend.reshape(queries, shape)
        if self.query_norm:
            queries = _standardized(queries, backend)
        return [
            self._matched(queries[:, :, level, :], arrays[f"router.keys_{level}"], backend)
            for level in range(self.levels)
        ]

    def _matched(self, queries: Array, keys: Array, backend: Backend) -> Array:
        """Products (tokens, heads, N_e) of the queries of a level with its sub-keys."""
        tokens, heads, key = queries.shape
        if self.share_keys:
            flat = backend.reshape(queries, (tokens * heads, key))
            found = backend.matmul(flat, backend.permute(keys, (1, 0)))
            return backend.reshape(found, (tokens, heads, keys.shape[0]))
        by_head = backend.permute(queries, (1, 0, 2))
        found = backend.matmul(by_head, backend.permute(keys, (0, 2, 1)))
        return backend.permute(found, (1, 0, 2))

    def with_noise(self, training: bool, noise: Array | None, backend: Backend) -> Array | None:
        """The noise that training needs, None for none.

        Raises:
            GateError: it is needed and not there.
        """
        if not training or not self.router.noise:
            return None
        if noise is None:
            raise GateError(
                f"a router with noise={self.router.noise} needs a source of random numbers in "
                "training; got none. Pass one, a key for instance, or train a router without noise."
            )
        return widened(noise, backend)

    def arguments(self) -> str:
        """Arguments of a constructor that give these keys, for ``repr``."""
        return (
            f"heads={self.heads}, key_features={self.key_features}, share_keys={self.share_keys}, "
            f"query_norm={self.query_norm}, router={self.router!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints store them."""
        return {
            "in_features": self.in_features,
            "experts": list(self.experts),
            "heads": self.heads,
            "key_features": self.key_features,
            "share_keys": self.share_keys,
            "query_norm": self.query_norm,
            "router": self.router.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Keys:
        """The inverse of :meth:`to_dict`.

        Raises:
            SpecError, GateError: a value is missing, unknown or cannot be.
        """
        fields = {
            "in_features",
            "experts",
            "heads",
            "key_features",
            "share_keys",
            "query_norm",
            "router",
        }
        found = dict(checked_fields(values, fields, "set of keys"))
        found["router"] = Router.from_dict(found["router"])
        experts = found["experts"]
        found["experts"] = tuple(experts) if isinstance(experts, list) else experts
        return cls(**found)


def _standardized(x: Array, backend: Backend) -> Array:
    """Rows of mean zero and variance one, as layer norm makes them, without a scale of its own."""
    xp = backend.namespace
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + _EPS)

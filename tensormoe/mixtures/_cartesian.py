"""Cartesian product of experts: two sparse mixtures, the second on the outputs of the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._validation import brief, flag, is_number
from tensormoe.backend import Array, Backend
from tensormoe.errors import SpecError
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import Across
from tensormoe.mixtures._parts import Parts
from tensormoe.mixtures._sparse import SparseConfig
from tensormoe.planning import Cost, Library, StepCost
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import CartesianRoutes, Routes

HALVES = ("first", "second")
"""Names of the two mixtures in the whole."""

# of one entry: a square, a sum, and two products
_NORM_FLOPS = 4


@dataclass(frozen=True)
class CartesianConfig(MixtureConfig):
    """A Cartesian product of experts without its arrays.

    Args:
        half: each of the two sparse mixtures, which have arrays of their own.
        pre_norm: whether the input is normalized before the first half.
        eps: what is added to mean squares.

    Raises:
        SpecError: inputs and outputs of other sizes, or values that cannot be.
    """

    half: SparseConfig
    pre_norm: bool = False
    eps: float = 1e-6

    block: ClassVar[str] = "CartesianMoE"

    def __post_init__(self) -> None:
        flag(self.pre_norm, "pre_norm")
        if not is_number(self.eps) or not (self.eps > 0 and isfinite(self.eps)):
            raise SpecError(f"eps must be a positive number; got {brief(self.eps)}. Use 1e-6.")
        if self.half.in_features != self.half.out_features:
            raise SpecError(
                f"out_features must equal in_features={self.half.in_features}, as outputs of the "
                f"first half are added to the input; got {self.half.out_features}. Leave it out."
            )

    @property
    def in_features(self) -> int:
        return self.half.in_features

    @property
    def out_features(self) -> int:
        return self.half.out_features

    @property
    def num_experts(self) -> int:
        """Pairs of sub-experts, N²."""
        return self.half.experts.num_experts**2

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        return _of_both(self.half.layers)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms."""
        return ("first_norm", "second_norm") if self.pre_norm else ("second_norm",)

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        norms = {f"{name}.weight": OwnArray((self.in_features,), "ones") for name in self.norms}
        return norms | _of_both(self.half.own)

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        return _of_both(self.half.buffer_shapes())

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        shape = self.half.noise_shape(*tokens)
        return None if shape is None else (len(HALVES), *shape)

    def compose(
        self,
        x: Array,
        norm: Callable[[str, Array], Array],
        half: Callable[[str, Array], Array],
    ) -> Array:
        """Outputs (tokens, out): ``m + second(norm(x + m))`` with ``m = first(x)``.

        Args:
            x: (tokens, in).
            norm: normalizes rows, by the name of the norm.
            half: runs a half, by its name.
        """
        made = half("first", norm("first_norm", x) if self.pre_norm else x)
        return made + half("second", norm("second_norm", x + made))

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[CartesianRoutes, dict[str, Array]]:
        _, routes, changed = self._forward(parts, x, training, noise, across, runs=("first",))
        return routes, changed

    def forward(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Array, CartesianRoutes, dict[str, Array]]:
        return self._forward(parts, x, training, noise, across, runs=HALVES)

    def _forward(
        self,
        parts: Parts,
        x: Array,
        training: bool,
        noise: Array | None,
        across: Across | None,
        runs: tuple[str, ...],
    ) -> tuple[Array, CartesianRoutes, dict[str, Array]]:
        """Route both halves, and run those named; the other leaves its input as it is."""
        records: dict[str, Routes] = {}
        changed: dict[str, Array] = {}

        def half(name: str, rows: Array) -> Array:
            inner = parts.under(name)
            records[name], moved = self.half.route(
                inner,
                rows,
                training=training,
                noise=None if noise is None else noise[HALVES.index(name)],
                across=across,
            )
            changed.update({f"{name}.{each}": array for each, array in moved.items()})
            return self.half.run(inner, rows, records[name]) if name in runs else rows

        y = self.compose(x, self._norm(parts), half)
        return y, CartesianRoutes(**records), changed

    def run(self, parts: Parts, x: Array, routes: CartesianRoutes) -> Array:
        def half(name: str, rows: Array) -> Array:
            return self.half.run(parts.under(name), rows, getattr(routes, name))

        return self.compose(x, self._norm(parts), half)

    def _norm(self, parts: Parts) -> Callable[[str, Array], Array]:
        def norm(name: str, rows: Array) -> Array:
            return rms_norm(rows, parts.arrays[f"{name}.weight"], self.eps, parts.backend)

        return norm

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        for name in HALVES:
            self.half.check_routes(getattr(routes, name, None), batch_shape)

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        half = self.half.cost(batch, itemsize=itemsize, library=library, training=training)
        entries = batch * self.in_features
        size = itemsize * entries
        work = _NORM_FLOPS * entries
        steps = [StepCost("norm", 0, work, size, size)] * len(self.norms)
        steps.append(StepCost("add", 0, 2 * entries, 4 * size, 2 * size))
        if training:
            back = StepCost("backward norm", 0, 2 * work, 3 * size, size, backward=True)
            steps += [back] * len(self.norms)
        # the sum and what is made of it are kept beside either half
        held = (2 + self.pre_norm) * size
        whole = half.then(half)
        return Cost(
            whole.parameters + len(self.norms) * self.in_features,
            whole.steps + tuple(steps),
            whole.peak_memory + held + (half.saved_memory if training else 0),
            whole.saved_memory + (held if training else 0),
        )

    def arguments(self) -> str:
        return f"{self.half.arguments()}, pre_norm={self.pre_norm}, eps={self.eps!r}"

    def to_dict(self) -> dict[str, Any]:
        return {"half": self.half.to_dict(), "pre_norm": self.pre_norm, "eps": self.eps}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CartesianConfig:
        found = checked_fields(values, {"half", "pre_norm", "eps"}, "Cartesian mixture")
        return cls(SparseConfig.from_dict(found["half"]), found["pre_norm"], found["eps"])


def rms_norm(x: Array, weight: Array, eps: float, backend: Backend) -> Array:
    """Rows divided by the root of their mean square, times a weight (Zhang and Sennrich 2019).

    Args:
        x: (rows, features).
        weight: (features,).
        eps: what is added to the mean square.
        backend: the adapter of the arrays' library.
    """
    xp: Any = backend.namespace
    wide = widened(x, backend)
    squares = backend.sum(wide * wide, (1,)) / x.shape[-1]
    normed = wide / xp.sqrt(squares + eps)[:, None] * widened(weight, backend)
    return cast(normed, x.dtype, backend)


def _of_both(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a half, for both of them under the names of the whole."""
    return {f"{half}.{name}": value for half in HALVES for name, value in values.items()}

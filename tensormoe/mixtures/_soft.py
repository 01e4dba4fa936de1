"""Soft mixture of experts: every expert runs a few weighted averages of the tokens of a set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf, prod, sqrt
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._validation import brief, flag, is_number, positive_int
from tensormoe.backend import Array, Backend, check_array
from tensormoe.errors import GateError, ShapeError, SpecError
from tensormoe.functional import EachExpert
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import Across
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.mixtures._parts import Parts, layers_of, run_all, run_routed
from tensormoe.mixtures._soft_cost import soft_cost
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import SoftRoutes, select_experts, soft_routes
from tensormoe.routing._soft import most

Routed = Callable[[Array, Array, Array], Array]
"""Outputs (rows, out) for rows (rows, in), numbers (rows, k) of experts and weights (rows, k)."""

EPS = 1e-6
"""Added to the squares of a token, and of a column of Φ, before the root that it is divided by."""


@dataclass(frozen=True)
class SoftConfig(MixtureConfig):
    """A soft mixture without its arrays (Puigcerver et al. 2024).

    Args:
        experts: the experts.
        slots: p, the averages of tokens that each expert runs, per set.
        normalize: whether tokens and the columns of Φ have length one in the logits, times a scale
            that is learned.
        noise: standard deviation of the normal noise that is added to logits in training.

    Raises:
        SpecError: an impossible value.
    """

    experts: ExpertsConfig
    slots: int
    normalize: bool
    noise: float

    block: ClassVar[str] = "SoftMoE"
    mixes_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", positive_int(self.slots, "slots"))
        flag(self.normalize, "normalize")
        if not is_number(self.noise) or not 0 <= self.noise < inf:
            raise SpecError(
                f"noise must be a number that is not negative; got {brief(self.noise)}. Use 0 for "
                "none."
            )

    @property
    def in_features(self) -> int:
        return self.experts.in_features

    @property
    def out_features(self) -> int:
        return self.experts.out_features

    @property
    def num_experts(self) -> int:
        """N."""
        # no cached property, which locks on first use: compilers cannot follow that
        return prod(self.experts.down.experts)

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        return layers_of("experts", self.experts)

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        shape = self.in_features, self.num_experts, self.slots
        arrays = {"router.projection": OwnArray(shape, "normal", 1.0 / sqrt(self.in_features))}
        # one axis, as fully_shard takes no scalars
        return arrays | ({"router.scale": OwnArray((1,), "ones")} if self.normalize else {})

    def plan_ahead(self) -> None:
        for layer in self.layers.values():
            layer.plan_ahead()
            _ = layer.each_regimes

    def merged_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        if not batch_shape:
            raise ShapeError(
                f"x must have shape (..., tokens, {self.in_features}), as tokens of a set are mixed"
                f"; got ({self.in_features},). Add an axis of one token."
            )
        return super().merged_shape(batch_shape)

    def noise_shape(self, *tokens: int) -> tuple[int, ...] | None:
        return (*tokens, self.num_experts, self.slots) if self.noise else None

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
        mask: Array | None = None,
    ) -> tuple[SoftRoutes, dict[str, Array]]:
        """The routing record of sets of tokens; no buffers change.

        Args:
            parts: arrays of the mixture.
            x: (sets, tokens, in), finite also where a token does not count.
            training: whether noise is added.
            noise: standard normal (sets, tokens, N, p), in training with noise.
            across: not used.
            mask: (sets, tokens), which tokens count; all by default.

        Raises:
            GateError: noise that is needed and not given, or logits that are NaN where the backend
                checks values.
        """
        backend = parts.backend
        tokens = widened(x, backend)
        phi = widened(parts.arrays["router.projection"], backend)
        phi = backend.reshape(phi, (self.in_features, -1))
        if self.normalize:
            scale = widened(parts.arrays["router.scale"], backend)
            tokens, phi = _unit(tokens, -1, backend), _unit(phi, 0, backend) * scale
        shape = *x.shape[:2], self.num_experts, self.slots
        logits = backend.reshape(backend.matmul(tokens, phi), shape)
        if training and self.noise:
            if noise is None:
                raise GateError(
                    f"noise={self.noise} needs a source of random numbers in training; got none. "
                    "Pass one, a key for instance, or train without noise."
                )
            logits = logits + self.noise * widened(noise, backend)
        return soft_routes(logits, mask=mask, backend=backend), {}

    def run(self, parts: Parts, x: Array, routes: SoftRoutes) -> Array:
        backend = parts.backend
        sets, _, count, p = routes.combine.shape
        slots = _slots(routes.dispatch, x, backend)
        slots = backend.reshape(slots, (sets, count, p, self.in_features))
        slots = backend.permute(slots, (1, 0, 2, 3))
        slots = backend.reshape(slots, (count, sets * p, self.in_features))
        made = run_all(self.experts, parts, "experts", slots, EachExpert())
        made = backend.reshape(made, (count, sets, p, self.out_features))
        made = backend.permute(made, (1, 0, 2, 3))
        made = backend.reshape(made, (sets, count * p, self.out_features))
        return _combined(routes.combine, made, x, backend)

    def select(
        self,
        parts: Parts,
        x: Array,
        routes: SoftRoutes,
        k: int,
        scores: Array | None = None,
        routed: Routed | None = None,
    ) -> Array:
        """Outputs of k experts of each set alone: those of the largest combine weights.

        Args:
            parts: runs the layers.
            x: (sets, tokens, in).
            routes: what :meth:`route` returned for them.
            k: experts to run, from 1 to N.
            scores: (sets, N) by which experts are chosen instead.
            routed: as for :meth:`run_selected`.

        Raises:
            GateError: k is out of range.
        """
        backend = parts.backend
        if scores is None:
            index = select_experts(routes.combine, k, backend=backend)
        else:
            index = most(scores, k, backend)
        return self.run_selected(parts, x, routes, index, routed)

    def run_selected(
        self,
        parts: Parts,
        x: Array,
        routes: SoftRoutes,
        index: Array,
        routed: Routed | None = None,
    ) -> Array:
        """Outputs of some experts of each set alone (Chung et al. 2025); no others are run.

        Combine weights stay as they are: those of the experts left out are missing in the sum.

        Args:
            parts: runs the layers.
            x: (sets, tokens, in).
            routes: what :meth:`route` returned for them.
            index: (sets, k) numbers of the experts, each at most once in a set.
            routed: runs experts as :func:`run_routed` does, for a framework that calls a module.
        """
        backend = parts.backend
        xp = backend.namespace
        sets, tokens, count, p = routes.combine.shape
        k = index.shape[1]
        if k == count:
            return self.run(parts, x, routes)
        chosen = xp.broadcast_to(index[:, None, :, None], (sets, tokens, k, p))
        dispatch, combine = (
            xp.take_along_axis(each, chosen, axis=2) for each in (routes.dispatch, routes.combine)
        )
        rows = backend.reshape(_slots(dispatch, x, backend), (sets * k * p, self.in_features))
        expert = backend.reshape(
            xp.broadcast_to(index[:, :, None], (sets, k, p)), (sets * k * p, 1)
        )
        ones = xp.ones_like(backend.stop_gradient(rows[:, :1]))
        if routed is None:
            made = run_routed(self.experts, parts, "experts", rows, expert, ones)
        else:
            made = routed(rows, expert, ones)
        made = backend.reshape(made, (sets, k * p, self.out_features))
        return _combined(combine, made, x, backend)

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        shape = *batch_shape, self.num_experts, self.slots
        for name in ("logits", "dispatch", "combine"):
            found = getattr(getattr(routes, name, None), "shape", None)
            if found is None or tuple(found) != shape:
                raise ShapeError(
                    f"routes must be the record of these tokens and this layer, with {name} of "
                    f"shape {shape}; got {None if found is None else tuple(found)}. Pass what "
                    "route(x) returned."
                )

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
        sets: int = 1,
    ) -> Cost:
        """Cost of one call for ``batch`` tokens, in ``sets`` sets of one size.

        Raises:
            SpecError: tokens that cannot be divided into so many sets.
        """
        return soft_cost(
            self.experts,
            self.slots,
            self.num_parameters,
            batch,
            positive_int(sets, "sets"),
            itemsize=itemsize,
            library=library,
            training=training,
        )

    def arguments(self) -> str:
        return (
            f"{self.experts.arguments()}, slots={self.slots}, normalize={self.normalize}, "
            f"noise={self.noise}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "experts": self.experts.to_dict(),
            "slots": self.slots,
            "normalize": self.normalize,
            "noise": self.noise,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SoftConfig:
        names = {"experts", "slots", "normalize", "noise"}
        found = checked_fields(values, names, "soft mixture")
        experts = ExpertsConfig.from_dict(found["experts"])
        return cls(experts, found["slots"], found["normalize"], found["noise"])


def counting_tokens(
    x: Array, mask: Array | None, batch_shape: tuple[int, ...], backend: Backend
) -> tuple[Array, Array | None]:
    """Tokens (sets, tokens, in) with zeros where they do not count, and the mask merged likewise.

    Args:
        x: (sets, tokens, in).
        mask: (..., tokens) booleans, or None.
        batch_shape: (..., tokens) of the input.
        backend: the adapter of the arrays' library.

    Raises:
        BackendError: a mask of another library.
        ShapeError: a mask that does not have one boolean per token.
    """
    if mask is None:
        return x, None
    xp = backend.namespace
    check_array(mask, backend, "mask")
    if tuple(mask.shape) != batch_shape or not xp.isdtype(mask.dtype, "bool"):
        raise ShapeError(
            f"mask must be booleans of shape {batch_shape}, one per token; got {mask.dtype} "
            f"{tuple(mask.shape)}. Compare it with zero, or reshape it."
        )
    merged = backend.reshape(mask, tuple(x.shape[:2]))
    # zero times infinity is not zero: padding may be anything
    return xp.where(merged[:, :, None], x, xp.zeros_like(x[:1, :1])), merged


def _unit(array: Array, axis: int, backend: Backend) -> Array:
    xp = backend.namespace
    return array / xp.sqrt(xp.sum(array * array, axis=axis, keepdims=True) + EPS)


def _slots(dispatch: Array, x: Array, backend: Backend) -> Array:
    """Averages (sets, slots, in) of tokens, for weights (sets, tokens, experts, p)."""
    sets, tokens, experts, p = dispatch.shape
    weights = backend.reshape(cast(dispatch, x.dtype, backend), (sets, tokens, experts * p))
    return backend.matmul(backend.permute(weights, (0, 2, 1)), x)


def _combined(combine: Array, made: Array, x: Array, backend: Backend) -> Array:
    """Outputs (sets, tokens, out) from those of slots (sets, slots, out)."""
    sets, tokens, experts, p = combine.shape
    weights = backend.reshape(cast(combine, made.dtype, backend), (sets, tokens, experts * p))
    return cast(backend.matmul(weights, made), x.dtype, backend)

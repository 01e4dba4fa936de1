"""Parts of a mixture at work: how a framework runs its layers and holds its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig
from tensormoe.backend import Array, Backend, Groups
from tensormoe.errors import ShapeError
from tensormoe.functional import EachExpert, apply_each, apply_experts
from tensormoe.functional._dtypes import cast, widened
from tensormoe.gates import OneExpert
from tensormoe.mixtures._experts import Act, ExpertsConfig, gated, run_expert
from tensormoe.routing import Routes, by_expert

Given = Array | OneExpert | EachExpert | tuple[OneExpert, ...]
"""Coefficients of a layer of one level, or of each level; or rows for every expert."""

Call = Callable[[str, Array, Given], Array]
"""Runs a layer by its name, on rows (rows, in) and their coefficients.

With ``EachExpert`` for these, rows are (N, rows, in), as many for each expert, or (rows, in), which
every expert runs.
"""


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of the formula of a mixture.

    Args:
        call: runs a layer.
        arrays: the mixture's own arrays by canonical name, and its buffers.
        acts: activations by name.
        backend: the adapter of the arrays' library.
        reads: whether values of arrays can be read in a call, so that shapes may depend on them.
    """

    call: Call
    arrays: Mapping[str, Array]
    acts: Callable[[str], Act]
    backend: Backend
    reads: bool = False

    @classmethod
    def of(
        cls,
        config: MixtureConfig,
        arrays: Mapping[str, Array],
        acts: Callable[[str], Act],
        backend: Backend,
        *,
        reads: bool = False,
    ) -> Parts:
        """Parts of a mixture whose arrays are one flat mapping by canonical name."""

        def call(name: str, x: Array, given: Given) -> Array:
            layer = config.layers[name]
            named = {each: arrays[f"{name}.{each}"] for each in layer.parameter_shapes()}
            if isinstance(given, EachExpert):
                return apply_each(layer, named, x, backend)
            levels = list(given) if isinstance(given, tuple) else [given]
            return apply_experts(layer, named, x, levels, backend)

        return cls(call, arrays, acts, backend, reads)

    def under(self, name: str) -> Parts:
        """The parts of a mixture that is a part of this one."""
        start = f"{name}."

        def call(layer: str, x: Array, given: Given) -> Array:
            return self.call(start + layer, x, given)

        inner = {
            each.removeprefix(start): array
            for each, array in self.arrays.items()
            if each.startswith(start)
        }
        return replace(self, call=call, arrays=inner)

    def logits(self, x: Array, name: str = "router") -> Array:
        """Logits (tokens, N) of a router, in float32 at least.

        Args:
            x: (tokens, in).
            name: what stands before ``.projection`` and ``.bias``.
        """
        wide = widened(x, self.backend)
        logits = self.backend.matmul(wide, widened(self.arrays[f"{name}.projection"], self.backend))
        bias = self.arrays.get(f"{name}.bias")
        return logits if bias is None else logits + widened(bias, self.backend)


def run_routed(
    experts: ExpertsConfig, parts: Parts, name: str, x: Array, index: Array, weights: Array
) -> Array:
    """Outputs (tokens, out) of the experts that each token goes to, weighted and summed.

    Args:
        experts: the experts.
        parts: runs their layers, ``<name>.projections.<role>``.
        name: of the experts among the parts.
        x: (tokens, in).
        index: (tokens, k) numbers of experts.
        weights: (tokens, k).
    """
    backend = parts.backend
    rows = index.shape[0] * index.shape[1]
    return send(
        lambda rows, given: run_all(experts, parts, name, rows, given),
        x,
        index,
        weights,
        experts.num_experts,
        backend,
        sort=isinstance(backend, Groups) and experts.sorts(rows),
    )


def run_all(
    experts: ExpertsConfig, parts: Parts, name: str, x: Array, given: Array | OneExpert | EachExpert
) -> Array:
    """Outputs (rows, out) of experts for rows of their own.

    Args:
        experts: the experts.
        parts: runs their layers.
        name: of the experts among the parts.
        x: (rows, in), or for ``EachExpert`` (N, rows, in) too.
        given: coefficients that name one expert per row, or ``EachExpert``.
    """

    def project(role: str, rows: Array) -> Array:
        return parts.call(f"{name}.projections.{role}", rows, given)

    return run_expert(experts.layers, project, activation(experts, parts.acts), x)


def run_shared(shared: ExpertsConfig, parts: Parts, name: str, x: Array) -> Array:
    """Outputs of an expert that every token runs."""
    ones = parts.backend.namespace.ones_like(parts.backend.stop_gradient(x[:, :1]))
    return run_all(shared, parts, name, x, ones)


def with_shared(routed: Array, shared: Array, mixing: Array | None, backend: Backend) -> Array:
    """Outputs of a shared expert added to those of the chosen ones.

    Args:
        routed: (tokens, out).
        shared: (tokens, out).
        mixing: (tokens, 2) weights of both; None for ones.
        backend: the adapter of the arrays' library.
    """
    if mixing is None:
        return routed + shared
    weights = cast(mixing, routed.dtype, backend)
    return weights[:, :1] * routed + weights[:, 1:] * shared


def activation(experts: ExpertsConfig, acts: Callable[[str], Act]) -> Act:
    """The activation between the layers of experts, of both halves where they are gated."""
    if experts.act_layer is None:
        return _same
    act = acts(experts.act_layer)
    return gated(act) if experts.kind == "swiglu" else act


def _same(x: Array) -> Array:
    return x


def send(
    run: Callable[[Array, OneExpert], Array],
    x: Array,
    index: Array,
    weights: Array,
    experts: int,
    backend: Backend,
    *,
    sort: bool = False,
) -> Array:
    """Send tokens to their experts, and sum the weighted outputs.

    Args:
        run: from rows (rows, in), and which expert each has, to (rows, out).
        x: (tokens, in).
        index: (tokens, k) numbers of experts.
        weights: (tokens, k), in any floating-point dtype.
        experts: N.
        backend: the adapter of the arrays' library.
        sort: whether rows reach ``run`` in the order of their experts, with counts.

    Returns:
        (tokens, out), in the dtype of ``x``.
    """
    tokens, k = index.shape
    if not sort:
        xp = backend.namespace
        each = xp.broadcast_to(x[:, None, :], (tokens, k, x.shape[-1]))
        rows = backend.reshape(each, (tokens * k, x.shape[-1]))
        made = run(rows, OneExpert(backend.reshape(index, (tokens * k,))))
        made = backend.reshape(made, (tokens, k, made.shape[-1]))
        made = made * cast(weights, made.dtype, backend)[..., None]
        return cast(backend.sum(made, (1,)), x.dtype, backend)
    sent = by_expert(index, experts, backend)
    made = run(backend.take(x, sent.token, 0), OneExpert(sent.expert, sent.counts))
    shares = backend.take(backend.reshape(weights, (tokens * k, 1)), sent.order, 0)
    made = made * cast(shares, made.dtype, backend)
    return cast(backend.scatter_add(made, sent.token, 0, tokens), x.dtype, backend)


def check_routes(
    routes: Routes, batch_shape: tuple[int, ...], experts: int, k: int, *, mixed: bool = False
) -> None:
    """Refuse the routing record of other tokens or of another layer.

    Raises:
        ShapeError: arrays of other shapes.
    """
    wanted: dict[str, tuple[int, ...] | None] = {
        "top_k_index": (*batch_shape, k),
        "top_k_weights": (*batch_shape, k),
        "logits": (*batch_shape, experts),
        "scores": (*batch_shape, experts),
        "mixing": (*batch_shape, 2) if mixed else None,
    }
    for name, shape in wanted.items():
        found = getattr(getattr(routes, name, None), "shape", None)
        if (None if found is None else tuple(found)) != shape:
            raise ShapeError(
                f"routes must be the record of these tokens and this layer, with {name} of shape "
                f"{shape}; got {None if found is None else tuple(found)}. Pass what route(x) "
                "returned."
            )


def layers_of(name: str, experts: ExpertsConfig) -> dict[str, LayerConfig]:
    """The layers of experts by their names in a mixture."""
    return {f"{name}.projections.{role}": layer for role, layer in experts.layers.items()}

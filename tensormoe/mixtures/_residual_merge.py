"""A residual mixture merged into what it is added to: by fixed coefficients, or every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend, check_array, device_of
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import Dense
from tensormoe.functional import apply_experts, materialize
from tensormoe.functional._dtypes import cast, widened
from tensormoe.mixtures._residual import ResidualConfig


def fixed_delta(
    config: ResidualConfig,
    parameters: Mapping[str, Array],
    coefficients: Sequence[Array] | Array | None,
    backend: Backend,
) -> tuple[Array, Array | None]:
    """The matrix (in, out) and the bias (out,) that a mixture adds for fixed coefficients.

    Args:
        config: the mixture.
        parameters: its arrays by canonical name, ``factors.input``, ….
        coefficients: (N_e,) per level, the same for all inputs; None for the only expert that
            there is.
        backend: the adapter of the arrays' library.

    Returns:
        Both multiplied by ``scale``, in float32 at least; None for a mixture without a bias.

    Raises:
        BackendError: coefficients of another library.
        ShapeError: coefficients that are not (N_e,) per level.
        SpecError: none given, and more than one expert or a gate whose coefficients are not one.
    """
    xp, layer = backend.namespace, config.layer
    spec = layer.spec
    wide = {
        name: widened(array, backend)
        for name, array in parameters.items()
        if name.startswith("factors.")
    }
    like = next(iter(wide.values()))
    rows = [_fixed(each, backend) for each in _checked(config, coefficients, like, backend)]
    plain = LayerConfig(replace(spec, bias=False), None)
    eye = xp.eye(spec.in_features, dtype=like.dtype, device=device_of(like))
    given = [
        cast(xp.broadcast_to(row, (spec.in_features, row.shape[1])), like.dtype, backend)
        for row in rows
    ]
    weight = config.scale * apply_experts(plain, wide, eye, given, backend)
    if not spec.bias:
        return weight, None
    # an input of zeros leaves the bias
    whole = LayerConfig(spec, None)
    given = [cast(row, like.dtype, backend) for row in rows]
    bias = config.scale * apply_experts(whole, wide, xp.zeros_like(eye[:1]), given, backend)
    return weight, bias[0]


def check_merge(config: ResidualConfig, base: LayerConfig | None) -> None:
    """Refuse a mixture that cannot be merged without coefficients.

    Args:
        config: the mixture.
        base: the experts that it is added to; None for a linear layer.

    Raises:
        SpecError: experts that are not dense, or have no biases where the mixture has; or, on a
            linear layer, more than one expert, or a gate whose coefficients are not one.
    """
    layer = config.layer
    if base is None:
        if layer.spec.num_experts > 1 or (layer.gate is not None and not layer.gate.sums_to_one):
            held = "no gate" if layer.gate is None else repr(layer.gate)
            raise SpecError(
                "a mixture must have fixed coefficients to be merged; got "
                f"{layer.spec.num_experts} expert(s) with {held}. Pass coefficients=…, (N_e,) per "
                "level, the same for all inputs: their mean over some inputs, for instance."
            )
        return
    if not isinstance(base.spec.factorization, Dense):
        raise SpecError(
            "experts must be dense to be merged with what is added to them; got "
            f"{base.spec.factorization!r}. Keep the layer, or add materialize() of base and "
            "adapter."
        )
    if layer.spec.bias and not base.spec.bias:
        raise SpecError(
            "experts must have biases to be merged with a mixture that has; got bias=False of the "
            "base. Make the mixture with bias=False."
        )


def summed(array: Array, added: Array, backend: Backend) -> Array:
    """A weight with what is added to it, in its dtype; summed in the wider one."""
    return cast(widened(array, backend) + added, array.dtype, backend)


def merged_experts(
    config: ResidualConfig,
    base: LayerConfig,
    held: Mapping[str, Array],
    parameters: Mapping[str, Array],
    backend: Backend,
) -> dict[str, Array]:
    """Dense experts W_n + ΔW_n, of a base whose experts are routed as the mixture's are.

    Args:
        config: the mixture.
        base: dense experts without a gate.
        held: their arrays by canonical name.
        parameters: those of the mixture.
        backend: the adapter of the arrays' library.

    Raises:
        SpecError: as :func:`check_merge`.
    """
    check_merge(config, base)
    wide = {
        name: widened(array, backend)
        for name, array in parameters.items()
        if name.startswith("factors.")
    }
    made = dict(held)
    deltas = materialize(config.layer, wide, backend)
    for name, delta in zip(("weight", "bias"), deltas, strict=True):
        if delta is not None:
            key = f"factors.{name}"
            made[key] = summed(held[key], config.scale * delta, backend)
    return made


def _checked(
    config: ResidualConfig,
    coefficients: Sequence[Array] | Array | None,
    like: Array,
    backend: Backend,
) -> list[Array]:
    """Fixed coefficients (N_e,), one array per level."""
    xp, spec = backend.namespace, config.layer.spec
    if coefficients is None:
        check_merge(config, None)
        return [xp.ones((1,), dtype=like.dtype, device=device_of(like)) for _ in spec.experts]
    listed: list[Any] = (
        list(coefficients) if isinstance(coefficients, list | tuple) else [coefficients]
    )
    if len(listed) != spec.levels:
        raise ShapeError(
            f"coefficients must be one array per level, {spec.levels}; got {len(listed)}."
        )
    for level, (each, count) in enumerate(zip(listed, spec.experts, strict=True)):
        check_array(each, backend, f"coefficients of level {level}")
        if tuple(each.shape) != (count,) or not xp.isdtype(each.dtype, "real floating"):
            raise ShapeError(
                f"fixed coefficients must be floats of shape ({count},) at level {level}; got "
                f"{each.dtype} {tuple(each.shape)}. Take a mean over inputs."
            )
    return listed


def _fixed(coefficients: Array, backend: Backend) -> Array:
    return backend.reshape(coefficients, (1, coefficients.shape[0]))

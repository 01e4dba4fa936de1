"""Checks of the arguments of a decomposition."""

from __future__ import annotations

from math import isfinite, prod

from tensormoe._spec import LayerSpec
from tensormoe.backend import Array, Backend
from tensormoe.decomposition._source import Source
from tensormoe.errors import BackendError, RankError, ShapeError
from tensormoe.selection import excess


def checked_weights(weights: Array, backend: Backend) -> None:
    """Refuse what is not a stack of finite matrices.

    Raises:
        ShapeError: fewer than three axes, an empty one, numbers that are not floating-point, NaN
            or infinity; the message names the first expert that has any.
    """
    shape = tuple(weights.shape)
    if len(shape) < 3 or not all(shape):
        raise ShapeError(
            f"weights must have shape (experts…, in, out), none of them 0; got {shape}. Stack the "
            "experts' matrices along the first axis."
        )
    if not backend.namespace.isdtype(weights.dtype, "real floating"):
        raise ShapeError(
            f"weights must be real floating point; got {weights.dtype}. Cast them, quantized ones "
            "times their scale."
        )
    for index, matrix in enumerate(Source(weights, backend).matrices()):
        if not isfinite(_value(backend.namespace.max(backend.namespace.abs(matrix)))):
            raise ShapeError(
                f"weights must be finite; got NaN or infinity in expert {index}, all levels "
                "counted through. Repair or leave out that expert."
            )


def _value(array: Array) -> float:
    """The one entry of an array.

    Raises:
        BackendError: it is not known, as PyTorch's on the meta device and JAX's traced ones.
    """
    try:
        return float(array)
    except (RuntimeError, TypeError) as error:
        raise BackendError(
            f"weights must have values; got arrays without ({type(error).__name__}: {error}). Load "
            "them first, and decompose outside transformations."
        ) from error


def checked_bias(bias: Array, weights: Array, backend: Backend) -> None:
    """Refuse biases that are not the weights'.

    Raises:
        ShapeError: another shape or dtype, or values that are not finite.
    """
    wanted = (*weights.shape[:-2], weights.shape[-1])
    if tuple(bias.shape) != wanted or bias.dtype != weights.dtype:
        raise ShapeError(
            f"bias must have shape (experts…, out) = {wanted} and the weights' dtype "
            f"{weights.dtype}; got {tuple(bias.shape)} and {bias.dtype}."
        )
    if not isfinite(_value(backend.namespace.max(backend.namespace.abs(bias)))):
        raise ShapeError("bias must be finite; got NaN or infinity.")


def checked_bonds(spec: LayerSpec) -> None:
    """Refuse bonds that are larger than any tensor of that shape can need.

    Raises:
        RankError: a bond that is larger.
    """
    for leg, most in excess(spec).items():
        raise RankError(
            f"rank must be at most {most} in bond {leg!r} of {spec.factorization!r} for weights of "
            f"shape {(*spec.experts, spec.in_features, spec.out_features)}; got "
            f"{spec.network.sizes[leg]}. More has nothing to stand for; lower it, or give a budget."
        )


def checked_samples(
    inputs: Array | None, coefficients: Array | None, weights: Array, backend: Backend
) -> Array | None:
    """Coefficients (samples, N), all levels flattened; None without any.

    Raises:
        ShapeError: no samples, or shapes that do not fit the weights or one another.
    """
    features = weights.shape[-2]
    if inputs is None:
        raise ShapeError("coefficients need inputs; got coefficients alone. Pass inputs=… too.")
    if inputs.ndim != 2 or inputs.shape[1] != features or not inputs.shape[0]:
        raise ShapeError(
            f"inputs must have shape (samples, in) with in = {features}; got "
            f"{tuple(inputs.shape)}. Merge their leading axes."
        )
    if coefficients is None:
        return None
    count, experts = inputs.shape[0], tuple(weights.shape[:-2])
    if tuple(coefficients.shape) not in ((count, *experts), (count, prod(experts))):
        raise ShapeError(
            f"coefficients must have shape (samples, experts…) = {(count, *experts)}; got "
            f"{tuple(coefficients.shape)}. Rows are the inputs'."
        )
    return backend.reshape(coefficients, (count, prod(experts)))

"""Upcycling: initial values from a linear layer, so that every expert starts as that layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, prod

from tensormoe._config import LayerConfig
from tensormoe.backend import Array, Backend, device_of
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import INPUT, Draw, Factor, Network, expert_carriers
from tensormoe.functional._dtypes import cast, widened
from tensormoe.functional._weights import expert_weight

__all__ = ["SVD", "checked_noise", "upcycle"]

SVD = Callable[[Array], "tuple[Array, Array, Array]"]
"""From a matrix to U (rows, k), the falling singular values (k,), and Vᵀ (k, columns)."""


def upcycle(
    config: LayerConfig,
    weight: Array,
    bias: Array | None,
    backend: Backend,
    svd: SVD,
    normal: Draw,
    noise: float = 0.0,
) -> tuple[dict[str, Array], float, float]:
    """Factors with which every expert equals a linear layer ``y = x W + b``.

    Coefficients that sum to one make a mixture that equals the linear layer whatever its gate says;
    a gate of another kind (``Gate.sums_to_one``) is refused by the functions above this one. The
    bias is a row of the input mode, so W and b are one table (in + 1, out). Where the bonds do not
    admit its rank, the experts equal its truncated singular value decomposition, the nearest table
    of that rank (Eckart and Young 1936).

    With ``noise`` the experts differ. Noise on the experts of a level sums to zero, so that the
    mean of all experts, which is what a fresh gate of any kind but top-k mixes, stays as it was.
    Without any, all experts get equal gradients and never part.

    Args:
        config: the layer.
        weight: W (in, out).
        bias: b (out,), or None: a layer with a bias then starts with one of zero.
        backend: adapter of the arrays' library.
        svd: the thin singular value decomposition of a matrix.
        normal: draws standard normal arrays of a shape, in float32 or the weight's wider dtype;
            called only for noise.
        noise: root mean square of ‖W_n − W‖ / ‖W‖ over the experts, about.

    Returns:
        The factors by canonical name, in the weight's dtype; the relative error of the table before
        noise, as stored; and the norm of the table. Arrays may be views: copy them into the layer.

    Raises:
        ShapeError: weights of another shape than the layer's.
        SpecError: noise that is no share, or a factorization that cannot start this way.
    """
    spec, noise = config.spec, checked_noise(noise)
    _check_shapes(config, weight, bias)
    xp = backend.namespace
    table = widened(weight, backend)
    if spec.bias:
        row = xp.zeros_like(table[0, :]) if bias is None else cast(bias, table.dtype, backend)
        table = xp.concat([table, xp.expand_dims(row, axis=0)], axis=0)
    stored = spec.factorization.upcycled_factors(
        spec.experts,
        spec.in_features,
        table,
        lambda size: _split(svd(table), size, backend),
        backend,
    )
    for term in spec.network.terms:
        if term.bias is not None:
            carrier = term.input_factor
            axis = (slice(None),) * carrier.legs.index(INPUT)
            stored[term.bias.name] = stored[carrier.name][(*axis, -1)]
            stored[carrier.name] = stored[carrier.name][(*axis, slice(None, -1))]
    kept = {name: cast(array, weight.dtype, backend) for name, array in stored.items()}
    error, norm = _error(config, kept, table, backend)
    if noise:
        # as much energy over all levels together as one level would have
        apart = {expert_carriers(spec.network, level) for level in range(spec.levels)}
        share = (1.0 + noise**2) ** (1.0 / len(apart)) - 1.0
        noisy = _moved(config, stored, share, normal, backend)
        kept |= {name: cast(array, weight.dtype, backend) for name, array in noisy.items()}
    return {f"factors.{name}": kept[name] for name in spec.shapes}, error, norm


def checked_noise(noise: float) -> float:
    """``noise`` if it is a finite number that is not negative.

    Raises:
        SpecError: anything else.
    """
    number = isinstance(noise, (int, float)) and not isinstance(noise, bool)
    if not number or not isfinite(noise) or noise < 0:
        raise SpecError(
            f"noise must be a finite number of at least 0; got {noise!r}. Give how far experts "
            "start from the given weights, relative to them: 0.1, for instance."
        )
    return float(noise)


def _check_shapes(config: LayerConfig, weight: Array, bias: Array | None) -> None:
    spec = config.spec
    wanted = (spec.in_features, spec.out_features)
    if tuple(weight.shape) != wanted:
        raise ShapeError(
            f"weight must have the layer's shape (in, out) = {wanted}; got {tuple(weight.shape)}."
        )
    if bias is not None and (not spec.bias or tuple(bias.shape) != wanted[1:]):
        rule = f"have shape {wanted[1:]}" if spec.bias else "be None for a layer without bias"
        raise ShapeError(f"bias must {rule}; got shape {tuple(bias.shape)}.")


def _split(parts: tuple[Array, Array, Array], size: int, backend: Backend) -> tuple[Array, Array]:
    """U√S (rows, size) and √S Vᵀ (size, columns), the best product of inner size ``size``.

    Components without strength, and spare ones beyond the last singular value, are zero on the
    left alone: zeros on both sides would never get a gradient.
    """
    xp = backend.namespace
    left, values, right = parts
    count = min(size, values.shape[0])
    left, values, right = left[:, :count], values[:count], right[:count, :]
    rounding = xp.finfo(values.dtype).eps * max(left.shape[0], right.shape[1])
    mean = xp.sqrt(xp.mean(values))
    usual = xp.where(mean > 0, mean, xp.ones_like(mean))
    scale = xp.where(values > rounding * xp.max(values), xp.sqrt(values), usual)
    left, right = left * (values / scale), right * xp.expand_dims(scale, axis=1)
    if size > count:
        spare = xp.zeros((left.shape[0], size - count), dtype=left.dtype, device=device_of(left))
        left = xp.concat([left, spare], axis=1)
        right = xp.concat([right] * -(-size // count), axis=0)[:size, :]
    return left, right


def _error(
    config: LayerConfig, stored: Mapping[str, Array], table: Array, backend: Backend
) -> tuple[float, float]:
    """Relative error of the first expert as stored, and the norm of the table."""
    xp, spec = backend.namespace, config.spec
    wide = {f"factors.{name}": cast(a, table.dtype, backend) for name, a in stored.items()}
    weight, bias = expert_weight(config, wide, (0,) * spec.levels, backend)
    if bias is not None:
        weight = xp.concat([weight, xp.expand_dims(bias, axis=0)], axis=0)
    # scaled first: squares of tiny or huge weights leave the range of numbers
    top = float(xp.max(xp.abs(table)))
    if top == 0:
        return 0.0, 0.0
    missing, whole = (
        top * float(xp.sqrt(xp.sum((array / top) ** 2))) for array in (table - weight, table)
    )
    return missing / whole, whole


def _expert_axes(factor: Factor, network: Network) -> tuple[int, ...]:
    return tuple(place for place, leg in enumerate(factor.legs) if leg in network.expert_legs)


def _moved(
    config: LayerConfig,
    stored: Mapping[str, Array],
    share: float,
    normal: Draw,
    backend: Backend,
) -> dict[str, Array]:
    """The arrays that set experts apart, with noise that sums to zero over them."""
    xp, network = backend.namespace, config.spec.network
    spreads = config.spec.factorization.expert_noise(network, stored, backend)
    moved = {}
    for factor in network.all_factors:
        if factor.name not in spreads:
            continue
        axes = _expert_axes(factor, network)
        shape = network.shape(factor)
        count = prod(shape[axis] for axis in axes)
        if count == 1:
            continue
        drawn = cast(normal(shape), stored[factor.name].dtype, backend)
        drawn = (drawn - xp.mean(drawn, axis=axes, keepdims=True)) * (count / (count - 1)) ** 0.5
        moved[factor.name] = stored[factor.name] + spreads[factor.name] * (share**0.5 * drawn)
    return moved

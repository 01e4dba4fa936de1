"""A mixture that is added to a frozen layer: its configuration, its start and its formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import checked_fields
from tensormoe._resolve import Options
from tensormoe._validation import brief, instance, is_number, positive_int
from tensormoe.backend import Array, Backend, check_array, device_of
from tensormoe.errors import ShapeError, SpecError
from tensormoe.factorizations import INPUT, OUTPUT, Dense, Draw, Factor, Term
from tensormoe.functional import apply_experts, initial_span, materialize
from tensormoe.functional._dtypes import cast, widened


@dataclass(frozen=True)
class ResidualConfig:
    """A mixture that is added to the outputs of a frozen layer: ``y = base(x) + scale · μMoE(x)``.

    The base is no part of it: it is whatever the model had.

    Args:
        layer: the mixture.
        scale: what its outputs are multiplied by.

    Raises:
        SpecError: not a layer with dense inputs, or a scale that is not a finite number.
    """

    layer: LayerConfig
    scale: float = 1.0

    block: ClassVar[str] = "ResidualExperts"
    """Name of the class of its layers, the same in every framework and in checkpoints."""

    def __post_init__(self) -> None:
        instance(self.layer, LayerConfig, "layer", "a LayerConfig", SpecError)
        if self.layer.indexed_input:
            raise SpecError(
                "an adapter must take what its base takes, arrays (..., in); got one for ids. Put "
                "it around a layer that is no embedding."
            )
        if not is_number(self.scale) or not isfinite(self.scale) or not self.scale:
            raise SpecError(
                f"scale must be a finite number other than 0; got {brief(self.scale)}. PEFT's "
                "lora_alpha is scale=lora_alpha / rank."
            )
        object.__setattr__(self, "scale", float(self.scale))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every trainable array by canonical name: ``adapter.factors.input``, …."""
        return _inside(self.layer.parameter_shapes())

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array that is kept but not trained."""
        return _inside(self.layer.buffer_shapes())

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included; the base has none."""
        return self.layer.num_parameters

    def arguments(self) -> str:
        """Arguments of the constructor behind the base that give this, for ``repr``."""
        spec = self.layer.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        return (
            f"{spec.in_features}, {spec.out_features}, experts={experts}, "
            f"factorization={spec.factorization!r}, bias={spec.bias}, gate={self.layer.gate!r}, "
            f"scale={self.scale}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain values, as checkpoints store it."""
        return {"layer": self.layer.to_dict(), "scale": self.scale}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResidualConfig:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        found = checked_fields(values, {"layer", "scale"}, "residual mixture")
        return cls(LayerConfig.from_dict(found["layer"]), found["scale"])


def residual_config(
    base: object,
    in_features: int | None,
    out_features: int | None,
    options: Options,
    scale: float = 1.0,
) -> ResidualConfig:
    """The configuration of a mixture around a base, whose sizes are read from it where it has some.

    Args:
        base: anything that is called; its ``in_features`` and ``out_features`` are read.
        in_features: size of an input, of a base that does not say it.
        out_features: size of an output, likewise.
        options: of the mixture.
        scale: what its outputs are multiplied by.

    Raises:
        SpecError: a base that is not called, sizes that it does not have or nobody knows, or
            options that cannot be.
        RankError, BudgetError: as :class:`tensormoe.functional.Options`.

    >>> options = Options(4, "cp", rank=2, bias=False)
    >>> residual_config(lambda x: x, 8, 8, options).num_parameters
    72
    """
    sizes = [
        _size(base, name, given)
        for name, given in (("in_features", in_features), ("out_features", out_features))
    ]
    return ResidualConfig(options.layer(*sizes), scale)


def check_base(config: ResidualConfig, base: object) -> None:
    """Refuse a base that is not called, or says other sizes than the mixture's.

    Raises:
        SpecError: it does.
    """
    spec = config.layer.spec
    _size(base, "in_features", spec.in_features)
    _size(base, "out_features", spec.out_features)


def _size(base: object, name: str, given: int | None) -> int:
    """A size that is given, or that the base says."""
    if not callable(base):
        raise SpecError(
            f"base must be a layer, called with arrays (..., in); got {brief(base)}. Pass the "
            "module itself."
        )
    own = getattr(base, name, None)
    own = own if isinstance(own, int) and not isinstance(own, bool) else None
    if given is None and own is None:
        raise SpecError(
            f"{name} must be given for a base that does not say it; got None for a "
            f"{type(base).__name__}. Pass {name}=…."
        )
    size = own if given is None else positive_int(given, name)
    if own is not None and size != own:
        raise SpecError(
            f"{name} must be the base's own, {own}; got {size}. Leave {name} out to take it from "
            "the base, or take the base that the mixture was made for."
        )
    assert size is not None
    return size


def start_at_zero(
    config: LayerConfig, arrays: Mapping[str, Array], uniform: Draw, backend: Backend
) -> dict[str, Array]:
    """Initial values with which a mixture's outputs are zero, and its first step moves it.

    Of every term of the network one factor is zero, and no others: the derivative by it is not.
    It is one that tells no expert from another, an output factor where there is a choice, so that
    experts differ in what they start from. Dense experts are one factor each, all zero: with equal
    coefficients they would get equal gradients for ever, so that their gate starts like
    ``torch.nn.Linear`` instead of at zero.

    Args:
        config: the mixture.
        arrays: initial values by canonical name, as of any layer.
        uniform: draws arrays uniform on [-1, 1) of a shape.
        backend: the adapter of the arrays' library.

    Returns:
        The arrays that change, by canonical name.
    """
    xp, network = backend.namespace, config.spec.network
    changed: dict[str, Array] = {}
    for term in network.terms:
        chosen = _zero_of(term)
        names = [chosen.name]
        if term.bias is not None and chosen == term.input_factor:
            names.append(term.bias.name)
        for name in names:
            key = f"factors.{name}"
            changed[key] = xp.zeros_like(arrays[key])
    alive = {
        leg
        for factor in network.factors
        if f"factors.{factor.name}" not in changed
        for leg in factor.legs
    }
    for name in config.parameter_shapes():
        level = name.rpartition("projection_")[2]
        if not name.startswith("gate.projection_") or network.expert_legs[int(level)] in alive:
            continue
        if not initial_span(config, name):
            span = 1.0 / sqrt(config.spec.in_features)
            like = arrays[name]
            changed[name] = span * cast(uniform(tuple(like.shape)), like.dtype, backend)
    return changed


def add_residual(
    config: ResidualConfig, y: Array, made: Array, batch_shape: tuple[int, ...], backend: Backend
) -> Array:
    """Outputs (..., out) of the base and the mixture together, in the dtype of the base's.

    Args:
        config: the mixture.
        y: what the base returned.
        made: (..., out), what the mixture returned.
        batch_shape: leading axes of the input.
        backend: the adapter of the arrays' library.

    Raises:
        BackendError: the base returned no array of the library.
        ShapeError: the base's outputs are not (..., out).
    """
    check_array(y, backend, "the base's output")
    wanted = *batch_shape, config.layer.spec.out_features
    if tuple(y.shape) != wanted:
        raise ShapeError(
            f"the base must return {wanted} for inputs (..., {config.layer.spec.in_features}); got "
            f"{tuple(y.shape)}. Give the mixture the base's own sizes."
        )
    return y + cast(made if config.scale == 1.0 else config.scale * made, y.dtype, backend)


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


def _zero_of(term: Term) -> Factor:
    """The factor of a term that starts at zero."""

    def order(factor: Factor) -> tuple[bool, bool, bool]:
        tells = {leg for leg in factor.legs if leg.startswith("n")}
        others = {leg for each in term.factors if each != factor for leg in each.legs}
        writes = OUTPUT in factor.legs and INPUT not in factor.legs
        # experts must differ in what is left; then output factors, as LoRA's
        return not tells <= others, not writes, bool(tells)

    return min(term.factors, key=order)


def _inside(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"adapter.{name}": shape for name, shape in shapes.items()}

"""A mixture that is added to a frozen layer: its configuration and its formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import checked_fields
from tensormoe._resolve import Options
from tensormoe._validation import brief, instance, is_number, positive_int
from tensormoe.backend import Array, Backend, check_array
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional._dtypes import cast


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


def add_residual(config: ResidualConfig, y: Array, made: Array, backend: Backend) -> Array:
    """Outputs (..., out) of the base and the mixture together, in the dtype of the base's.

    Args:
        config: the mixture.
        y: what the base returned.
        made: (..., out), what the mixture returned.
        backend: the adapter of the arrays' library.

    Raises:
        BackendError: the base returned no array of the library.
        ShapeError: the base's outputs are not (..., out).
    """
    check_array(y, backend, "the base's output")
    wanted = tuple(made.shape)
    if tuple(y.shape) != wanted:
        raise ShapeError(
            f"the base must return {wanted} for inputs (..., {config.layer.spec.in_features}); got "
            f"{tuple(y.shape)}. Give the mixture the base's own sizes."
        )
    return y + cast(made if config.scale == 1.0 else config.scale * made, y.dtype, backend)


def _inside(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"adapter.{name}": shape for name, shape in shapes.items()}

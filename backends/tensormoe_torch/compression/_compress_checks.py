"""Checks of a compression in place, before any work."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tensormoe import LayerSpec
from tensormoe._rounding import checked_bits_or_auto
from tensormoe._validation import instance
from tensormoe.compression import Calibration
from tensormoe.compression._bits import layer_bytes
from tensormoe.decomposition._several import Choice
from tensormoe.errors import RankError, SpecError
from tensormoe.factorizations import resolve_factorization
from tensormoe.selection import Allocation
from tensormoe_torch.compression._calibrate import module_identity
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._gather import first_values
from tensormoe_torch.surgery._allocated import layer_of
from tensormoe_torch.surgery._replace import at


def check_calibration(
    model: nn.Module,
    calibration: Calibration | None,
    weighted: bool,
    weighting: str,
    expert_weights: str,
) -> None:
    """Refuse a calibration of another model, or words without one.

    Raises:
        SpecError, CheckpointError: there is one, or there are.
    """
    if calibration is None:
        if (weighting, expert_weights) != ("inputs", "equal"):
            raise SpecError(
                "weighting and expert_weights need a calibration; got none. Pass calibration=…."
            )
        return
    instance(calibration, Calibration, "calibration", "a Calibration or None", SpecError)
    if weighted:
        raise SpecError("one of weighted and calibration must be given; got both. Leave one out.")
    calibration.check_model(module_identity(model), f"this {type(model).__name__}")


def calibrated_layer(
    source: DenseExperts, role: str, calibration: Calibration | None
) -> tuple[Calibration, str] | None:
    """The calibration, and its name of a layer whose weights it was gathered with.

    Raises:
        CheckpointError: other weights, or no such layer.
    """
    if calibration is None:
        return None
    layer = calibration.find(source.name)
    calibration.check_values(layer, role, first_values(source, role).numpy())
    return calibration, layer


def check_bits(source: DenseExperts, bits: int | str | None) -> None:
    """Refuse bits that no factors of these experts have.

    Raises:
        SpecError: there are such.
    """
    checked_bits_or_auto(bits)
    dtype = source.dtype
    if bits == 16 and dtype.itemsize != 2:
        raise SpecError(
            f"{source.name!r}: 16 bits are of models in bfloat16 or float16; got {dtype}. Convert "
            "the model first, or take 8 bits."
        )


def check_sizes(
    source: DenseExperts,
    kinds: Mapping[str, Choice],
    rank: int | tuple[int, ...] | None,
    bits: int | None,
) -> None:
    """Refuse, before any work, factors that are larger than what they stand for.

    Raises:
        RankError: they are; or bonds that do not fit.
    """
    for role in source.roles:
        kind = resolve_factorization(kinds[role], rank)  # type: ignore[arg-type]
        with at(f"{source.name}.{role}"):
            rows, columns, bias = source.own_sizes(role)
            spec = LayerSpec(rows, columns, (source.count,), kind, bias=bias)
            dense = source.count * (rows + bias) * columns
            parameters, itemsize = spec.num_parameters, source.dtype.itemsize
            size = layer_bytes(spec, bits, itemsize)
            if bits is not None and size > itemsize * dense:
                raise RankError(
                    f"factors must have no more bytes than the weights, {itemsize * dense:,}; "
                    f"{kind} of {bits} bits has {size:,}. Lower the rank, or give a budget."
                )
            if bits is None and parameters > dense:
                raise RankError(
                    f"factors must have no more entries than the weights, {dense:,}; {kind} has "
                    f"{parameters:,}. Lower the rank, or give a budget."
                )


def kinds_of(source: DenseExperts, factorization: Choice | Allocation) -> Mapping[str, Choice]:
    """The factorization of each projection.

    Raises:
        SpecError: an allocation for experts of other sizes or another number.
    """
    if not isinstance(factorization, Allocation):
        return dict.fromkeys(source.roles, factorization)
    sizes = {role: source.own_sizes(role)[:2] for role in source.roles}
    layer = layer_of(factorization, source.name, sizes)
    if layer.site.experts != source.count:
        raise SpecError(
            f"an allocation must have as many experts as the model; {source.name!r} has "
            f"{source.count}, the allocation {layer.site.experts}. Allocate anew for this model."
        )
    roles = (each.role for each in layer.site.projections)
    return dict(zip(roles, layer.factorizations, strict=True))

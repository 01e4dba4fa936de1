"""Controls of a compression, and which of them lose less at about as many bytes.

Truncated singular value decompositions have no more parameters than the factors; rounding the
experts themselves to 8 or 4 bits takes the bytes that it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormoe._rounding import BITS, stored_bytes
from tensormoe.decomposition._controls import verdict
from tensormoe.decomposition._in_bits import in_bits
from tensormoe.decomposition._moments import relative

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tensormoe.compression._calibrated import CalibratedGroup
    from tensormoe.compression._measure import GroupReport

ABOUT = 1.2
"""Of the factors' bytes, up to which a control counts as about as large."""


@dataclass(frozen=True)
class Rounding:
    """The experts of a group themselves, rounded to the nearest.

    Args:
        bits: of each entry.
        nbytes: that they would take, scales included.
        error: relative Frobenius error of the weights.
        output_error: of the outputs, as of a :class:`GroupReport`.
        predicted_loss: the same of the model's loss.
    """

    bits: int
    nbytes: int
    error: float
    output_error: float | None = None
    predicted_loss: float | None = None


def roundings(
    stack: NDArray[Any], dtype: str, itemsize: int, calibrated: CalibratedGroup | None
) -> tuple[Rounding, ...]:
    """The experts (experts, in, out) in every number of bits, one expert at a time.

    Args:
        stack: in the working dtype.
        dtype: of the group, and of the scales.
        itemsize: bytes of an entry of it.
        calibrated: what a calibration says of the group.
    """
    found = []
    for bits in BITS:

        def pairs(bits: int = bits) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
            for matrix in stack:
                yield matrix, matrix - in_bits(matrix, bits, dtype)[2]

        squares = ((float((b**2).sum()), float((a**2).sum())) for a, b in pairs())
        off = None if calibrated is None else calibrated.lost(pairs())
        found.append(
            Rounding(
                bits,
                stored_bytes(stack.shape, bits, itemsize),
                relative(squares),
                None if off is None else off.output_error,
                None if off is None else off.predicted_loss,
            )
        )
    return tuple(found)


def verdicts(groups: Sequence[GroupReport]) -> Iterator[str]:
    """Sentences about controls that lose less; one that says so where none does."""
    quiet = True
    beaten = [each for each in groups if each.closer is not None]
    if beaten:
        quiet = False
        worst = max(beaten, key=_times)
        assert worst.closer is not None
        yield (
            f"truncated SVDs are closer at no more parameters in {len(beaten)} of "
            f"{len(groups)} groups; {worst.name}: {verdict(worst.closer, worst.error)}"
        )
    known = [each for each in groups if each.rounding and each.factorization != "dense"]
    for place, bits in enumerate(BITS) if known else ():
        pairs = [(each, each.rounding[place]) for each in known]
        mine, theirs = (sum(e.nbytes for e in side) for side in zip(*pairs, strict=True))
        less = sum(_lost(rounded) < _lost(each) for each, rounded in pairs)
        if theirs > ABOUT * mine or 2 * less <= len(pairs):
            continue
        quiet = False
        whole = sum(each.dense_bytes for each in known)
        yield (
            f"rounding the experts themselves to {bits} bits takes {theirs / whole:.1%} of their "
            f"bytes, factors {mine / whole:.1%}, and loses less in {less} of {len(pairs)} groups"
            f"{_compared([rounded for _, rounded in pairs], known)}: --factorization dense --bits "
            f"{bits}"
        )
    asked = [each for each in groups if each.controls or each.rounding]
    if quiet and asked:
        yield "neither truncated SVDs of as many parameters nor rounding to as many bytes is closer"


def _lost(each: GroupReport | Rounding) -> float:
    """Number by which two forms of a group are compared."""
    if each.predicted_loss is not None:
        return each.predicted_loss
    return each.error if each.output_error is None else each.output_error


def _compared(rounded: Iterable[Rounding], factors: Iterable[GroupReport]) -> str:
    """Sums of predicted losses, where they are known."""
    sums = []
    for side in (rounded, factors):
        listed = [each.predicted_loss for each in side]
        if None in listed:
            return ""
        sums.append(sum(each for each in listed if each is not None))
    return f", {sums[0]:+.4f} nats per token predicted instead of {sums[1]:+.4f}"


def _times(each: GroupReport) -> float:
    """Error of a group's factors, over that of the closest truncated SVD."""
    assert each.closer is not None
    return each.error / max(each.closer.error, 1e-12)

"""Errors of a group in the dtype that it is stored in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tensormoe._config import LayerConfig
from tensormoe._format import plain_rank
from tensormoe.backend import get_backend
from tensormoe.checkpoint import ArrayInfo
from tensormoe.compression._values import rounded
from tensormoe.compression._verdict import Rounding
from tensormoe.decomposition._controls import EACH, Control, best_joint, closest
from tensormoe.decomposition._errors import shares
from tensormoe.decomposition._norms import norm
from tensormoe.functional import expert_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupReport:
    """Result for a group of experts.

    Errors are Frobenius norms of what is missing, relative to those of the experts, of the numbers
    as the file holds them in its dtype.

    Args:
        name: the experts' key, with a ``*`` for their number.
        file: of the factors, relative to the output folder; None where matrices were written
            instead.
        experts: how many.
        in_features: size of an input.
        out_features: size of an output.
        dtype: of the weights, and of what was written.
        rank: of the factorization, as its class takes it: an integer, or one per bond; None for a
            factorization without rank.
        dense_parameters: entries of the experts.
        parameters: entries of the factors.
        error: of all experts together.
        expert_errors: of each, in the order of their numbers.
        controls: truncated singular value decompositions with no more entries, as of
            :class:`tensormoe.decomposition.Report`; empty if not asked for.
        seconds: that the decomposition took; None where the output was whole before.
        ended: why its search ended, see :class:`tensormoe.decomposition.Report`.
        factorization: name of it; "" in outputs from before it was kept.
        output_error: of the outputs on the calibration's data, as its moments tell; None without a
            calibration.
        predicted_loss: increase of the model's loss if this group alone is compressed, in nats per
            token, see :func:`predicted_loss`; None without gradients in a calibration.
        bits: 8 or 4 of the factors' entries; None for entries of the dtype.
        nbytes: of the factors as they are stored, scales included; also where matrices were
            written instead.
        rounding: the experts themselves in 8 and in 4 bits, to compare with; empty if not asked
            for.
        energy: squared norm that the output error is relative to, or else the error; None in
            results, where nothing is left to choose by it.
    """

    name: str
    file: str | None
    experts: int
    in_features: int
    out_features: int
    dtype: str
    rank: int | tuple[int, ...] | None
    dense_parameters: int
    parameters: int
    error: float
    expert_errors: tuple[float, ...]
    controls: tuple[Control, ...]
    seconds: float | None
    ended: str
    output_error: float | None = None
    predicted_loss: float | None = None
    factorization: str = ""
    bits: int | None = None
    nbytes: int = 0
    rounding: tuple[Rounding, ...] = ()
    energy: float | None = None

    def __post_init__(self) -> None:
        # reports from before there were bits
        if not self.nbytes:
            object.__setattr__(self, "nbytes", self.parameters * self._itemsize)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the experts in their dtype."""
        return self.dense_parameters * self._itemsize

    @property
    def _itemsize(self) -> int:
        return ArrayInfo(self.dtype, ()).nbytes

    @property
    def svd_error(self) -> float | None:
        """Error of the experts' truncated singular value decompositions, one by one, if known."""
        return next((each.error for each in self.controls if each.unfolding == EACH), None)

    @property
    def joint(self) -> Control | None:
        """The best truncated singular value decomposition of all experts together, if known."""
        return best_joint(self.controls)

    @property
    def closer(self) -> Control | None:
        """The best truncated singular value decomposition if it beats the factors; else None."""
        return closest(self.controls, self.error)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values, as JSON knows them."""
        expert_errors = list(self.expert_errors)
        plain = asdict(self) | {"rank": plain_rank(self.rank), "expert_errors": expert_errors}
        if self.energy is None:
            del plain["energy"]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GroupReport:
        """The inverse of :meth:`to_dict`."""
        rank = values["rank"]
        parts = {
            "rank": tuple(rank) if isinstance(rank, list) else rank,
            "expert_errors": tuple(values["expert_errors"]),
            "controls": tuple(Control(**each) for each in values["controls"]),
            "rounding": tuple(Rounding(**each) for each in values.get("rounding", ())),
        }
        return cls(**{**values, **parts})


@dataclass(frozen=True, eq=False)
class Stored:
    """Experts next to what the file gives back for them.

    Args:
        stack: the experts (experts, in, out), in the working dtype.
        config: of the layer.
        factors: by canonical name, in the working dtype, rounded if factors are stored.
        dtype: of the file if matrices are stored; None for factors.
    """

    stack: NDArray[Any]
    config: LayerConfig
    factors: Mapping[str, Any]
    dtype: str | None

    def pairs(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Of every expert its matrix, and what is missing of it."""
        backend = get_backend("numpy")
        for number, matrix in enumerate(self.stack):
            found, _ = expert_weight(self.config, self.factors, (number,), backend)
            if self.dtype is not None:
                found = rounded(found, self.dtype)
            yield matrix, matrix - found

    def energy(self) -> float:
        """Squared norm of the experts."""
        backend = get_backend("numpy")
        return float(sum(norm(matrix, backend) ** 2 for matrix in self.stack))

    def errors(self) -> tuple[float, tuple[float, ...]]:
        """Relative error of all experts, and of each."""
        backend = get_backend("numpy")
        norms = [
            (norm(missing, backend), norm(matrix, backend)) for matrix, missing in self.pairs()
        ]
        missing, whole = zip(*norms, strict=True)
        return shares(missing, whole)

"""A group of experts on disk, and what a calibration says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormoe.compression._calibration import VALUES, Calibration
from tensormoe.compression._folder import place_of
from tensormoe.compression._groups import Group
from tensormoe.compression._identity import checkpoint_identity
from tensormoe.compression._predicted import Lost, Pairs, badness, lost
from tensormoe.compression._settings import Compression
from tensormoe.compression._shards import Model, open_shard
from tensormoe.decomposition import Moments
from tensormoe.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class CalibratedGroup:
    """The statistics of one group.

    Args:
        calibration: of the model.
        layer: the group's in it.
        role: of the projection.
        settings: what errors are weighted by.
    """

    calibration: Calibration
    layer: str
    role: str
    settings: Compression

    @property
    def rows(self) -> int:
        """Tokens times the experts that each went to."""
        return self.calibration.rows(self.layer)

    @property
    def apart(self) -> bool:
        """Whether every expert is weighted by moments of its own inputs."""
        own = self.calibration.apart(self.layer, self.role)
        return own and self.settings.weighting != "none"

    def check(self, stack: NDArray[Any]) -> None:
        """Refuse experts (experts, in, out) that are not the calibrated ones.

        Raises:
            CheckpointError: they are not.
        """
        self.calibration.check_values(self.layer, self.role, stack[:, 0, :VALUES])

    def moments(self, stack: NDArray[Any]) -> Moments | None:
        """Moments that the decomposition is weighted by.

        Args:
            stack: the experts (experts, in, out), which must be the calibrated ones.

        Raises:
            CheckpointError: they are not.
        """
        self.check(stack)
        chosen = self.settings.weighting, self.settings.expert_weights
        return self.calibration.moments(self.layer, self.role, *chosen)

    def lost(self, pairs: Pairs) -> Lost:
        """Error of outputs on the calibration's data, and what that adds to the model's loss."""
        return lost(self.calibration, self.layer, self.role, pairs)

    def judged(self, pairs: Pairs) -> float:
        """Which of several factors are better: the smaller, the better."""
        return badness(self.calibration, self.layer, self.role, pairs)


def check_calibration(model: Model, groups: Iterable[Group], settings: Compression) -> None:
    """Refuse a calibration of another model, or without what is asked of it.

    Raises:
        CheckpointError: another model, or layers and projections that it lacks.
        SpecError: moments that were not gathered.
    """
    if settings.calibration is None:
        return
    calibration = Calibration.load(settings.calibration)
    calibration.check_model(checkpoint_identity(model), model.name)
    for group in groups:
        found = _found(calibration, group, settings)
        sizes = calibration.sizes(found.layer, found.role)
        wanted = (group.experts, group.in_features, group.out_features)
        if any(a not in (None, b) for a, b in zip(sizes, wanted, strict=True)):
            raise CheckpointError(
                f"the calibration must fit {group.name!r}, {' × '.join(map(str, wanted))}; it has "
                f"{' × '.join(map(str, sizes))}. Calibrate this model."
            )
        calibration.check_kept(found.layer, found.role, settings.weighting)


def calibration_identity(settings: Compression) -> dict[str, Any]:
    """A mark that changes with the calibration's file; empty without one."""
    if settings.calibration is None:
        return {}
    return {"calibration_file": open_shard(settings.calibration).identity}


def check_same_calibration(settings: Compression, marks: Mapping[str, Any]) -> None:
    """Refuse a calibration that is not the one that another process has opened.

    Args:
        settings: of the compression.
        marks: of that process, by :func:`calibration_identity`.

    Raises:
        CheckpointError: it is not there, or another one.
    """
    if calibration_identity(settings) != dict(marks):
        raise CheckpointError(
            f"{settings.calibration!r} must be the calibration that the compression began with; it "
            "was changed since."
        )


def calibrated_group(group: Group, settings: Compression) -> CalibratedGroup | None:
    """Part of the calibration that is about a group; None without one.

    Raises:
        CheckpointError: no calibration, or one without the group.
    """
    if settings.calibration is None:
        return None
    return _found(Calibration.load(settings.calibration), group, settings)


def _found(calibration: Calibration, group: Group, settings: Compression) -> CalibratedGroup:
    place = place_of(group)
    if place is None:
        raise CheckpointError(
            f"calibrated groups must be named as projections are; {group.name!r} does not tell "
            "which one it is. Compress it without a calibration."
        )
    return CalibratedGroup(calibration, calibration.find(place.module), place.role, settings)

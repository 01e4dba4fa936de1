"""Response of a model's loss to known errors of its experts, a layer and a side at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormoe.compression import Calibration
from tensormoe.compression._calibration_arrays import side_of
from tensormoe.compression._predicted import lost_to_second_order
from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch.compression._dense import DenseExperts, one_by_one
from tensormoe_torch.compression._samples import Samples, giving
from tensormoe_torch.surgery._inputs import evaluating, run_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEPT = (0.8, 0.35)
"""Shares of directions that inputs keep: errors of a mild compression, and of a strong one."""
SIDES = ("inputs", "hidden")
"""Inputs of gate and up projection, and those of the down projection."""
NARROWED = (*((side,) for side in SIDES), SIDES)
"""Sides of each layer that are measured together: either one alone, and both."""

# tokens from which increases of some thousandths of a nat stand out of their noise
_TOKENS = 2**14
# of the sum of what two sides do alone, what both do at least and at most: the rest is noise
_LEAST, _MOST = 0.5, 2.0
# tokens whose experts run at a time
_BLOCK = 2048


def check_measurable(sources: Sequence[DenseExperts], loss: object) -> None:
    """Refuse to measure what can't be predicted.

    Raises:
        SpecError: no loss, or experts that are called one by one.
    """
    if loss is None:
        raise SpecError(
            "measure needs a loss, whose increase is measured; got none. Give loss=…, such as "
            "next_token_loss."
        )
    for each in sources:
        if not each.together:
            raise SpecError(
                "measure needs experts that are called with their tokens' choices; those of "
                f"{each.name!r} are called one by one, which predicts no loss. Leave measure out."
            )


def measured_places(count: int, tokens: int) -> range:
    """Places of the batches that losses are measured on, evenly among all.

    Args:
        count: of the batches.
        tokens: of all of them.

    >>> measured_places(4, 1000), measured_places(128, 128 * 2048)
    (range(0, 4), range(8, 128, 16))
    """
    step = max(1, min(count, tokens // _TOKENS))
    return range(step // 2, count, step)


def measured_runs(layers: int, count: int, tokens: int) -> int:
    """Batches that a model runs to measure the response of all layers."""
    return len(measured_places(count, tokens)) * (1 + layers * len(NARROWED) * len(KEPT))


@torch.no_grad()
def with_responses(
    calibration: Calibration,
    model: nn.Module,
    sources: Sequence[DenseExperts],
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Tensor],
    done: Callable[[], None],
) -> Calibration:
    """The calibration with the measured response of the loss to errors of each projection.

    Inputs of a layer's first projections, then those of the last one, then both are projected on
    the leading directions of their second moments, while the rest of the model computes what it
    always does. That is an error of the weights, of which
    :func:`tensormoe.compression.predicted_loss` knows what to expect. No weight is touched.

    Args:
        calibration: with gradients.
        model: it runs.
        sources: experts of its layers.
        batches: of the calibration.
        loss: summed over tokens.
        done: called after each batch that ran.

    Raises:
        ShapeError: a loss that is not finite.
    """
    tokens = max(calibration.tokens.values())
    chosen = [batches[place] for place in measured_places(len(batches), tokens)]
    run = _Run(model, chosen, loss, done)
    before = run()
    arrays = dict(calibration.arrays)
    for experts in sources:
        arrays |= _responses(calibration, experts, run, before)
    return replace(calibration, arrays=arrays)


@dataclass(frozen=True, eq=False)
class _Run:
    """Runs of the model on some batches.

    Args:
        model: it runs.
        batches: some.
        loss: summed over tokens.
        done: called after each batch.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss: Callable[[Any, Any], Tensor]
    done: Callable[[], None]

    def __call__(self) -> float:
        """The loss of all batches.

        Raises:
            ShapeError: it is not finite.
        """
        total = 0.0
        with evaluating(self.model):
            for batch in self.batches:
                total += float(self.loss(run_model(self.model, batch), batch))
                self.done()
        if not isfinite(total):
            raise ShapeError(
                f"losses must be finite; got {total} while the response to errors was measured. "
                "Look at the dtype, or leave measure out."
            )
        return total


def _responses(
    calibration: Calibration, experts: DenseExperts, run: _Run, before: float
) -> dict[str, NDArray[Any]]:
    """Predicted and measured increases of every projection of a layer, (points, 2) each."""
    import numpy as np

    layer = experts.name
    directions = {side: _directions(calibration, experts, side) for side in SIDES}
    found: dict[str, list[tuple[float, float]]] = {role: [] for role in experts.stacks}
    for share in KEPT:
        left = {k: v[:, -max(1, round(share * len(v))) :] for k, v in directions.items()}
        increases = {}
        for sides in NARROWED:
            narrow = _Narrow(experts, {side: left[side].float() for side in sides})
            with giving(experts, narrow):
                increases[sides] = (run() - before) / narrow.tokens
        together = _together(increases)
        for side in SIDES:
            roles = [role for role in experts.stacks if side_of(layer, role) == f"{layer}.{side}"]
            predicted = [_predicted(calibration, experts, role, left[side]) for role in roles]
            whole = sum(predicted) or 1.0
            # projections of one side do more together: each gets its share of what they did
            for role, each in zip(roles, predicted, strict=True):
                found[role].append((each, each / whole * together * increases[side,]))
    return {f"{layer}.{role}.response": np.array(points) for role, points in found.items()}


def _together(increases: Mapping[tuple[str, ...], float]) -> float:
    """Increase by errors of both sides, over the sum of increases by either."""
    *alone, both = (increases[sides] for sides in NARROWED)
    if sum(alone) <= 0.0:
        return 1.0
    return min(max(both / sum(alone), _LEAST), _MOST)


def _directions(calibration: Calibration, experts: DenseExperts, side: str) -> Tensor:
    """Eigenvectors of the second moments of all inputs, in the columns, by rising moments."""
    import numpy as np

    # arrays of files are read-only
    moments = torch.from_numpy(np.array(calibration.arrays[f"{experts.name}.{side}"], "float64"))
    found: Tensor = torch.linalg.eigh(moments.to(_device(experts))).eigenvectors
    return found


def _predicted(calibration: Calibration, experts: DenseExperts, role: str, left: Tensor) -> float:
    """Predicted increase where a projection gets inputs on some directions alone."""
    basis = left.cpu().numpy()

    def pairs() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for weight in experts.stacks[role].weights:
            matrix = weight.detach().double().cpu().numpy()
            yield matrix, matrix - basis @ (basis.T @ matrix)

    found = lost_to_second_order(calibration, experts.name, role, pairs()).predicted_loss
    assert found is not None
    return found


def _device(experts: DenseExperts) -> torch.device:
    return experts.stacks["down_proj"].weights[0].device


@dataclass(eq=False)
class _Narrow:
    """The experts of a layer with inputs on some directions alone.

    Args:
        experts: the layer.
        left: by side, orthonormal directions, (features, kept).
        tokens: that came so far.
    """

    experts: DenseExperts
    left: Mapping[str, Tensor]
    tokens: int = 0

    def __call__(self, samples: Samples) -> Tensor:
        """Output of the layer for its tokens, (tokens, out)."""
        self.tokens += len(samples.x)
        parts = []
        arrays = (samples.x, samples.index, samples.weights)
        for x, index, weights in zip(*(each.split(_BLOCK) for each in arrays), strict=True):
            outputs = one_by_one(self._routed, x, index)
            parts.append((outputs * weights.unsqueeze(-1)).sum(dim=1))
        return torch.cat(parts)

    def _routed(self, x: Tensor, index: Tensor) -> Tensor:
        hidden = self._narrowed("hidden", self.experts.hidden(self._narrowed("inputs", x), index))
        return self.experts.stacks["down_proj"].routed(hidden, index)

    def _narrowed(self, side: str, x: Tensor) -> Tensor:
        if side not in self.left:
            return x
        left = self.left[side]
        return (x.to(left.dtype) @ left @ left.T).to(x.dtype)

"""Windows of a text in a random order, over and over, any of which can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import overload

import torch
from torch import Tensor

from tensormoe.errors import SpecError
from tensormoe_torch.compression._healing._processes import Processes


class ShuffledWindows(Sequence[Tensor]):
    """Batches (batch, context) of all steps; every window comes once before any comes again.

    Args:
        windows: (count, context).
        batch: windows per step, of all processes.
        steps: how many batches there are.
        seed: of the order.
        processes: of which this one gets its share.

    Raises:
        SpecError: fewer windows than a batch has.
    """

    def __init__(
        self, windows: Tensor, batch: int, steps: int, seed: int, processes: Processes
    ) -> None:
        processes.check_batch(batch)
        if len(windows) < batch:
            raise SpecError(
                f"the text must have at least one batch of {batch:,} windows; it has "
                f"{len(windows):,} of {windows.shape[1]:,} tokens. Give more text, or a smaller "
                "batch or context."
            )
        self._windows, self._batch, self._steps = windows, batch, steps
        self._processes = processes
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self._seed = seed

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, step: int) -> Tensor: ...
    @overload
    def __getitem__(self, step: slice) -> list[Tensor]: ...
    def __getitem__(self, step: int | slice) -> Tensor | list[Tensor]:
        if isinstance(step, slice):
            return [self[each] for each in range(*step.indices(self._steps))]
        if not -self._steps <= step < self._steps:
            raise IndexError(step)
        first, count = step % self._steps * self._batch, len(self._windows)
        places = range(first, first + self._batch)
        chosen = [int(self._order(place // count)[place % count]) for place in places]
        return self._processes.share(self._windows[chosen])

    def _shuffled(self, turn: int) -> Tensor:
        """The order of all windows the given time."""
        generator = torch.Generator().manual_seed(self._seed + turn)
        return torch.randperm(len(self._windows), generator=generator)

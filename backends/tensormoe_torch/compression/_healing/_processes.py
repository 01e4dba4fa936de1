"""Processes that heal one model together, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensormoe.compression._resume import Work, open_work
from tensormoe.errors import CheckpointError, SpecError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Args:
        rank: its number.
        count: how many there are.
        device: where it has its part.
    """

    rank: int
    count: int
    device: str

    def share(self, batch: Tensor) -> Tensor:
        """This process's windows of a batch."""
        return batch[self.rank :: self.count].to(self.device)

    def check_batch(self, size: int) -> None:
        """Refuse batches that can't be shared out equally.

        Raises:
            SpecError: of another number of windows.
        """
        if size % self.count:
            raise SpecError(
                f"the windows of a batch must be a multiple of the {self.count} processes; got "
                f"{size}."
            )

    def shard(self, model: nn.Module) -> nn.Module:
        """Spread a model over the processes, block by block."""
        if self.count == 1:
            return model
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # sums of gradients in 16 bits would lose what the copies in float32 are kept for
        policy: Any = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        kinds = getattr(model, "_no_split_modules", None) or ()
        for module in [*model.modules()]:
            if type(module).__name__ in kinds:
                fully_shard(module, **policy)
        fully_shard(model, **policy)
        return model

    @contextmanager
    def work(self, output: str | os.PathLike[str], command: Mapping[str, Any]) -> Iterator[Work]:
        """The folder of a command, which the first process opens.

        Raises:
            CheckpointError: as of :func:`open_work`, in all processes.
        """
        if self.count == 1:
            with open_work(output, command) as work:
                yield work
            return
        if self.rank > 0:
            yield self._opened(None)
            return
        try:
            opened = open_work(output, command)
            work = opened.__enter__()
        except Exception as error:
            self._told(str(error))
            raise
        with _leaving(opened):
            self._told(work)
            yield work

    def _told(self, found: Work | str) -> None:
        dist.broadcast_object_list([found])

    def _opened(self, found: Work | str | None) -> Work:
        """A value of the first process, in all of them."""
        told = [found]
        dist.broadcast_object_list(told)
        if not isinstance(told[0], Work):
            raise CheckpointError(str(told[0]))
        return told[0]


@contextmanager
def _leaving(opened: Any) -> Iterator[None]:
    """Leave a context that was entered before."""
    try:
        yield
    except BaseException as error:
        opened.__exit__(type(error), error, error.__traceback__)
        raise
    opened.__exit__(None, None, None)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_available():
        yield Processes(0, 1, device)
        return
    place = device
    if torch.device(device).type != "cpu" and ":" not in device:
        place = f"{device}:{os.environ.get('LOCAL_RANK', '0')}"
        torch.get_device_module(device).set_device(place)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo" if device == "cpu" else None)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if started:
            dist.destroy_process_group()


def first_process() -> bool:
    """Whether this process is the one that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

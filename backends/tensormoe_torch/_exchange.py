"""Experts spread over devices: rows go to the device that has their expert, and come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tensormoe.errors import BackendError, SpecError
from tensormoe.functional import LayerConfig
from tensormoe.gates import OneExpert
from tensormoe.mixtures import send
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._collectives import exchanged
from tensormoe_torch._parts import Boundary, One, Part
from tensormoe_torch._tracing import is_traced

TOGETHER = (
    "experts that are spread over devices must be called together, as experts(hidden_states, "
    "top_k_index, top_k_weights); got {}. Every process makes that call, with its own tokens."
)


@dataclass(frozen=True, eq=False)
class OwnExperts(OneExpert):
    """One expert per row among those that this device has, numbered from zero."""


class ExpertPart(Part):
    """One device's experts of a layer, and a copy of what all experts share.

    Args:
        config: of the part, as ``LayerConfig.shard`` makes it of the experts' leg.
        mesh: of one dimension.
    """

    apart = True

    def __init__(self, config: LayerConfig, mesh: DeviceMesh) -> None:
        super().__init__(config, mesh, inside=True)

    def called(self, config: LayerConfig, given: object) -> LayerConfig:
        """The configuration of the device's experts, which rows of their own alone may meet."""
        if not isinstance(given, OwnExperts):
            raise SpecError(TOGETHER.format("a call of one of their layers"))
        return self.config

    def operands(
        self, held: Mapping[str, Tensor], x: Tensor, given: Sequence[One]
    ) -> tuple[dict[str, Tensor], Tensor, list[Any]]:
        """The device's factors with rows that were sent here."""
        return self.arrays(held), x, [*given]


class Exchange(Boundary):
    """Exchange of rows between devices, each of which has tokens and experts of its own."""

    apart = True

    def enter(self, x: Tensor, axis: int | None = None) -> Tensor:
        """A process's own tokens or weights, as they are."""
        if isinstance(x, DTensor):
            raise BackendError(
                "tokens of experts that are spread over devices must be plain tensors, each "
                f"process's own; got a DTensor, {', '.join(map(str, x.placements))}. Take its "
                "local part, x.to_local()."
            )
        return x

    def leave(self, made: Tensor, like: Tensor, axis: int | None = None) -> Tensor:
        """Outputs of a process's own tokens, as they are."""
        return made

    # how many rows a device gets is not known before, so that compilers cannot follow
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(
        self,
        run: Callable[[Tensor, OwnExperts], Tensor],
        rows: Tensor,
        given: OneExpert,
        sorts: Callable[[Tensor], bool],
    ) -> Tensor:
        """Outputs of rows of this process, made where their experts are.

        Counts are exchanged first, then rows, then outputs: three all-to-alls, two in a backward
        pass. Every process takes part, also with no rows.

        Args:
            run: from rows of any process and which of the device's experts each has, to outputs.
            rows: (rows, in), in the order of their experts.
            given: the experts of the rows, with counts.
            sorts: whether to sort rows that came by expert.
        """
        if torch.compiler.is_exporting() or is_traced(rows):
            raise BackendError(
                "experts that are spread over devices must run eagerly or behind torch.compile; "
                "got a call that torch.export or a transformation of torch.func follows. Leave "
                "the experts whole for that."
            )
        counts = given.counts
        assert counts is not None
        own = len(counts) // self.devices
        even = [own] * self.devices
        came = exchanged(counts, even, even, self.mesh)
        both = torch.stack([counts, came]).reshape(2, self.devices, own).sum(-1).tolist()
        there, back = both
        arrived = exchanged(rows, there, back, self.mesh)
        numbers = torch.arange(own, device=counts.device).repeat(self.devices)
        index = torch.repeat_interleave(numbers, came, output_size=len(arrived))
        made = send(
            lambda some, one: run(some, OwnExperts(one.indices, one.counts)),
            arrived,
            index[:, None],
            torch.ones_like(arrived[:, :1].detach()),
            own,
            BACKEND,
            sort=sorts(arrived),
        )
        return exchanged(made, back, there, self.mesh)

"""A layer cut over devices as a style of PyTorch's ``parallelize_module``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.parallel import ParallelStyle

from tensormoe_torch._base import Mixture
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch.parallel._cut import Request
from tensormoe_torch.parallel._parallelize import checked_mesh, run


class MuMoEParallel(ParallelStyle):
    """One layer, block or mixture in the plan of ``parallelize_module``, cut along one leg.

    It does what :func:`parallelize` does, and redistributes inputs and outputs, so that it stands
    beside ``ColwiseParallel``, ``RowwiseParallel`` and ``SequenceParallel``. With
    ``output_layouts=Shard(1)``, sums over devices are scattered instead of repeated on each.

    Args:
        leg: as of :func:`parallelize`.
        input_layouts: placement of the first input where it is a plain tensor: ``Replicate()``, or
            ``Shard(1)`` behind layers that are parallel over a sequence.
        output_layouts: placement of the output.
        use_local_output: whether the output is a plain tensor, instead of a DTensor.

    >>> from torch.distributed.tensor import Shard
    >>> MuMoEParallel("r", input_layouts=Shard(1), output_layouts=Shard(1))
    MuMoEParallel(leg='r', input_layouts=Shard(dim=1), output_layouts=Shard(dim=1), \
use_local_output=True)
    """

    def __init__(
        self,
        leg: str | None = None,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.leg = leg
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(leg={self.leg!r}, input_layouts={self.input_layouts!r}, "
            f"output_layouts={self.output_layouts!r}, use_local_output={self.use_local_output})"
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        mesh = checked_mesh(device_mesh)
        run(module, Request(mesh, self.leg, self._summed(module)))
        module.register_forward_pre_hook(_Inputs(mesh, self.input_layouts))
        module.register_forward_hook(_Outputs(mesh, self.output_layouts, self.use_local_output))
        return module

    def _summed(self, module: nn.Module) -> Placement | None:
        """Placement that sums over devices have at once; None for sums on all of them."""
        whole = isinstance(self.output_layouts, Replicate)
        if whole or not isinstance(module, Mixture | MuMoEMLP):
            return None
        # outputs are dropped as wholes
        if isinstance(module, MuMoEMLP) and module.config.drop:
            return None
        return self.output_layouts


class _Inputs:
    """A hook that gives a module its first input whole."""

    def __init__(self, mesh: DeviceMesh, layout: Placement) -> None:
        self._mesh = mesh
        self._layout = layout

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self._mesh, [self._layout], run_check=False)
        return x.redistribute(placements=[Replicate()]), *others


class _Outputs:
    """A hook that places a module's output."""

    def __init__(self, mesh: DeviceMesh, layout: Placement, local: bool) -> None:
        self._mesh = mesh
        self._layout = layout
        self._local = local

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not isinstance(output, DTensor):
            output = DTensor.from_local(output, self._mesh, [Replicate()], run_check=False)
        found: Any = output.redistribute(placements=[self._layout])
        return found.to_local() if self._local else found

"""Layers cut over devices: every factor along one leg, one sum over the devices per call.

A layer cut along a leg is the same layer with a smaller leg. Each device holds its slice of every
factor that has the leg, and runs the layer as if it were whole; its result is a slice of the output
for the output leg, and for all others a term of a sum. Parameters are DTensors, so that PyTorch's
``fully_shard``, distributed checkpoints, optimizers and clipping work on them.

Experts of sparse mixtures are spread over devices whose batches differ as well: each has some of
the experts, and rows travel to theirs and back.
"""

from __future__ import annotations

from tensormoe_torch.parallel._parallelize import parallelize
from tensormoe_torch.parallel._spread import parallelize_experts
from tensormoe_torch.parallel._style import MuMoEParallel

__all__ = ["MuMoEParallel", "parallelize", "parallelize_experts"]

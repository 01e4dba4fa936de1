"""Parameters of a module that go into a checkpoint."""

from __future__ import annotations

from os import PathLike

from torch import nn

from tensormoe.checkpoint import match_arrays
from tensormoe.errors import CheckpointError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe_torch._sharded import save_whole

__all__ = ["save_module"]


def save_module(
    module: nn.Module, path: str | PathLike[str], config: LayerConfig | BlockConfig
) -> None:
    """Write a layer or block, whose state dict must have its parameters and buffers, and no more.

    Args:
        module: the layer or block; of sharded ones, every process makes this call.
        path: the file.
        config: what rebuilds it.

    Raises:
        CheckpointError: parameters that are computed from others, or others besides; or as
            ``checkpoint.save_checkpoint``.
        SpecError: a configuration that no file can hold.
    """
    values = config.to_dict()
    arrays = module.state_dict()
    shapes = {**config.parameter_shapes(), **config.buffer_shapes()}
    match = match_arrays(shapes, arrays, strict=False)
    besides = ", ".join(map(repr, match.unexpected))
    if match.missing:
        raise CheckpointError(
            "parameters must be stored under their own names to be saved; got "
            f"{', '.join(map(repr, match.missing))} computed from {besides or 'elsewhere'}. Take "
            "the pruning, parametrization or adapter off first (prune.remove, "
            "remove_parametrizations, merge_and_unload), or save the state_dict()."
        )
    if match.unexpected:
        raise CheckpointError(
            f"a checkpoint holds the parameters and buffers of a {config.block} alone; got "
            f"{besides} besides. Save the state_dict(), or keep the layer in a module that has "
            "them."
        )
    match_arrays(shapes, arrays)
    save_whole(path, config.block, values, {name: arrays[name] for name in shapes})

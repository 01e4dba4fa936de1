"""Layers and blocks as modules: saved, loaded, and made of tensors that exist already."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from tensormoe._layers import Methods
from tensormoe._rounding import CODES, code_names
from tensormoe.backend import Backend
from tensormoe.checkpoint import match_arrays
from tensormoe.errors import BackendError, CheckpointError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.mixtures import MixtureConfig
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._dtypes import FLOATS, checked_device
from tensormoe_torch._sharded import save_whole, sized

OF = "of(config, init, device, dtype), which load and restore call"

C = TypeVar("C", bound=LayerConfig | BlockConfig | MixtureConfig)


class Stored(Methods[Tensor, C], nn.Module):
    """Modules that are made of a configuration, saved, and loaded."""

    _dtypes = FLOATS

    backend: ClassVar[Backend] = BACKEND

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; inputs must have it, unless autocast is on."""
        raise NotImplementedError

    @classmethod
    def of(
        cls,
        config: C,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer or block of a configuration: what the constructor makes of its arguments.

        Raises:
            SpecError: a block whose activation has no name.
            TypeError: a class derived from the library's has a constructor of its own, and does
                not override this.
        """
        raise NotImplementedError

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        If parameters are sharded, as by ``fully_shard``, every process makes this call: the first
        of those that share them writes, and all return when the file is whole.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written; parameters that
                are computed, as pruned ones are, or parameters that the layer has not by itself.
                Of sharded layers, in every process.
            SpecError: a block whose activation is a module or function of its own.
        """
        save_module(self, path, self.config)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str | None = None) -> Self:
        """The layer or block of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            device: of the parameters; the default one if none is given.

        Raises:
            CheckpointError: not a checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
            SpecError: not a device.
            TypeError: as :meth:`of`.
        """
        return cls._filled(*cls._read(path), device)

    @classmethod
    def _filled(
        cls,
        config: C,
        arrays: Mapping[str, Tensor],
        device: torch.device | str | None,
        init: str = "variance",
    ) -> Self:
        """A module with copies of tensors that fit; on the default device if none is given."""
        target = checked_device(device) or torch.get_default_device()
        module = cls._empty(config, arrays, init).to_empty(device=target)
        module.load_state_dict(dict(arrays))
        return module

    @classmethod
    def _check(cls, config: C, arrays: Mapping[str, Tensor]) -> None:
        super()._check(config, arrays)
        first, *others = arrays
        for name in others:
            if arrays[name].device != arrays[first].device:
                raise BackendError(
                    f"tensors must be on one device; got {arrays[name].device} for {name!r} and "
                    f"{arrays[first].device} for {first!r}. Move them with .to(…)."
                )

    @classmethod
    def _of_arrays(cls, config: C, arrays: Mapping[str, Tensor]) -> Self:
        module = cls._empty(config, arrays)
        # detached: a parameter is a leaf, and whether the given tensor is one is the caller's
        # matter
        module.load_state_dict({name: each.detach() for name, each in arrays.items()}, assign=True)
        return module

    @classmethod
    def _empty(cls, config: C, arrays: Mapping[str, Tensor], init: str = "variance") -> Self:
        """A module on the meta device in the dtypes of its tensors, of gate and router too."""
        dtype = arrays[next(iter(config.parameter_shapes()))].dtype
        module = cls.of(config, init, "meta", dtype)
        # statistics and other buffers are float32 at least anyhow
        for name, parameter in module.named_parameters():
            if name in arrays:
                parameter.data = parameter.data.to(arrays[name].dtype)
        return module

    def _dtype_text(self) -> str:
        return f"dtype={self.dtype}"


def save_module(
    module: nn.Module, path: str | PathLike[str], config: LayerConfig | BlockConfig | MixtureConfig
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
    bits, shapes = _in_codes(arrays, shapes)
    found = {name: sized(array, shapes.get(name)) for name, array in arrays.items()}
    match = match_arrays(shapes, found, strict=False)
    besides = ", ".join(map(repr, match.unexpected))
    if match.missing:
        raise CheckpointError(
            "parameters must be stored under their own names to be saved; got "
            f"{', '.join(map(repr, match.missing))} computed from {besides or 'elsewhere'}. Take "
            "the pruning, parametrization or adapter off first (prune.remove, "
            "remove_parametrizations, merge_and_unload, merge_adapters), or save the "
            "state_dict()."
        )
    if match.unexpected:
        raise CheckpointError(
            f"a checkpoint holds the parameters and buffers of a {config.block} alone; got "
            f"{besides} besides. Save the state_dict(), or keep the layer in a module that has "
            "them."
        )
    match_arrays(shapes, found)
    save_whole(path, config.block, values, {name: arrays[name] for name in shapes}, shapes, bits)


def _in_codes(
    arrays: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int | None, dict[str, tuple[int, ...]]]:
    """Bits of rounded factors, and shapes in the file, of their codes and scales.

    Raises:
        CheckpointError: factors of different bits.
    """
    codes = {name: arrays[f"{name}.{CODES}"] for name in shapes if f"{name}.{CODES}" in arrays}
    if not codes:
        return None, dict(shapes)
    found = {8 if each.dtype == torch.int8 else 4 for each in codes.values()}
    if len(found) > 1:
        raise CheckpointError(
            "a checkpoint holds factors of as many bits each; got some of 8 and some of 4. "
            "Dequantize one kind of them, or save the state_dict()."
        )
    (bits,) = found
    rest = {name: shape for name, shape in shapes.items() if name not in codes}
    return bits, rest | code_names({name: shapes[name] for name in codes}, bits)

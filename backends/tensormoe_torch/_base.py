"""What the layers share: factors by name, experts of given coefficients, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from os import PathLike
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from tensormoe import LayerSpec, functional
from tensormoe._validation import brief
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.planning import Cost, Plan
from tensormoe_torch._adapter import BACKEND, EAGER
from tensormoe_torch._autograd import mix, no_autocast
from tensormoe_torch._checks import Given, compute_dtype, merged
from tensormoe_torch._gate import ExpertGate

__all__ = ["Mixture", "checked_device", "checked_dtype", "filled", "holding"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """``dtype`` if a layer can be stored in it; PyTorch's default one for None.

    Raises:
        SpecError: not a floating-point type.
    """
    found = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(found, torch.dtype) or found not in _FLOATS:
        names = ", ".join(str(each) for each in _FLOATS)
        raise SpecError(f"dtype must be one of {names}; got {brief(dtype)}.")
    return found


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """``device`` as PyTorch's value; None for the default one.

    Raises:
        SpecError: no device of this PyTorch's.
    """
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SpecError(
            f"device must be a torch.device or its name, such as 'cpu' or 'cuda:0'; got {device!r}."
        ) from error


M = TypeVar("M", bound=nn.Module)


def filled(
    build: Callable[[torch.dtype], M],
    arrays: Mapping[str, Tensor],
    device: torch.device | str | None,
) -> M:
    """A module with the tensors of a checkpoint.

    Args:
        build: makes the module on the meta device, in a dtype.
        arrays: by canonical name.
        device: of the parameters; the default one if none is given.

    Raises:
        SpecError: no device.
    """
    dtype = next(value.dtype for name, value in arrays.items() if "factors." in name)
    target = checked_device(device) or torch.get_default_device()
    module = build(dtype).to_empty(device=target)
    module.load_state_dict(dict(arrays))
    return module


def holding(
    build: Callable[[torch.dtype], M],
    config: LayerConfig | BlockConfig,
    arrays: Mapping[str, Tensor],
) -> M:
    """A module whose parameters and buffers are tensors that exist already.

    Args:
        build: makes the module on the meta device, in a dtype.
        config: the layer or block.
        arrays: by canonical name.

    Raises:
        BackendError, CheckpointError, ShapeError: as ``functional.check_arrays``; and tensors on
            several devices.
    """
    functional.check_arrays(config, arrays, BACKEND, _FLOATS)
    first, *others = arrays
    for name in others:
        if arrays[name].device != arrays[first].device:
            raise BackendError(
                f"tensors must be on one device; got {arrays[name].device} for {name!r} and "
                f"{arrays[first].device} for {first!r}. Move them with .to(…)."
            )
    module = build(arrays[next(iter(config.parameter_shapes()))].dtype)
    # detached: a parameter is a leaf, and whether the given tensor is one is the caller's matter
    module.load_state_dict({name: each.detach() for name, each in arrays.items()}, assign=True)
    return module


class Mixture(nn.Module):
    """What the layers share; its parameters are ``factors.<name>`` and ``gate.<name>``."""

    config: LayerConfig
    factors: nn.ParameterDict
    gate: ExpertGate | None

    def __init__(
        self,
        config: LayerConfig,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dtype, device = checked_dtype(dtype), checked_device(device)
        config.spec.initializers(init)  # an unknown scheme fails before anything is allocated
        self.config = config
        self.init = init
        self.factors = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                for name, shape in config.spec.shapes.items()
            }
        )
        self.gate = None if config.gate is None else ExpertGate(config, device, dtype)
        self._names = tuple((f"factors.{name}", name) for name in config.spec.shapes)
        self._reset_factors()

    @property
    def spec(self) -> LayerSpec:
        """Sizes and factorization."""
        return self.config.spec

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; inputs must have it, unless autocast is on."""
        return self._weight.dtype

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.config.num_parameters

    @property
    def _weight(self) -> Tensor:
        """One of the factors: it has the layer's dtype and device."""
        weight: Tensor = getattr(self.factors, self._names[0][1])
        return weight

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        self._reset_factors()
        if self.gate is not None:
            self.gate.reset_parameters()

    @torch.no_grad()
    def _reset_factors(self) -> None:
        like = self._weight
        options: Any = {"device": like.device, "dtype": like.dtype}
        drawn = functional.initialize(
            replace(self.config, gate=None),
            BACKEND,
            normal=lambda shape: torch.randn(shape, **options),
            uniform=lambda shape: torch.empty(shape, **options).uniform_(-1.0, 1.0),
            zeros=lambda shape: torch.zeros(shape, **options),
            init=self.init,
        )
        for name, array in drawn.items():
            getattr(self.factors, name.removeprefix("factors.")).copy_(array)

    def plan(self, batch: int) -> Plan:
        """How the layer runs ``batch`` inputs."""
        return functional.layer_plan(self.config, batch)

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """What one call costs for ``batch`` inputs on the CPU, the gate included."""
        return functional.layer_cost(
            self.config, batch, EAGER, self.dtype.itemsize, training=training
        )

    def expert(self, *index: int) -> tuple[Tensor, Tensor | None]:
        """One expert's matrix (in, out) and bias (out,), without building 𝒲; differentiable.

        Args:
            index: one number a level.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return functional.expert_weight(self.config, self._parameters_by_name(), index, BACKEND)

    def materialize(self) -> tuple[Tensor, Tensor | None]:
        """𝒲 (experts…, in, out) and the biases (experts…, out), built explicitly: N·I·O entries."""
        return functional.materialize(self.config, self._parameters_by_name(), BACKEND)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        save_checkpoint(path, type(self).__name__, self.config.to_dict(), self.state_dict())

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str | None = None) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            device: of the parameters; the default one if none is given.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        config, arrays = functional.read_block(path, cls.__name__, LayerConfig, BACKEND)
        return filled(lambda dtype: cls.of(config, device="meta", dtype=dtype), arrays, device)

    @classmethod
    def restore(cls, config: LayerConfig, arrays: Mapping[str, Tensor]) -> Self:
        """A layer of tensors that exist already; it trains them in place, and copies none.

        Args:
            config: the layer.
            arrays: parameters and buffers by canonical name, as ``state_dict()`` has them.

        Raises:
            BackendError: arrays of another library, or on several devices.
            CheckpointError: names or shapes that are not the layer's; lists every difference.
            ShapeError: parameters of different dtypes, or of one that no layer has.
        """
        return holding(lambda dtype: cls.of(config, device="meta", dtype=dtype), config, arrays)

    @classmethod
    def of(
        cls,
        config: LayerConfig,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer of a configuration: what a constructor makes of its arguments."""
        layer = cls.__new__(cls)
        Mixture.__init__(layer, config, init, device, dtype)
        return layer

    def _parameters_by_name(self) -> dict[str, Tensor]:
        factors = self.factors
        return {name: getattr(factors, short) for name, short in self._names}

    def _arguments(self) -> str:
        spec = self.spec
        experts = spec.experts[0] if spec.levels == 1 else spec.experts
        return (
            f"experts={experts}, factorization={spec.factorization!r}, bias={spec.bias}, "
            f"gate={self.config.gate!r}, dtype={self.dtype}"
        )

    def _mix(
        self, x: Tensor, coefficients: Given | None, lead: tuple[int, ...], weight: Tensor
    ) -> Tensor:
        """The experts, mixed by the gate's coefficients or by given ones."""
        if coefficients is None:
            if self.gate is None:
                raise ShapeError(
                    "this layer has no gate; got no coefficients. Call it with coefficients=…, or "
                    "build it with a gate."
                )
            given = [*self.gate(x)]
            if len(lead) != 1:
                given = [each.reshape(prod(lead), each.shape[-1]) for each in given]
        else:
            given = merged(self.config, coefficients, lead, weight)
        rows = x if len(lead) == 1 else x.reshape(prod(lead), *x.shape[len(lead) :])
        parameters = self._parameters_by_name()
        dtype = compute_dtype(weight)
        if dtype != weight.dtype:
            parameters = {name: array.to(dtype) for name, array in parameters.items()}
        if rows.dtype != dtype and rows.dtype.is_floating_point:
            rows = rows.to(dtype)
        with no_autocast(x.device.type):
            result = mix(self.config, parameters, rows, given)
        if len(lead) == 1:
            return result
        return result.reshape(*lead, self.spec.out_features)

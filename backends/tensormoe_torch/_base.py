"""What the layers share: factors by name, experts of given coefficients, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from tensormoe import LayerSpec, functional
from tensormoe._html import layer_html
from tensormoe.checkpoint import check_arrays, read_block
from tensormoe.errors import BackendError, ShapeError, SpecError
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.planning import Cost, Plan
from tensormoe_torch._adapter import BACKEND, EAGER
from tensormoe_torch._checks import Given, merged
from tensormoe_torch._dtypes import FLOATS, checked_device, checked_dtype
from tensormoe_torch._factors import Factors, with_lead
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._products import copies_transposed
from tensormoe_torch._saving import save_module
from tensormoe_torch._sharded import gathered, put, stored

__all__ = ["Mixture", "check_init", "filled", "holding"]


def check_init(kind: type, library: type) -> None:
    """Refuse a user's class whose constructor would be left out.

    Args:
        kind: the class to make.
        library: the library's own that it is or inherits from.

    Raises:
        TypeError: it has a constructor of its own.
    """
    if kind.__init__ is not library.__init__:  # type: ignore[misc]
        raise TypeError(
            f"a layer made of a configuration must have the constructor of {library.__name__}; got "
            f"{kind.__qualname__} with one of its own. Override its classmethod "
            "of(config, init, device, dtype), which load and restore call."
        )


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
    module = _with_gate_of(build(dtype), arrays).to_empty(device=target)
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
        BackendError, CheckpointError, ShapeError: as ``check_arrays``; and tensors on
            several devices.
    """
    check_arrays(config, arrays, BACKEND, FLOATS)
    first, *others = arrays
    for name in others:
        if arrays[name].device != arrays[first].device:
            raise BackendError(
                f"tensors must be on one device; got {arrays[name].device} for {name!r} and "
                f"{arrays[first].device} for {first!r}. Move them with .to(…)."
            )
    module = _with_gate_of(build(arrays[next(iter(config.parameter_shapes()))].dtype), arrays)
    # detached: a parameter is a leaf, and whether the given tensor is one is the caller's matter
    module.load_state_dict({name: each.detach() for name, each in arrays.items()}, assign=True)
    return module


def _with_gate_of(module: M, arrays: Mapping[str, Tensor]) -> M:
    """A module whose gate is in the dtype of the one that is stored: float32 beside 16 bits."""
    gate = getattr(module, "gate", None)
    if isinstance(gate, ExpertGate):
        # statistics are float32 at least anyhow
        for parameter in gate.parameters():
            parameter.data = parameter.data.to(arrays["gate.projection_0"].dtype)
    return module


class Mixture(nn.Module):
    """What the layers share; its parameters are ``factors.<name>`` and ``gate.<name>``."""

    # the name in checkpoints, also of classes that users or wrappers derive
    _kind: ClassVar[str]

    config: LayerConfig
    factors: Factors
    gate: ExpertGate | None
    _repr_html_ = layer_html

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
        # no compiler has to follow the planner
        config.plan_ahead()
        self.init = init
        self.factors = Factors(
            config,
            {
                name: nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                for name, shape in config.spec.shapes.items()
            },
        )
        self._first = next(iter(config.spec.shapes))
        self.gate = None if config.gate is None else ExpertGate(config, device, dtype)
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
        # an adapter around the factors has what it adapts first
        weight: Tensor | None = getattr(self.factors, self._first, None)
        return next(self.factors.parameters()) if weight is None else weight

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        self._reset_factors()
        if self.gate is not None:
            self.gate.reset_parameters()

    @torch.no_grad()
    def _reset_factors(self) -> None:
        parameters = stored(self.factors, self.spec.shapes)
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
        for name, parameter in parameters.items():
            put(parameter, drawn[f"factors.{name}"])

    def plan(self, batch: int) -> Plan:
        """How the layer runs ``batch`` inputs."""
        return functional.layer_plan(self.config, batch)

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """What one call costs for ``batch`` inputs on the CPU, the gate included."""
        return functional.layer_cost(
            self.config,
            batch,
            EAGER,
            self.dtype.itemsize,
            copies_transposed=copies_transposed(self.dtype),
            frees=True,
            training=training,
        )

    def expert(self, *index: int) -> tuple[Tensor, Tensor | None]:
        """One expert's matrix (in, out) and bias (out,), without building 𝒲; differentiable.

        Args:
            index: one number a level.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return functional.expert_weight(self.config, self._whole(), index, BACKEND)

    def materialize(self) -> tuple[Tensor, Tensor | None]:
        """𝒲 (experts…, in, out) and the biases (experts…, out), built explicitly: N·I·O entries."""
        return functional.materialize(self.config, self._whole(), BACKEND)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        If parameters are sharded, as by ``fully_shard``, every process makes this call: the first
        of those that share them writes, and all return when the file is whole.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written; parameters that
                are computed, as pruned ones are, or parameters that the layer has not by itself.
                Of sharded layers, in every process.
        """
        save_module(self, path, self.config)

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str | None = None) -> Self:
        """The layer of a checkpoint, whichever backend wrote it.

        Args:
            path: the file.
            device: of the parameters; the default one if none is given.

        Raises:
            CheckpointError: no checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
            TypeError: as :meth:`of`.
        """
        config, arrays = read_block(path, cls._kind, LayerConfig, BACKEND)
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
        """A layer of a configuration: what a constructor makes of its arguments.

        Raises:
            TypeError: a class derived from the library's has a constructor of its own, and does
                not override this.
        """
        check_init(cls, next(each for each in cls.__mro__ if "_kind" in vars(each)))
        layer = cls.__new__(cls)
        Mixture.__init__(layer, config, init, device, dtype)
        return layer

    def _whole(self) -> dict[str, Tensor]:
        """All entries of the factors in this process, which may hold a part of them."""
        if not isinstance(self.factors, Factors):
            raise SpecError(
                "factors must be the layer's own to be read by expert; got a "
                f"{type(self.factors).__qualname__} around them. Take the adapter off first."
            )
        return {name: gathered(array) for name, array in self.factors.by_name().items()}

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
            given = self.gate(x)
        else:
            given = merged(self.config, coefficients, lead, weight)
            if len(lead) != 1:
                given = [with_lead(each, lead) for each in given]
        result: Tensor = self.factors(x, *given)
        return result

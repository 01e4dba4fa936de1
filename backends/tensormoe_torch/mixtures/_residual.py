"""A frozen layer and a mixture that is added to its outputs, as a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tensormoe import functional
from tensormoe._layers import check_constructor
from tensormoe._residual_layers import ResidualMethods
from tensormoe.backend import Backend
from tensormoe.checkpoint import check_arrays
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.gates import Gate
from tensormoe.mixtures import (
    ResidualConfig,
    add_residual,
    check_base,
    check_merge,
    residual_config,
    start_at_zero,
    summed,
)
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import is_autocast
from tensormoe_torch._checks import Given
from tensormoe_torch._declared import declared
from tensormoe_torch._dtypes import FLOATS
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._sharded import gathered, is_sharded, put, save_whole, stored
from tensormoe_torch.surgery._linears import is_linear, read_linear


class Adapter(MuMoE):
    """A :class:`MuMoE` whose outputs start at zero: of every term of its network, one factor is.

    >>> layer = Adapter.of(MuMoE(8, 4, experts=3, rank=2).config)
    >>> layer(torch.ones(2, 8)).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's generator, as at construction."""
        super().reset_parameters()
        self._start()

    def _reset_factors(self) -> None:
        super()._reset_factors()
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        arrays = stored(self, self.config.parameter_shapes())
        like = self._weight

        def uniform(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, device=like.device, dtype=like.dtype).uniform_(-1.0, 1.0)

        config = self.config
        for name, values in start_at_zero(config, arrays, uniform, BACKEND).items():
            put(arrays[name], values)


class ResidualExperts(ResidualMethods[Tensor], nn.Module):
    """A frozen layer, and a mixture of low-rank experts that is added: ``y = base(x) + μMoE(x)``.

    The mixture's outputs start at exactly zero, as those of LoRA (Hu et al. 2022) do, and as in
    Omni-SMoLA (Wu et al. 2024, arXiv 2312.00968) every input mixes the experts that it needs. All
    experts are one tensor network, so that many of them cost little more than one.

    The base is frozen: its parameters get ``requires_grad=False``, and it stays in evaluation mode.

    Args:
        base: any module that is called with (..., in) and returns (..., out). A layer of the
            library without a gate, of the same experts, is given the coefficients too.
        in_features: size of an input; the base's own by default.
        out_features: size of an output; the base's own by default.
        experts: N, or one size per level of hierarchy.
        factorization: a value such as ``CP(rank=8)``, or its name.
        rank: bond sizes, with a name.
        budget: upper limits for the mixture with its gate instead, as for :class:`MuMoE`. Without
            rank or budget, factors get the parameters of a linear layer of this size.
        bias: whether every expert has a bias.
        gate: how inputs become coefficients; None for a mixture that is always given them.
        scale: what the mixture's outputs are multiplied by; PEFT's ``lora_alpha`` is
            ``scale=lora_alpha / rank``.
        init: ``"variance"`` or ``"paper"``, of the factors that do not start at zero.
        device: of the mixture; the base's by default.
        dtype: of the mixture; the base's by default. Inputs of another floating-point type are
            cast for it, and outputs have the base's.

    Attributes:
        base: the frozen module.
        adapter: the mixture, a :class:`MuMoE`.
        config: the mixture and its scale as a frozen value.

    Raises:
        SpecError: a base that is not called, sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import torch
    >>> linear = torch.nn.Linear(32, 16)
    >>> layer = ResidualExperts(linear, experts=8, rank=4)
    >>> x = torch.randn(5, 32)
    >>> bool((layer(x) == linear(x)).all())
    True
    >>> [name for name, each in layer.named_parameters() if each.requires_grad][:2]
    ['adapter.factors.expert_0', 'adapter.factors.input']
    """

    _kind: ClassVar[str] = "ResidualExperts"

    backend: ClassVar[Backend] = BACKEND

    base: nn.Module
    adapter: Adapter

    def __init__(
        self,
        base: nn.Module,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike = "cp",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | str | None = None,
        bias: bool = False,
        gate: Gate | str | None = "entmax",
        scale: float = 1.0,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_base(base)
        rows, columns = own_sizes(base)
        in_features = rows if in_features is None else in_features
        out_features = columns if out_features is None else out_features
        options = Options(experts, factorization, rank, budget, bias, gate)
        config = residual_config(base, in_features, out_features, options, scale)
        self._build(config, base, init, device, dtype)

    @classmethod
    def of(
        cls,
        config: ResidualConfig,
        base: nn.Module,
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer of a configuration: what the constructor makes of its arguments.

        Args:
            config: the mixture and its scale.
            base: as for the constructor, as the others.
            init: of the factors that do not start at zero.
            device: of the mixture.
            dtype: of the mixture.

        Raises:
            SpecError: a base that is not a module, or has other sizes.
            TypeError: a class derived from the library's has a constructor of its own, and does
                not override this.
        """
        check_constructor(cls, "of(config, base, init, device, dtype), which from_adapter calls")
        _check_base(base)
        layer = cls.__new__(cls)
        layer._build(config, base, init, device, dtype)
        return layer

    def _build(
        self,
        config: ResidualConfig,
        base: nn.Module,
        init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)
        check_base(config, base)
        self.config = config
        self._shares = self._takes_coefficients(base)
        for each in (*base.parameters(), *base.buffers()):
            device = each.device if device is None else device
            if dtype is None and each.dtype in FLOATS:
                dtype = each.dtype
        adapter = Adapter.of(config.layer, init, device, dtype)
        # nothing of the base is touched if this fails
        self.base = base.requires_grad_(False).eval()
        self.adapter = adapter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mixture."""
        return self.adapter.dtype

    @property
    def weight(self) -> Tensor:
        """The shape (out, in), dtype and device of the base's matrix, for code that reads those.

        It has no values, as :attr:`MuMoE.weight`: the base's would be used without what is added.
        """
        return self._declared((self.out_features, self.in_features), "weight")

    @property
    def bias(self) -> Tensor | None:
        """The same for a bias (out,); None where neither base nor experts have one."""
        held = getattr(self.base, "bias", None) is not None
        return self._declared((self.out_features,), "bias") if held or self.spec.bias else None

    def _declared(self, shape: tuple[int, ...], name: str) -> Tensor:
        own = (each for each in self.base.parameters() if each.dtype in FLOATS)
        like = next(own, self.adapter._weight)
        return declared(shape, like, True, f"{name} of {type(self).__name__}")

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the mixture; the base stays in evaluation mode, as it is frozen."""
        super().train(mode)
        self.base.eval()
        return self

    def reset_parameters(self) -> None:
        """Start the mixture anew, with outputs of zero; the base stays."""
        self.adapter.reset_parameters()

    def coefficients(self, x: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of inputs (..., in): one tensor (..., N_e) per level.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        return self.adapter.coefficients(self._for_adapter(x))

    def forward(self, x: Tensor, coefficients: Given | None = None) -> Tensor:
        """Run both, and add.

        Args:
            x: (..., in), as the base takes it.
            coefficients: ready-made ones of the mixture; its gate makes them otherwise.

        Returns:
            (..., out), in the dtype of the base's output.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input, coefficients or the base's output do not fit.
        """
        functional.check_array(x, BACKEND, "x")
        functional.check_input(x, self.in_features, x.dtype, BACKEND)
        y = self.base(x, coefficients) if self._shares else self.base(x)
        made = self.adapter(self._for_adapter(x), coefficients)
        return add_residual(self.config, y, made, BACKEND)

    def _for_adapter(self, x: Tensor) -> Tensor:
        dtype = self.adapter.dtype
        other = x.dtype != dtype and x.dtype.is_floating_point
        return x.to(dtype) if other and not is_autocast(x.device.type) else x

    def check_merge(self, coefficients: Sequence[Tensor] | Tensor | None = None) -> None:
        """Refuse a layer that :meth:`merge` cannot merge; nothing is computed.

        Args:
            coefficients: as for :meth:`merge`.

        Raises:
            SpecError: a base that is not linear or not dense, routing that depends on the input, or
                parameters that are sharded.
        """
        if any(is_sharded(each) for each in self.parameters()):
            raise SpecError(
                "parameters must be whole to be merged; got sharded ones. Save the adapters, load "
                "them into a model that is not sharded, and merge there."
            )
        if self._shares:
            base: Any = self.base
            check_merge(self.config, base.config)
            return
        self._check_linear(is_linear(self.base))
        # refuses layers that run in another way
        read_linear(self.base, "the base", values=False)
        if coefficients is None:
            check_merge(self.config, None)

    @torch.no_grad()
    def merge(self, coefficients: Sequence[Tensor] | Tensor | None = None) -> nn.Module:
        """The base with the mixture added to its weights: a plain layer, which stays frozen.

        Args:
            coefficients: (N_e,) per level, the same for all inputs; None where there is nothing to
                choose: one expert, or a base whose experts are routed as the mixture's are.

        Returns:
            A copy of the base: an ``nn.Linear`` (or ``Conv1D``), or for a base of dense experts a
            :class:`MuMoE`, with W_n + ΔW_n each.

        Raises:
            SpecError: a base that is not linear or not dense, or routing that depends on the input.
            BackendError, ShapeError: coefficients that do not fit.
        """
        self.check_merge(coefficients)
        if self._shares:
            base: Any = self.base
            arrays = self._merged_experts(coefficients, base.state_dict())
            experts: MuMoE = copy.deepcopy(base)
            experts.load_state_dict(arrays)
            return experts
        linear = read_linear(self.base, "the base", values=False)
        weight, bias = self.delta(coefficients)
        merged = copy.deepcopy(self.base)
        made = read_linear(merged, "the base", values=False)
        made.weight.copy_(summed(linear.weight, weight, BACKEND))
        if bias is not None:
            zeros = torch.zeros_like(linear.weight[0])
            total = summed(zeros if linear.bias is None else linear.bias, bias, BACKEND)
            merged.register_parameter("bias", nn.Parameter(total, requires_grad=False))
        return merged

    def save_adapter(self, path: str | PathLike[str]) -> None:
        """Write the mixture alone, without the base, to a file that every framework opens.

        If parameters are sharded, as by ``fully_shard``, every process makes this call.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        held = self._held()
        save_whole(path, self.config.block, held.to_dict(), held.named())

    def load_adapter(self, path: str | PathLike[str], name: str | None = None) -> Self:
        """Take the values of a file over, and return the layer itself; the base stays.

        Args:
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.

        Raises:
            CheckpointError: not a file of adapters, or another layer's; lists every difference.
        """
        _, arrays = self._read_adapter(path, self.config, name)
        self._take(arrays)
        return self

    @torch.no_grad()
    def _take(self, arrays: Mapping[str, Tensor]) -> None:
        """Write the mixture's parameters and buffers in place, in its dtype; sharded ones too.

        Args:
            arrays: by the names that they have in ``adapter``.
        """
        for name, each in self.adapter.state_dict(keep_vars=True).items():
            put(each, arrays[name].to(device=each.device, dtype=each.dtype))

    @classmethod
    def from_adapter(
        cls, base: nn.Module, path: str | PathLike[str], name: str | None = None
    ) -> Self:
        """A base with the mixture of a file.

        Args:
            base: as for the constructor.
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.

        Raises:
            CheckpointError: not a file of adapters, or no such module.
            SpecError: a base of other sizes.
        """
        config, arrays = cls._read_adapter(path, None, name)
        check_arrays(config.layer, arrays, BACKEND, FLOATS)
        first = arrays[next(iter(config.layer.parameter_shapes()))]
        layer = cls.of(config, base, dtype=first.dtype)
        layer._take(arrays)
        return layer

    def _adapter_arrays(self) -> Mapping[str, Tensor]:
        return self.adapter.state_dict()

    def _whole_arrays(self) -> Mapping[str, Tensor]:
        return {name: gathered(each) for name, each in self._adapter_arrays().items()}

    def _dtype_text(self) -> str:
        return f"dtype={self.dtype}"


def own_sizes(base: nn.Module) -> tuple[int | None, int | None]:
    """Sizes of GPT-2's ``Conv1D``, which has no attributes for them; None for other layers."""
    if not is_linear(base) or isinstance(base, nn.Linear):
        return None, None
    weight: Any = base.weight
    return weight.shape[0], weight.shape[1]


def _check_base(base: object) -> None:
    if not isinstance(base, nn.Module):
        raise SpecError(
            f"base must be an nn.Module; got {type(base).__name__}. Put a function in a module."
        )

"""A frozen layer and a mixture that is added to its outputs, as a module of Flax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self

from flax import nnx
from jax import Array

from tensormoe._validation import instance
from tensormoe.errors import SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.gates import Gate
from tensormoe.mixtures import ResidualConfig, check_base, residual_config, summed
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._layers import built
from tensormoe_jax._residual import ResidualLayer, residual_values, stopped
from tensormoe_jax.nnx._base import Mixture
from tensormoe_jax.nnx._layer import MuMoE
from tensormoe_jax.nnx._rngs import Source, checked_rngs, parameters_key


class ResidualExperts(ResidualLayer, nnx.Module):
    """A frozen layer, and a mixture of low-rank experts that is added: ``y = base(x) + μMoE(x)``.

    The mixture's outputs start at exactly zero, as those of LoRA (Hu et al. 2022) do, and as in
    Omni-SMoLA (Wu et al. 2024, arXiv 2312.00968) every input mixes the experts that it needs. All
    experts are one tensor network, so that many of them cost little more than one.

    The base is frozen: it runs in evaluation mode, has no gradients, and what it changes in itself
    is not kept. Optimizers with weight decay would shrink it all the same: :func:`adapter_filter`
    says what to train.

    Args:
        base: a module or function from (..., in) to (..., out). A layer of the library without a
            gate, of the same experts, is given the coefficients too.
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
        dtype: of the mixture; the base's by default. Inputs of another floating-point type are
            cast for it, and outputs have the base's.
        gate_dtype: as for :class:`MuMoE`.
        rngs: ``nnx.Rngs`` with a stream ``params`` or a default one; a seed or a key will do.

    Attributes:
        base: as given.
        adapter: the mixture, a :class:`MuMoE`.
        config: the mixture and its scale as a frozen value.

    Raises:
        SpecError: a base that is not called, sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> linear = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    >>> layer = ResidualExperts(linear, experts=8, rank=4, rngs=nnx.Rngs(1))
    >>> x = jnp.ones((5, 32))
    >>> bool((layer(x) == linear(x)).all())
    True
    """

    _kind: ClassVar[str] = "ResidualExperts"

    base: Any
    adapter: MuMoE

    def __init__(
        self,
        base: Callable[..., Array],
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
        dtype: Any = None,
        gate_dtype: Any = None,
        rngs: Source,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        config = residual_config(base, in_features, out_features, options, scale)
        source = checked_rngs(rngs)
        held = nnx.state(base) if isinstance(base, nnx.Module) else None
        key = parameters_key(source)
        arrays = residual_values(config, key, init, held, dtype, gate_dtype)
        self._hold(config, base, built(MuMoE, Mixture, config.layer, arrays, source))

    def _hold(self, config: ResidualConfig, base: Any, adapter: MuMoE) -> None:
        self.config = config
        self._shares = self._takes_coefficients(base)
        self.base = base
        self.adapter = adapter

    def coefficients(
        self, x: Array, *, use_running_average: bool | None = None
    ) -> tuple[Array, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        options = {"use_running_average": use_running_average}
        return self.adapter.coefficients(self._for_adapter(x), **options)

    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        *,
        use_running_average: bool | None = None,
    ) -> Array:
        """Run both, and add.

        Args:
            x: (..., in), as the base takes it.
            coefficients: ready-made ones of the mixture; its gate makes them otherwise.
            use_running_average: takes the place of the gate's attribute.

        Returns:
            (..., out), in the dtype of the base's output.

        Raises:
            BackendError: no array of JAX's.
            ShapeError: input, coefficients or the base's output do not fit.
        """
        given = (coefficients,) if self._shares else ()
        y: Array = self._added(
            x,
            lambda rows: _frozen(self.base)(rows, *given),
            lambda rows: self.adapter(rows, coefficients, use_running_average=use_running_average),
        )
        return y

    def merge(self, coefficients: Sequence[Array] | Array | None = None) -> nnx.Module:
        """A new layer: the base with the mixture added to its weights.

        Args:
            coefficients: (N_e,) per level, the same for all inputs; None where there is nothing to
                choose: one expert, or a base whose experts are routed as the mixture's are.

        Returns:
            An ``nnx.Linear``, or for a base of dense experts a :class:`MuMoE`.

        Raises:
            SpecError: a base that is not linear or not dense, or routing that depends on the input.
            BackendError, ShapeError: coefficients that do not fit.
        """
        if self._shares:
            arrays = self._merged_experts(coefficients, self.base.parameters)
            return MuMoE.restore(self.base.config, arrays)
        own = isinstance(self.base, nnx.Linear)
        self._check_linear(own and type(self.base).__call__ is nnx.Linear.__call__)
        weight, bias = self.delta(coefficients)
        merged: Any = nnx.clone(self.base)
        merged.kernel[...] = summed(merged.kernel[...], weight, BACKEND)
        if bias is not None:
            if merged.bias is None:
                merged.bias = nnx.data(nnx.Param(bias.astype(merged.kernel.dtype)))
                merged.use_bias = True
            else:
                merged.bias[...] = summed(merged.bias[...], bias, BACKEND)
        return merged  # type: ignore[no-any-return]

    def load_adapter(self, path: str | PathLike[str], name: str | None = None) -> Self:
        """Take the values of a file over, and return the layer itself; the base stays.

        Args:
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.

        Raises:
            CheckpointError: not a file of adapters, or another layer's; lists every difference.
        """
        config, arrays = self._read_adapter(path, self.config, name)
        nnx.update(self.adapter, nnx.state(MuMoE.restore(config.layer, arrays)))
        return self

    @classmethod
    def from_adapter(
        cls,
        base: Callable[..., Array],
        path: str | PathLike[str],
        name: str | None = None,
        *,
        rngs: Source | None = None,
    ) -> Self:
        """A base with the mixture of a file.

        Args:
            base: as for the constructor.
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.
            rngs: what a gate's noise is drawn by, for a layer that goes on training.

        Raises:
            CheckpointError: not a file of adapters, or no such module.
            SpecError: a base that is not called, or of other sizes.
        """
        config, arrays = cls._read_adapter(path, None, name)
        check_base(config, base)
        return built(cls, _Held, config, base, MuMoE.restore(config.layer, arrays, rngs=rngs))


class _Held(ResidualExperts):
    """Made of parts that exist already."""

    def __init__(self, config: ResidualConfig, base: Any, adapter: MuMoE) -> None:
        self._hold(config, base, adapter)


@dataclass(frozen=True)
class AdapterFilter:
    """A filter of Flax: the parameters of the mixtures that are added to frozen layers.

    Args:
        paths: of these mixtures in the model.
    """

    paths: frozenset[tuple[Any, ...]]

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether a variable, or its state, is one of those."""
        inside = any(path[: len(each)] == each for each in self.paths)
        return inside and isinstance(value, nnx.Param)


def adapter_filter(model: nnx.Module) -> AdapterFilter:
    """Filter for the parameters of a model's adapters, and no others.

    It goes wherever Flax takes a filter: the ``wrt`` of an optimizer, ``nnx.DiffState``.

    Args:
        model: holds :class:`ResidualExperts` anywhere inside, or is one.

    Raises:
        SpecError: no module, or one without any.

    >>> import optax
    >>> linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> model = ResidualExperts(linear, experts=3, rank=2, rngs=nnx.Rngs(1))
    >>> trained = adapter_filter(model)
    >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=trained)
    >>> held = nnx.to_flat_state(nnx.state(model, trained))
    >>> sum(each.size for _, each in held) == model.num_parameters
    True
    """
    instance(model, nnx.Module, "model", "an nnx.Module", SpecError)
    found = [
        path for path, module in nnx.iter_modules(model) if isinstance(module, ResidualExperts)
    ]
    inner = {
        path for path in found if any(path[: len(each) + 1] == (*each, "base") for each in found)
    }
    if not found:
        raise SpecError(
            f"the model must hold ResidualExperts; {type(model).__name__} has none. Put them "
            "around its layers first."
        )
    return AdapterFilter(frozenset((*path, "adapter") for path in found if path not in inner))


def _frozen(base: Any) -> Any:
    """The base in evaluation mode and without gradients; what it changes in itself is lost."""
    if not isinstance(base, nnx.Module):
        return base
    graph, state = nnx.split(base)
    held: Any = nnx.merge(graph, stopped(state))
    held.eval()
    return held

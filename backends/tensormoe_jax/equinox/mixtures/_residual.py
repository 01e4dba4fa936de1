"""A frozen layer and a mixture that is added to its outputs, as a module of Equinox."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from os import PathLike
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
from equinox.nn import State, StatefulLayer
from jax import Array

from tensormoe._layers import LayerMethods
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import GateError, SpecError
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.gates import Gate
from tensormoe.mixtures import Adapters, ResidualConfig, check_base, residual_config, summed
from tensormoe.selection import Budget
from tensormoe_jax import _pure
from tensormoe_jax._adapter import BACKEND
from tensormoe_jax._layers import built
from tensormoe_jax._residual import ResidualLayer, residual_values, stopped
from tensormoe_jax.equinox._base import Mixture
from tensormoe_jax.equinox._layer import MuMoE


class ResidualExperts(ResidualLayer, StatefulLayer):
    """A frozen layer, and a mixture of low-rank experts that is added: ``y = base(x) + μMoE(x)``.

    The mixture's outputs start at exactly zero, as those of LoRA (Hu et al. 2022) do, and as in
    Omni-SMoLA (Wu et al. 2024, arXiv 2312.00968) every input mixes the experts that it needs. All
    experts are one tensor network, so that many of them cost little more than one.

    The base is frozen: it runs in inference mode and has no gradients. Optimizers with weight decay
    would shrink it all the same: :func:`adapter_filter` says what to train.

    Args:
        base: a module or function of one input (in,), as Equinox's own layers are, which is mapped
            over all leading axes. A layer of the library is called with (..., in), and one without
            a gate, of the same experts, is given the coefficients too.
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
        axis_name: as for :class:`MuMoE`.
        key: of ``jax.random``.

    Attributes:
        base: as given.
        adapter: the mixture, a :class:`MuMoE`.
        config: the mixture and its scale as a frozen value; no leaf.

    Raises:
        SpecError: a base that is not called, sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import jax, jax.numpy as jnp
    >>> first, second = jax.random.split(jax.random.key(0))
    >>> linear = eqx.nn.Linear(32, 16, key=first)
    >>> layer = ResidualExperts(linear, experts=8, rank=4, key=second)
    >>> x = jnp.ones((5, 32))
    >>> bool((layer(x) == jax.vmap(linear)(x)).all())
    True
    """

    _kind: ClassVar[str] = "ResidualExperts"

    base: Any
    adapter: MuMoE
    config: ResidualConfig = eqx.field(static=True)

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
        axis_name: Hashable = None,
        key: Array,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        self.config = residual_config(base, in_features, out_features, options, scale)
        self._takes_coefficients(base)
        arrays = residual_values(self.config, key, init, base, dtype, gate_dtype)
        self.base = base
        self.adapter = built(MuMoE, Mixture, self.config.layer, arrays, axis_name)

    def is_stateful(self) -> bool:
        """Whether a call needs a state, for the mixture's gate."""
        return self.adapter.is_stateful()

    def coefficients(self, x: Array, state: State | None = None) -> Any:
        """The coefficients of inputs (..., in), one array (..., N_e) per level.

        Args:
            x: (..., in).
            state: of the gate, outside training; the state follows the coefficients then.

        Raises:
            BackendError, ShapeError: the input does not fit, or there is no gate.
        """
        return self.adapter.coefficients(self._for_adapter(x), *(() if state is None else (state,)))

    def __call__(
        self,
        x: Array,
        coefficients: _pure.Given | None = None,
        state: State | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
    ) -> Any:
        """Run both, and add.

        Args:
            x: (..., in), as the base takes it, with any leading axes.
            coefficients: ready-made ones of the mixture; its gate makes them otherwise.
            state: of the mixture's gate, as for :class:`MuMoE`.
            key: what the gate's noise is drawn by, in training.
            inference: takes the place of the gate's attribute.

        Returns:
            (..., out), in the dtype of the base's output; and the state afterwards if one was
            given.

        Raises:
            BackendError: no array of JAX's.
            ShapeError: input, coefficients or the base's output do not fit.
            GateError, SpecError: as :class:`MuMoE`.
        """
        return self._added(
            x,
            lambda rows: self._frozen(rows, coefficients),
            lambda rows: self.adapter(
                rows,
                coefficients,
                state,  # type: ignore[arg-type]
                key=key,
                inference=inference,
            ),
        )

    def _frozen(self, x: Array, coefficients: _pure.Given | None) -> Array:
        """Outputs of the base, in inference mode and without gradients by its arrays."""
        base = stopped(eqx.nn.inference_mode(self.base))
        if isinstance(base, LayerMethods):
            shared = self._takes_coefficients(base)
            made: Array = base(x, coefficients) if shared else base(x)  # type: ignore[operator]
            return made
        rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        made = jax.vmap(base)(rows)
        return made.reshape(*x.shape[:-1], *made.shape[1:])

    def merge(self, coefficients: Sequence[Array] | Array | None = None) -> eqx.Module:
        """A new layer: the base with the mixture added to its weights.

        Args:
            coefficients: (N_e,) per level, the same for all inputs; None where there is nothing to
                choose: one expert, or a base whose experts are routed as the mixture's are.

        Returns:
            An ``equinox.nn.Linear``, or for a base of dense experts a :class:`MuMoE`.

        Raises:
            SpecError: a base that is not linear or not dense, or routing that depends on the input.
            BackendError, ShapeError: coefficients that do not fit.
        """
        base = self.base
        if self._takes_coefficients(base):
            arrays = self._merged_experts(coefficients, base.parameters)
            return MuMoE.restore(base.config, arrays)
        own = isinstance(base, eqx.nn.Linear)
        self._check_linear(own and type(base).__call__ is eqx.nn.Linear.__call__)
        weight, bias = self.delta(coefficients)
        merged = eqx.tree_at(lambda each: each.weight, base, summed(base.weight, weight.T, BACKEND))
        if bias is None:
            return merged  # type: ignore[no-any-return]
        if base.bias is None:
            made = eqx.nn.Linear(
                self.in_features, self.out_features, dtype=base.weight.dtype, key=jax.random.key(0)
            )
            both = merged.weight, bias.astype(base.weight.dtype)
        else:
            made, both = merged, (merged.weight, summed(base.bias, bias, BACKEND))
        return eqx.tree_at(lambda each: (each.weight, each.bias), made, both)  # type: ignore[no-any-return]

    def save_adapter(self, path: str | PathLike[str], state: State | None = None) -> None:
        """Write the mixture alone, without the base, to a file that every framework opens.

        Args:
            path: the file.
            state: of the mixture's gate, if it has one.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
            GateError: a gate with a state, and none given.
        """
        arrays = {**self.adapter.parameters, **self.adapter.buffers(state)}
        named = {f"adapter.{name}": each for name, each in arrays.items()}
        held = Adapters({"": self.config}, {"": named})
        save_checkpoint(path, self.config.block, held.to_dict(), held.named())

    def load_adapter(self, path: str | PathLike[str], name: str | None = None) -> Self:
        """A layer with the values of a file, and the same base.

        Args:
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.

        Raises:
            CheckpointError: not a file of adapters, or another layer's; lists every difference.
            GateError: a gate with a state, which cannot be replaced here.
        """
        if self.is_stateful():
            raise GateError(
                "a gate with a state is made together with it; got one of batch norm or balance. "
                "Use equinox.nn.make_with_state(ResidualExperts.from_adapter)(base, path)."
            )
        config, arrays = self._read_adapter(path, self.config, name)
        adapter = MuMoE.restore(config.layer, arrays)
        return eqx.tree_at(lambda each: each.adapter, self, adapter)  # type: ignore[no-any-return]

    @classmethod
    def from_adapter(
        cls,
        base: Callable[..., Array],
        path: str | PathLike[str],
        name: str | None = None,
        *,
        axis_name: Hashable = None,
    ) -> Self:
        """A base with the mixture of a file.

        Args:
            base: as for the constructor.
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.
            axis_name: as for the constructor.

        Raises:
            CheckpointError: not a file of adapters, or no such module.
            SpecError: a base that is not called, or of other sizes.
        """
        config, arrays = cls._read_adapter(path, None, name)
        check_base(config, base)
        adapter = MuMoE.restore(config.layer, arrays, axis_name=axis_name)
        return built(cls, _Held, config, base, adapter)

    def _adapter_arrays(self) -> Mapping[str, Array]:
        return self.adapter.parameters


class _Held(ResidualExperts):
    """Made of parts that exist already."""

    def __init__(self, config: ResidualConfig, base: Any, adapter: MuMoE) -> None:
        self.config = config
        self._takes_coefficients(base)
        self.base = base
        self.adapter = adapter


def adapter_filter(model: Any) -> Any:
    """Booleans in the place of a model's leaves: the parameters of its adapters, and no others.

    ``eqx.partition(model, adapter_filter(model))`` gives what is trained, and what is not.

    Args:
        model: a pytree that holds :class:`ResidualExperts`, or is one.

    Raises:
        SpecError: a model without any.

    >>> import jax
    >>> linear = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    >>> model = ResidualExperts(linear, experts=3, rank=2, key=jax.random.key(1))
    >>> trained, frozen = eqx.partition(model, adapter_filter(model))
    >>> sum(leaf.size for leaf in jax.tree.leaves(trained)) == model.num_parameters
    True
    """
    found = False

    def mark(node: Any) -> Any:
        nonlocal found
        if not isinstance(node, ResidualExperts):
            return False
        found = True
        none = jax.tree.map(lambda _: False, node)
        trained = jax.tree.map(eqx.is_inexact_array, node.adapter)
        return eqx.tree_at(lambda each: each.adapter, none, trained)

    marked = jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, ResidualExperts))
    if not found:
        raise SpecError(
            f"the model must hold ResidualExperts; {type(model).__name__} has none. Put them "
            "around its layers first."
        )
    return marked

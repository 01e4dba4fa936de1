"""A frozen layer and a mixture that is added to its outputs, on NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from tensormoe import functional
from tensormoe._residual_layers import ResidualMethods
from tensormoe.backend import Array
from tensormoe.factorizations import FactorizationLike
from tensormoe.functional import Options
from tensormoe.gates import Gate
from tensormoe.mixtures import (
    ResidualConfig,
    add_residual,
    check_base,
    residual_config,
    start_at_zero,
)
from tensormoe.selection import Budget
from tensormoe_numpy._adapter import BACKEND
from tensormoe_numpy._base import Given
from tensormoe_numpy._layer import MuMoE
from tensormoe_numpy._like_numpy import NumpyLikeBackend
from tensormoe_numpy._random import checked_dtype, checked_generator, draw

Base = Callable[[Array], Array]


class ResidualExperts(ResidualMethods[Array]):
    """A frozen layer, and a mixture of low-rank experts that is added: ``y = base(x) + μMoE(x)``.

    It runs, and its mixture is saved and loaded. The mixture's outputs start at exactly zero. For
    gradients, ``layer.adapter.vjp`` takes the output's cotangent times ``scale``.

    Args:
        base: any layer or function from (..., in) to (..., out).
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
        dtype: of the mixture; inputs must have it.
        seed: of the initial values; a NumPy generator is drawn from.

    Attributes:
        base: as given.
        adapter: the mixture, a :class:`MuMoE`.
        config: the mixture and its scale as a frozen value.

    Raises:
        SpecError: a base that is not called, sizes, names or options that cannot be.
        RankError: a rank that does not fit the factorization.
        BudgetError: an impossible budget; the message names the smallest feasible one.

    >>> import numpy as np
    >>> weight = np.ones((32, 16), dtype="float32")
    >>> layer = ResidualExperts(lambda x: x @ weight, 32, 16, experts=8, rank=4, seed=0)
    >>> float(layer(np.ones((5, 32), dtype="float32")).min())
    32.0
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND
    _layer: ClassVar[type[MuMoE]] = MuMoE

    base: Base
    adapter: MuMoE

    def __init__(
        self,
        base: Base,
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
        dtype: npt.DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        options = Options(experts, factorization, rank, budget, bias, gate)
        config = residual_config(base, in_features, out_features, options, scale)
        generator, kind = checked_generator(seed), checked_dtype(dtype)
        arrays = draw(config.layer, kind, generator, init, self.backend)

        def uniform(shape: tuple[int, ...]) -> Array:
            return self.backend.from_host(generator.uniform(-1.0, 1.0, shape).astype(kind))

        arrays |= start_at_zero(config.layer, arrays, uniform, self.backend)
        adapter = self._layer.__new__(self._layer)
        adapter._hold(config.layer, arrays, generator)
        self._hold(config, base, adapter)

    def _hold(self, config: ResidualConfig, base: Base, adapter: MuMoE) -> None:
        self.config = config
        self.base = base
        self.adapter = adapter

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The dtype of the mixture; inputs must have it."""
        return self.adapter.dtype

    def coefficients(self, x: Array) -> tuple[Array, ...]:
        """The coefficients of inputs (..., in): one array (..., N_e) per level.

        Raises:
            ShapeError: the input does not fit, or there is no gate.
        """
        return self.adapter.coefficients(x)

    def __call__(self, x: Array, coefficients: Given | None = None) -> Array:
        """Run both, and add.

        Args:
            x: (..., in), in the mixture's dtype.
            coefficients: ready-made ones of the mixture; its gate makes them otherwise.

        Returns:
            (..., out), in the dtype of the base's output.

        Raises:
            BackendError: no array of the library, or none that the base returns.
            ShapeError: input, coefficients or the base's output do not fit.
        """
        functional.check_input(x, self.in_features, self.dtype, self.backend)
        y, made = self.base(x), self.adapter(x, coefficients)
        return add_residual(self.config, y, made, self.backend)

    def load_adapter(self, path: str | PathLike[str], name: str | None = None) -> Self:
        """Take the values of a file over, and return the layer itself; the base stays.

        Args:
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.

        Raises:
            CheckpointError: not a file of adapters, or another layer's; lists every difference.
        """
        config, arrays = self._read_adapter(path, self.config, name)
        self.adapter = self._layer.restore(config.layer, arrays)
        return self

    @classmethod
    def from_adapter(cls, base: Base, path: str | PathLike[str], name: str | None = None) -> Self:
        """A base with the mixture of a file.

        Args:
            base: as for the constructor.
            path: the file, whichever framework wrote it.
            name: path of the module, in a file of several.

        Raises:
            CheckpointError: not a file of adapters, or no such module.
            SpecError: a base that is not called, or of other sizes.
        """
        config, arrays = cls._read_adapter(path, None, name)
        check_base(config, base)
        layer = cls.__new__(cls)
        layer._hold(config, base, cls._layer.restore(config.layer, arrays))
        return layer

    def _adapter_arrays(self) -> Mapping[str, Array]:
        return self.adapter.arrays

    def _dtype_text(self) -> str:
        return f"dtype={self.dtype.name!r}"

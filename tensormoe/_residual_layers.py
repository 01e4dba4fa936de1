"""Methods of every framework's frozen layers with a mixture that is added to their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import ClassVar, Generic, TypeVar

from tensormoe._html import layer_html
from tensormoe._layers import LayerMethods
from tensormoe._spec import LayerSpec
from tensormoe.backend import Backend
from tensormoe.checkpoint import save_checkpoint
from tensormoe.errors import SpecError
from tensormoe.mixtures import (
    Adapters,
    ResidualConfig,
    adapter_of,
    fixed_delta,
    merged_experts,
    read_adapters,
)

A = TypeVar("A")


# a plain base first: Python changes no object's class, as fully_shard does, where Generic is first
class _Plain:
    """Notebooks show these layers."""

    _repr_html_ = layer_html


class ResidualMethods(_Plain, Generic[A]):
    """Methods of frozen layers with a mixture that is added to their outputs."""

    backend: ClassVar[Backend]
    config: ResidualConfig
    base: object

    @property
    def spec(self) -> LayerSpec:
        """Sizes and factorization of the mixture."""
        return self.config.layer.spec

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.spec.out_features

    @property
    def scale(self) -> float:
        """Factor of the mixture's outputs."""
        return self.config.scale

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included; the base has none."""
        return self.config.num_parameters

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.base!r}, {self.config.arguments()}, {self._dtype_text()})"
        )

    def _takes_coefficients(self, base: object) -> bool:
        """Whether the base is given the mixture's coefficients: a layer of the same experts.

        Raises:
            SpecError: a layer that needs coefficients, of other experts, or a mixture with a gate.
        """
        if not isinstance(base, LayerMethods) or base.config.gate is not None:
            return False
        layer = self.config.layer
        if layer.gate is not None or base.spec.experts != layer.spec.experts:
            raise SpecError(
                f"a base without a gate must share coefficients: experts={base.spec.experts} and "
                f"gate=None; got experts={layer.spec.experts} and gate={layer.gate!r}."
            )
        return True

    def _merged_experts(self, coefficients: object, held: Mapping[str, A]) -> dict[str, A]:
        """Arrays of the base, whose experts are routed as the mixture's are, with W_n + ΔW_n."""
        if coefficients is not None:
            raise SpecError(
                "experts that a router chooses are merged one by one; got coefficients. Leave "
                "them out."
            )
        assert isinstance(self.base, LayerMethods)
        arrays = self._whole_arrays()
        return merged_experts(self.config, self.base.config, held, arrays, self.backend)

    def _check_linear(self, linear: bool) -> None:
        if not linear:
            raise SpecError(
                "the base must be a linear layer, or dense experts, to be merged with what is "
                f"added; got a {type(self.base).__name__}. Keep the layer, or save the mixture "
                "alone with save_adapter."
            )

    def delta(self, coefficients: Sequence[A] | A | None = None) -> tuple[A, A | None]:
        """The matrix (in, out) and the bias (out,) that the mixture adds for fixed coefficients.

        Args:
            coefficients: (N_e,) per level, the same for all inputs; None for the only expert.

        Returns:
            Both times ``scale``, in float32 at least; None for a mixture without a bias.

        Raises:
            BackendError: coefficients of another library.
            ShapeError: coefficients that are not (N_e,) per level.
            SpecError: none given, and more than one expert or a gate whose coefficients are not
                one.
        """
        return fixed_delta(self.config, self._whole_arrays(), coefficients, self.backend)

    def save_adapter(self, path: str | PathLike[str]) -> None:
        """Write the mixture alone, without the base, to a file that every framework opens.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
        """
        held = self._held()
        save_checkpoint(path, self.config.block, held.to_dict(), held.named())

    def _held(self) -> Adapters:
        arrays = {f"adapter.{name}": each for name, each in self._adapter_arrays().items()}
        return Adapters({"": self.config}, {"": arrays})

    @classmethod
    def _read_adapter(
        cls, path: str | PathLike[str], config: ResidualConfig | None, name: str | None
    ) -> tuple[ResidualConfig, Mapping[str, A]]:
        """Configuration and arrays of an adapter in a file, by the names that its layer has."""
        return adapter_of(read_adapters(path, cls.backend), config, name)

    def _adapter_arrays(self) -> Mapping[str, A]:
        """Parameters and buffers of the mixture by canonical name."""
        raise NotImplementedError

    def _whole_arrays(self) -> Mapping[str, A]:
        """The same, all entries of each in this process."""
        return self._adapter_arrays()

    def _dtype_text(self) -> str:
        raise NotImplementedError

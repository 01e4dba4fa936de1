"""Methods of every framework's layers and blocks: all that follows from a configuration and arrays.

A framework's classes inherit from these, and say how its arrays are held: in attributes, as
parameters of a module, as leaves of a pytree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import ClassVar, Generic, Self, TypedDict, TypeVar

from tensormoe import functional
from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._html import layer_html
from tensormoe._mixture import MixtureConfig
from tensormoe._spec import LayerSpec
from tensormoe.backend import Backend, Convolves
from tensormoe.checkpoint import check_arrays, check_config, read_block, save_checkpoint
from tensormoe.mixtures import ConvConfig, ConvPlan, SoftConfig, expert_kernel
from tensormoe.planning import Cost, Library, Plan

A = TypeVar("A")
C = TypeVar("C", bound=LayerConfig | BlockConfig | MixtureConfig)
M = TypeVar("M", bound=MixtureConfig)


class Costs(TypedDict):
    """Arguments of a configuration's ``cost`` that depend on the framework."""

    itemsize: int
    library: Library


class Configured:
    """Layers and blocks of a configuration."""

    # the name in checkpoints, also of classes that users or wrappers derive
    _kind: ClassVar[str]

    config: LayerConfig | BlockConfig | MixtureConfig

    _repr_html_ = layer_html

    @property
    def num_parameters(self) -> int:
        """Trainable entries, the gate's included."""
        return self.config.num_parameters


# a plain base first: Python changes no object's class, as fully_shard does, where Generic is first
class Methods(Configured, Generic[A, C]):
    """Methods of layers and blocks."""

    _dtypes: ClassVar[Collection[object]]

    backend: ClassVar[Backend]
    config: C

    def cost(self, batch: int, *, training: bool = False) -> Cost:
        """Cost of one call for ``batch`` inputs, gate and activation included.

        It is counted from the steps of an eager call on its own library: on the CPU for
        PyTorch, and before XLA fuses them for JAX. Peak memory is that of a gate whose logits
        differ; a wide gate that was never trained needs less for its coefficients.

        Args:
            batch: number of inputs, all leading axes multiplied.
            training: forward and backward with all gradients, instead of forward alone.

        Raises:
            PlanError: the batch is not a size.
        """
        return self.config.cost(batch, training=training, **self._costs())

    def save(self, path: str | PathLike[str]) -> None:
        """Write a checkpoint that every backend opens; an interrupted save leaves the old file.

        Raises:
            CheckpointError: the folder is missing or the file cannot be written.
            SpecError: a block whose activation has no name.
        """
        save_checkpoint(path, self._kind, self._saved_config().to_dict(), self._saved_arrays())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The layer or block of a checkpoint, whichever backend wrote it.

        Raises:
            CheckpointError: not a checkpoint, another kind of layer, or arrays that do not fit; the
                message lists every difference.
        """
        return cls.restore(*cls._read(path))

    @classmethod
    def restore(cls, config: C, arrays: Mapping[str, A]) -> Self:
        """A layer or block of arrays that exist already; they are used as they are, not copied.

        Args:
            config: the layer or block.
            arrays: parameters and buffers by canonical name.

        Raises:
            BackendError: arrays of another library.
            CheckpointError: names or shapes that are not the layer's; lists every difference.
            ShapeError: parameters of different dtypes, or of one that no layer has.
            SpecError: the configuration of another kind of layer.
        """
        cls._check(config, arrays)
        return cls._of_arrays(config, arrays)

    @classmethod
    def _check(cls, config: C, arrays: Mapping[str, A]) -> None:
        check_config(config, cls._kind)
        check_arrays(config, arrays, cls.backend, cls._dtypes)

    def _saved_config(self) -> C:
        return self.config

    @classmethod
    def _read(cls, path: str | PathLike[str]) -> tuple[C, Mapping[str, A]]:
        raise NotImplementedError

    @classmethod
    def _of_arrays(cls, config: C, arrays: Mapping[str, A]) -> Self:
        """Make a layer of arrays that were checked."""
        raise NotImplementedError

    def _weights(self) -> Mapping[str, A]:
        """The factors by canonical name."""
        raise NotImplementedError

    def _saved_arrays(self) -> Mapping[str, A]:
        """Parameters and buffers by canonical name."""
        raise NotImplementedError

    def _dtype_text(self) -> str:
        """The last arguments of the constructor, for ``repr``."""
        raise NotImplementedError

    def _costs(self) -> Costs:
        raise NotImplementedError


class LayerMethods(Methods[A, LayerConfig]):
    """Methods of layers of one mixture."""

    @property
    def spec(self) -> LayerSpec:
        """Sizes and factorization."""
        return self.config.spec

    def __repr__(self) -> str:
        spec = self.spec
        options = (
            "" if self.config.indexed_input else f"bias={spec.bias}, gate={self.config.gate!r}, "
        )
        return (
            f"{type(self).__name__}({spec.in_features}, {spec.out_features}, {_experts(spec)}, "
            f"factorization={spec.factorization!r}, {options}{self._dtype_text()})"
        )

    def plan(self, batch: int) -> Plan:
        """Plan of the layer for ``batch`` inputs."""
        return self.config.plan(batch)

    def expert(self, *index: int) -> tuple[A, A | None]:
        """One expert's matrix (in, out) and bias (out,), without building 𝒲.

        It is differentiable where the framework differentiates.

        Args:
            index: one plain integer per level.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        return functional.expert_weight(self.config, self._weights(), index, self.backend)

    def materialize(self) -> tuple[A, A | None]:
        """𝒲 (experts…, in, out) and the biases (experts…, out), built explicitly: N·I·O entries."""
        return functional.materialize(self.config, self._weights(), self.backend)

    @classmethod
    def _read(cls, path: str | PathLike[str]) -> tuple[LayerConfig, Mapping[str, A]]:
        return read_block(path, cls._kind, LayerConfig, cls.backend)


class LinearSizes:
    """Sizes of a layer that takes the place of a linear one."""

    config: LayerConfig

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.config.spec.in_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.config.spec.out_features


class EmbeddingSizes:
    """Sizes of a layer that takes the place of an embedding table."""

    config: LayerConfig

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.config.spec.in_features

    @property
    def embedding_dim(self) -> int:
        """Size of an embedding."""
        return self.config.spec.out_features


class BlockMethods(Methods[A, BlockConfig]):
    """Methods of blocks: of two layers with one gate, and an activation between."""

    act: object

    def __repr__(self) -> str:
        first, second = self.config.first.spec, self.config.second.spec
        gated = "gated=True, " if self.config.gated else ""
        return (
            f"{type(self).__name__}({first.in_features}, {second.in_features}, "
            f"{second.out_features}, act_layer={self.config.act_layer or self.act!r}, "
            f"bias={first.bias}, drop={self._saved_config().drop}, {gated}{_experts(first)}, "
            f"factorization={(first.factorization, second.factorization)!r}, "
            f"gate={self.config.first.gate!r}, {self._dtype_text()})"
        )

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return self.config.first.spec.in_features

    @property
    def hidden_features(self) -> int:
        """Size between the layers: of what the second is given."""
        return self.config.hidden_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.config.second.spec.out_features

    def plan(self, batch: int) -> tuple[Plan, Plan]:
        """Plans of the two layers for ``batch`` inputs."""
        return self.config.plan(batch)

    def expert(self, *index: int) -> tuple[tuple[A, A | None], tuple[A, A | None]]:
        """One expert, an MLP of its own, as matrix and bias of both of its layers.

        The block with coefficient 1 for this expert computes ``act(x @ W1 + b1) @ W2 + b2``, and if
        it is gated ``(act(g) * u) @ W2 + b2`` with ``g`` and ``u`` the halves of ``x @ W1 + b1``.
        It is differentiable where the framework differentiates.

        Args:
            index: one plain integer per level.

        Returns:
            ``(W1, b1), (W2, b2)``: (in, hidden) and (hidden,), twice as many columns if the block
            is gated; (hidden, out) and (out,). Biases are None where the block has none.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        first, second = self._layers()
        return first.expert(*index), second.expert(*index)

    def materialize(self) -> tuple[tuple[A, A | None], tuple[A, A | None]]:
        """The experts of both layers, built explicitly: of each as :meth:`MuMoE.materialize`."""
        first, second = self._layers()
        return first.materialize(), second.materialize()

    @classmethod
    def _read(cls, path: str | PathLike[str]) -> tuple[BlockConfig, Mapping[str, A]]:
        return read_block(path, cls._kind, BlockConfig, cls.backend)

    def _layers(self) -> tuple[LayerMethods[A], LayerMethods[A]]:
        raise NotImplementedError


class MixtureMethods(Methods[A, M]):
    """Methods of mixtures whose experts are run one by one."""

    _config_kind: ClassVar[type[MixtureConfig]]

    @property
    def in_features(self) -> int:
        """Size of a token."""
        return self.config.in_features

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return self.config.out_features

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.arguments()}, {self._dtype_text()})"

    @classmethod
    def _read(cls, path: str | PathLike[str]) -> tuple[M, Mapping[str, A]]:
        config, arrays = read_block(path, cls._kind, cls._config_kind, cls.backend)
        return config, arrays  # type: ignore[return-value]


class SoftMethods(MixtureMethods[A, SoftConfig]):
    """Methods of soft mixtures, whose tokens come in sets."""

    def cost(self, batch: int, *, sets: int = 1, training: bool = False) -> Cost:
        """Cost of one call for ``batch`` tokens in ``sets`` sets of one size, all with N · p slots.

        Args:
            batch: number of tokens, all leading axes multiplied.
            sets: number of sets, all leading axes but that of the tokens multiplied.
            training: forward and backward with all gradients, instead of forward alone.

        Raises:
            PlanError, SpecError: not a size, or tokens that so many sets cannot share.
        """
        return self.config.cost(batch, sets=sets, training=training, **self._costs())


class ConvMethods(MixtureMethods[A, ConvConfig]):
    """Methods of factorized convolutions, whose inputs are images."""

    _channels_first: ClassVar[bool]

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.config.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.config.out_channels

    def cost(
        self, batch: int, *, size: Sequence[int] | None = None, training: bool = False
    ) -> Cost:
        """Cost of one call for ``batch`` images of one size, the gate included.

        Args:
            batch: number of images, all leading axes multiplied.
            size: of an image, without channels; must be given.
            training: forward and backward with all gradients, instead of forward alone.

        Raises:
            PlanError, ShapeError, SpecError: sizes that cannot be.
        """
        return self.config.cost(batch, size=size, training=training, **self._costs())

    def plan(self, size: Sequence[int], images: int = 1) -> ConvPlan:
        """Plan of images of one size: over patches, by a convolution, or with own kernels.

        Args:
            size: of an image, without channels.
            images: how many.

        Raises:
            ShapeError, SpecError: sizes that cannot be.
        """
        first = isinstance(self.backend, Convolves) and self.backend.channels_first
        library = self._costs()["library"]
        return self.config.plan(size, images, library=library, channels_first=first)

    def expert(self, *index: int) -> tuple[A, A | None]:
        """One expert's kernel in the framework's layout and bias (out,), without building 𝒲.

        It is differentiable where the framework differentiates. Kernels are (out, in, *size) where
        channels come first, and (*size, in, out) elsewhere.

        Args:
            index: one plain integer per level.

        Raises:
            ShapeError: another number of levels, or an index out of range.
        """
        found = functional.expert_weight(
            self.config.experts, self._named_factors(), index, self.backend
        )
        return self._kernels(*found)

    def materialize(self) -> tuple[A, A | None]:
        """The kernels (experts…, …) of all experts as :meth:`expert`; biases (experts…, out)."""
        found = functional.materialize(self.config.experts, self._named_factors(), self.backend)
        return self._kernels(*found)

    def _kernels(self, matrix: A, bias: A | None) -> tuple[A, A | None]:
        window, first = self.config.window, self._channels_first
        return expert_kernel(window, matrix, bias, self.backend, channels_first=first)

    def _named_factors(self) -> Mapping[str, A]:
        """The factors of the experts, ``factors.…``."""
        return {name.removeprefix("experts."): each for name, each in self._weights().items()}


def check_constructor(kind: type, override: str) -> None:
    """Refuse a user's class whose constructor would be left out.

    Args:
        kind: a class of the library, or derived from one.
        override: the classmethod that a class with a constructor of its own must override.

    Raises:
        TypeError: it has one.
    """
    library = next(each for each in kind.__mro__ if "_kind" in vars(each))
    if kind.__init__ is not library.__init__:  # type: ignore[misc]
        raise TypeError(
            f"a layer made of a configuration must have the constructor of {library.__name__}; got "
            f"{kind.__qualname__} with one of its own. Override its classmethod {override}."
        )


def _experts(spec: LayerSpec) -> str:
    return f"experts={spec.experts[0] if spec.levels == 1 else spec.experts}"

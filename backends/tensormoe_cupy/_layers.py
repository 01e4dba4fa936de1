"""NumPy's layers on CuPy's arrays."""

from __future__ import annotations

from typing import ClassVar

import tensormoe_numpy
from tensormoe_cupy._adapter import BACKEND
from tensormoe_numpy import NumpyLikeBackend


class MuMoE(tensormoe_numpy.MuMoE):
    """A multilinear mixture of linear experts (Oldfield et al. 2024), on an NVIDIA GPU.

    Arguments, attributes, methods and errors are those of :class:`tensormoe_numpy.MuMoE`, gradients
    and preparation for inference included; a seed gives the same initial values. Arrays come and go
    as CuPy's, and parameters are made on CuPy's current device. A call queues work there and waits
    for none of it.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = MuMoE(64, 10, experts=32, factorization="cp", rank=16, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 7, 64), dtype="float32")).shape  # doctest: +SKIP
    (5, 7, 10)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class MuMoEMLP(tensormoe_numpy.MuMoEMLP):
    """A μMoE block in place of an MLP (Oldfield et al. 2024, section 3), on an NVIDIA GPU.

    All is as in :class:`tensormoe_numpy.MuMoEMLP`, on CuPy's arrays. Which entries are dropped in
    training is drawn on the host, as initial values are, and copied to the device.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> block = MuMoEMLP(32, 64, experts=16, seed=0)  # doctest: +SKIP
    >>> block(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND
    _layer: ClassVar[type[tensormoe_numpy.MuMoE]] = MuMoE


class MuMoEEmbedding(tensormoe_numpy.MuMoEEmbedding):
    """A mixture of embedding tables, on an NVIDIA GPU.

    All is as in :class:`tensormoe_numpy.MuMoEEmbedding`, on CuPy's arrays; but ids are not looked
    at, and those out of range wrap around.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> table = MuMoEEmbedding(1000, 32, experts=4, rank=8, seed=0)  # doctest: +SKIP
    >>> even = cupy.full((2, 3, 4), 0.25, dtype="float32")  # doctest: +SKIP
    >>> table(cupy.array([[1, 5, 7], [2, 2, 999]]), even).shape  # doctest: +SKIP
    (2, 3, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class SparseMoE(tensormoe_numpy.SparseMoE):
    """A sparse mixture of experts, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = SparseMoE(32, 64, experts=8, top_k=2, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class SoftMoE(tensormoe_numpy.SoftMoE):
    """A soft mixture of experts, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = SoftMoE(32, 64, experts=8, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 7, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 7, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class ProductMoE(tensormoe_numpy.ProductMoE):
    """Very many small experts, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = ProductMoE(32, experts=(20, 30), top_k=4, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class MonetMoE(tensormoe_numpy.MonetMoE):
    """Experts that are composed of halves, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = MonetMoE(32, 4, experts=16, top_k=4, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class CartesianMoE(tensormoe_numpy.CartesianMoE):
    """A Cartesian product of experts, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = CartesianMoE(32, 16, experts=8, top_k=2, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class DiverseMoE(tensormoe_numpy.DiverseMoE):
    """A sparse mixture of experts of different sizes, on an NVIDIA GPU: the forward pass.

    All is as on NumPy. A call waits for the device once, to read how many tokens each size has.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = DiverseMoE(32, 64, experts=8, top_k=2, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class MultiGateMoE(tensormoe_numpy.MultiGateMoE):
    """A multi-gate mixture of experts, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = MultiGateMoE(32, 16, 8, tasks=3, experts=4, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 3, 8)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND


class ResidualExperts(tensormoe_numpy.ResidualExperts):
    """A frozen layer and a mixture that is added, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = ResidualExperts(lambda x: 2 * x, 32, 32, experts=8, rank=4)  # doctest: +SKIP
    >>> layer(cupy.ones((5, 32), dtype="float32")).shape  # doctest: +SKIP
    (5, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND
    _layer: ClassVar[type[tensormoe_numpy.MuMoE]] = MuMoE


class ConvMoE(tensormoe_numpy.ConvMoE):
    """A factorized mixture of convolutions, on an NVIDIA GPU: the forward pass, as on NumPy.

    Raises:
        BackendError: no NVIDIA GPU or driver, or arrays of another library.

    >>> import cupy  # doctest: +SKIP
    >>> layer = ConvMoE(16, 32, kernel_size=3, experts=8, padding=1, seed=0)  # doctest: +SKIP
    >>> layer(cupy.ones((4, 28, 28, 16), dtype="float32")).shape  # doctest: +SKIP
    (4, 28, 28, 32)
    """

    backend: ClassVar[NumpyLikeBackend] = BACKEND

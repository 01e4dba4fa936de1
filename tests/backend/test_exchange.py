"""Arrays go from each library to each other one: in the same memory, as a copy, or not at all."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from itertools import product
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

import tensormoe_numpy
from tensormoe import CP, Gate, TensorRing, backend_of, convert
from tensormoe.backend import loaded_backend
from tensormoe.errors import BackendError, CheckpointError, MissingDependencyError, ShapeError
from tests._cupy_standin import ADAPTER, ON_DEVICE, installed, randomize
from tests._third_party import code_blocks, write_metadata
from tests._third_party import installed as installed_site

jax = pytest.importorskip("jax")
jnp = jax.numpy
torch = pytest.importorskip("torch")
tensormoe_torch = pytest.importorskip("tensormoe_torch")

HOST = ["numpy", "torch", "jax", "array_api_strict"]
LIBRARIES = [*HOST, "cupy"]
PAIRS = list(product(LIBRARIES, LIBRARIES))


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """CuPy on its stand-in, and a third party's backend that says nothing of DLPack."""
    site = tmp_path_factory.mktemp("site-packages")
    (site / "tensormoe_strict.py").write_text(code_blocks("docs/adding-a-backend.md", "python")[0])
    project = tomllib.loads(code_blocks("docs/adding-a-backend.md", "toml")[0])["project"]
    write_metadata(site, project)
    with installed(), installed_site(site):
        yield


def aligned(values: Any) -> np.ndarray:
    """An array of NumPy's where XLA too takes it as it is: at a multiple of 64 bytes."""
    array = np.asarray(values)
    buffer = np.zeros(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    found = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


def made(values: Any, library: str) -> Any:
    """An array of a library, in fresh memory."""
    makers = {
        "numpy": aligned,
        "torch": torch.tensor,
        "jax": jnp.array,
        "cupy": ADAPTER.module.asarray,
        "array_api_strict": lambda each: strict.asarray(aligned(each)),
    }
    return makers[library](np.asarray(values))


def numpy_of(array: Any) -> np.ndarray:
    return ADAPTER.module.asnumpy(array) if ADAPTER.owns(array) else np.asarray(array)


def place(array: Any) -> int:
    """Where the memory begins."""
    if isinstance(array, torch.Tensor):
        return int(array.data_ptr())
    if isinstance(array, jax.Array):
        return int(array.unsafe_buffer_pointer())
    return int(np.asarray(array).ctypes.data)


def sees(source: str, target: str) -> bool:
    """Whether arrays go over at all: no other library sees a device that is not there."""
    return source == target or source != "cupy" or target == "numpy"


VALUES = [
    np.random.default_rng(0).standard_normal((3, 4)).astype("float32"),
    np.arange(6, dtype="int32").reshape(2, 3),
    np.array([True, False]),
    np.array(2.5, "float32"),
    np.zeros((0, 3), "float32"),
]


@pytest.mark.skipif(ON_DEVICE, reason="which libraries see the device is for each machine to say")
class TestEveryPair:
    @pytest.mark.parametrize(("source", "target"), PAIRS)
    @pytest.mark.parametrize("copy", [None, True])
    def test_values_are_kept(self, source: str, target: str, copy: bool | None) -> None:
        arrays = {str(place): made(each, source) for place, each in enumerate(VALUES)}
        if "array_api_strict" not in (source, target):
            # a dtype that the standard does not have
            arrays["half"] = made(np.ones(3, "float16"), source)
        if not sees(source, target):
            with pytest.raises(BackendError, match=r"'0' must be an array that .* device"):
                convert(arrays, target, copy=copy)
            return
        found = convert(arrays, target, copy=copy)
        assert list(found) == list(arrays)
        for got, before in zip(found.values(), arrays.values(), strict=True):
            want = numpy_of(before)
            assert backend_of(got).name == target
            assert (numpy_of(got).shape, numpy_of(got).dtype) == (want.shape, want.dtype)
            np.testing.assert_array_equal(numpy_of(got), want)
            assert np.array_equal(numpy_of(convert(got, target)), want)

    @pytest.mark.parametrize(("source", "target"), list(product(HOST, HOST)))
    def test_memory(self, source: str, target: str) -> None:
        array = made(VALUES[0], source)
        # constants of a library are copied for those that would write to them
        constant = source == "jax" and target in ("torch", "array_api_strict")
        assert (place(convert(array, target)) == place(array)) == (not constant)
        assert place(convert(array, target, copy=False)) == place(array)
        copied = convert(array, target, copy=True)
        assert place(copied) != place(array)
        if target == "numpy":
            assert copied.flags.writeable
            assert convert(array, target).flags.writeable == (source != "jax")

    @pytest.mark.parametrize("target", HOST)
    def test_a_device_is_not_shared_with_the_host(self, target: str) -> None:
        with pytest.raises(BackendError, match="allow a copy"):
            convert(made(VALUES[0], target), "cupy", copy=False)
        with pytest.raises(BackendError, match="allow a copy"):
            convert(made(VALUES[0], "cupy"), target, copy=False)


@pytest.mark.parametrize("target", ["torch", "jax"])
class TestWhatIsCopiedOfNumpys:
    """What cannot be shared: read-only where nothing is, strides and orders of bytes."""

    def check(self, array: Any, target: str, shares: bool = False) -> None:
        found = convert(array, target)
        np.testing.assert_array_equal(np.asarray(found), array)
        assert place(found) != place(array)
        if shares:
            assert place(convert(array, target, copy=False)) == place(array)
            return
        with pytest.raises(BackendError, match=r"the array must be .* allow a copy"):
            convert(array, target, copy=False)

    def test_read_only(self, target: str) -> None:
        array = aligned(VALUES[0])
        array.flags.writeable = False
        self.check(array, target, shares=target == "torch")

    def test_reversed(self, target: str) -> None:
        self.check(aligned(VALUES[0])[::-1], target)

    def test_foreign_bytes(self, target: str) -> None:
        self.check(VALUES[0].astype(">f4"), target)

    def test_scalars(self, target: str) -> None:
        found = convert(np.float32(1.5), target)
        assert (found.shape, float(found)) == ((), 1.5)


def test_strides_that_jax_lacks_are_copied() -> None:
    array = aligned(VALUES[0])[:, ::2]
    np.testing.assert_array_equal(convert(array, "jax"), array)
    np.testing.assert_array_equal(convert(torch.from_numpy(array), "jax"), array)
    with pytest.raises(BackendError, match="striding"):
        convert(array, "jax", copy=False)


def test_constants_stay_what_they_are() -> None:
    array = jnp.arange(4.0)
    convert(array, "torch").fill_(9.0)
    with pytest.raises(ValueError, match="read-only"):
        convert(array, "numpy")[0] = 9.0
    convert(array, "numpy", copy=True)[0] = 9.0
    np.testing.assert_array_equal(array, np.arange(4.0))


def test_bfloat16_goes_where_it_is_known() -> None:
    tensor = torch.tensor([1.0, 2.5], dtype=torch.bfloat16)
    found = convert(tensor, "jax")
    assert (found.dtype, found.tolist()) == (jnp.bfloat16, [1.0, 2.5])
    assert torch.equal(convert(found, "torch"), tensor)
    for array in (tensor, found):
        with pytest.raises(BackendError, match=r"numpy can take .*bfloat16 .*Cast it"):
            convert(array, "numpy")
    with pytest.raises(BackendError, match=r"torch can take from numpy.*bfloat16 .*Cast it"):
        convert(np.asarray(found), "torch")


@pytest.mark.parametrize("dtype", ["float64", "int64"])
@pytest.mark.parametrize("source", ["numpy", "torch"])
def test_jax_narrows_nothing(dtype: str, source: str) -> None:
    array = made(np.ones(3, dtype), source)
    for copy in (None, True, False):
        with pytest.raises(BackendError, match=f"{dtype} needs JAX's 64-bit mode"):
            convert(array, "jax", copy=copy)
    with jax.enable_x64(True):
        assert convert(array, "jax").dtype == dtype


class TestErrors:
    def test_differentiated_tensors(self) -> None:
        layer = tensormoe_torch.MuMoE(3, 2, experts=2, rank=1)
        with pytest.raises(BackendError, match=r"'factors.input': .*requires grad. Call .detach"):
            convert({"factors.input": layer.factors["input"]}, "numpy")
        assert set(convert(layer.state_dict(), "numpy")) == set(layer.state_dict())

    def test_arrays_without_values(self) -> None:
        with pytest.raises(BackendError, match=r"the array: .* traced one of float32.*outside"):
            jax.jit(lambda x: convert(x, "torch"))(jnp.ones(3))
        with pytest.raises(BackendError, match="inside a transformation"):
            torch.func.vmap(lambda x: convert(x, "numpy"))(torch.ones(3, 2))
        with torch._subclasses.FakeTensorMode():
            fake = torch.ones(3)
        with pytest.raises(BackendError, match="got FakeTensor"):
            convert(fake, "numpy")
        with pytest.raises(BackendError, match="device meta"):
            convert(torch.ones(3, device="meta"), "jax")
        with pytest.raises(BackendError, match="plain and dense"):
            convert(torch.eye(2).to_sparse(), "numpy")

    def test_what_is_no_array(self) -> None:
        with pytest.raises(BackendError, match="'a' must be an array of a known library"):
            convert({"a": [1.0]}, "numpy")
        with pytest.raises(BackendError, match="backend must be one of"):
            convert(np.ones(3), "tensorflow")
        with pytest.raises(BackendError, match="copy must be True, False or None; got 'never'"):
            convert(np.ones(3), "torch", copy="never")  # type: ignore[call-overload]
        with pytest.raises(BackendError, match="float and complex"):
            convert(np.array(["a"]), "torch")

    def test_a_library_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tensormoe.backend._registry._installed", lambda name: name != "torch")
        loaded_backend.cache_clear()
        with pytest.raises(MissingDependencyError, match=r"tensormoe\[torch\]"):
            convert(np.ones(3), "torch")

    def test_a_library_without_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if ON_DEVICE:
            pytest.skip("there is one")
        runtime = ADAPTER.module.cuda.runtime
        monkeypatch.setattr(runtime, "getDeviceCount", lambda: 0)
        with pytest.raises(BackendError, match="must have an NVIDIA GPU"):
            convert(np.ones(3), "cupy")


class TestRestoredInPyTorch:
    """PyTorch's layers of tensors that exist already, as NumPy's have them."""

    def test_a_layer_trains_what_it_was_given(self) -> None:
        gate = Gate(normalization="batch", bias=True)
        layer = randomize(tensormoe_numpy.MuMoE(5, 4, (3, 2), TensorRing(2), gate=gate))
        tensors = convert(layer.arrays, "torch")
        there = tensormoe_torch.MuMoE.restore(layer.config, tensors)
        assert there.config == layer.config
        for name, tensor in there.state_dict().items():
            assert tensor.data_ptr() == layer.arrays[name].ctypes.data, name
        assert all(each.requires_grad and each.is_leaf for each in there.parameters())
        before = layer.parameters["factors.input"].copy()
        there(torch.ones(2, 5)).sum().backward()
        torch.optim.SGD(there.parameters(), 0.1).step()
        assert not np.array_equal(layer.parameters["factors.input"], before)
        # and the given tensors are as they were otherwise
        assert not any(tensor.requires_grad for tensor in tensors.values())

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_every_class(self, dtype: str) -> None:
        layers: list[Any] = [
            tensormoe_numpy.MuMoE(5, 4, (3, 2), CP(2), gate=None, dtype=dtype),
            tensormoe_numpy.MuMoEMLP(5, 6, experts=3, rank=2, drop=0.5, dtype=dtype),
            tensormoe_numpy.MuMoEEmbedding(7, 4, 3, rank=2, dtype=dtype),
        ]
        for layer in layers:
            kind = getattr(tensormoe_torch, type(layer).__name__)
            there = kind.restore(layer.config, convert(layer.arrays, "torch"))
            assert repr(there.config) == repr(layer.config)
            back = type(layer).restore(there.config, convert(there.state_dict(), "numpy"))
            for name, array in back.arrays.items():
                assert array.ctypes.data == layer.arrays[name].ctypes.data

    def test_what_does_not_fit(self) -> None:
        layer = tensormoe_torch.MuMoE(5, 4, 3, CP(2))
        arrays = layer.state_dict()
        restore = tensormoe_torch.MuMoE.restore
        with pytest.raises(CheckpointError, match=r"'factors.bias' .*missing"):
            restore(layer.config, {k: v for k, v in arrays.items() if k != "factors.bias"})
        with pytest.raises(BackendError, match=r"factors.input must be an array of torch"):
            restore(layer.config, arrays | {"factors.input": np.ones((5, 2), "float32")})
        with pytest.raises(ShapeError, match=r"one dtype of torch.float16.*'factors.input'"):
            restore(layer.config, arrays | {"factors.input": torch.ones(5, 2).double()})
        with pytest.raises(ShapeError, match=r"one dtype of .*got torch.int64"):
            restore(layer.config, {name: each.long() for name, each in arrays.items()})
        with pytest.raises(BackendError, match=r"one device; got meta for 'factors.input'"):
            restore(layer.config, arrays | {"factors.input": torch.ones(5, 2, device="meta")})
        with pytest.raises(BackendError, match=r"factors.input must be a plain, dense array"):
            restore(layer.config, arrays | {"factors.input": torch.ones(5, 2).to_sparse()})

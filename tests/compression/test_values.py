"""Numbers on their way from file to file: dtypes, layouts, budgets, and the memory they take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tensormoe import CP, Hadamard, LayerSpec, TensorRing, TensorTrain, Tucker, functional
from tensormoe.compression import Compression, Pattern, compress_checkpoint, plan_compression
from tensormoe.compression._values import decoded, encoded
from tensormoe.decomposition import decompose
from tensormoe.decomposition._gauge import even, orthonormal
from tensormoe.testing import reconstruct, reconstruct_by_einsum
from tests._compress_models import PATTERN, experts, save
from tests._python import run_python


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_is_rounded_as_pytorch_rounds(values: list[float]) -> None:
    wide = np.array(values, "float32")
    ours = torch.frombuffer(bytearray(encoded(wide, "bfloat16")), dtype=torch.bfloat16)
    theirs = torch.tensor(wide).to(torch.bfloat16)
    # what they round to infinity is the largest number here
    theirs = theirs.clamp(-3.3895313892515355e38, 3.3895313892515355e38)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    back = decoded(encoded(wide, "bfloat16"), "bfloat16")
    np.testing.assert_array_equal(back, theirs.float().numpy())


def test_every_bfloat16_comes_back() -> None:
    bits = np.arange(2**16, dtype="<u2")
    wide = decoded(bits.tobytes(), "bfloat16")
    finite = np.isfinite(wide)
    assert finite.sum() == 2**16 - 2 * 2**7
    assert encoded(wide[finite], "bfloat16") == bits[finite].tobytes()
    theirs = torch.tensor(bits.view("<i2")).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide, theirs)


def test_float16_holds_what_is_too_large_for_it() -> None:
    found = decoded(encoded(np.array([1e6, -1e6, 1.0001, 65504], "float32"), "float16"), "float16")
    np.testing.assert_array_equal(found, [65504, -65504, 1, 65504])


def test_factors_of_one_size_make_the_same_network(rng: np.random.Generator) -> None:
    factors = {"a": 1e-6 * rng.standard_normal((3, 4)), "b": 1e8 * rng.standard_normal((4, 5))}
    found = even(factors)
    np.testing.assert_allclose(found["a"] @ found["b"], factors["a"] @ factors["b"])
    sizes = [abs(array).max() for array in found.values()]
    assert sizes[0] == pytest.approx(sizes[1])


@pytest.mark.parametrize(
    ("kind", "experts", "changed"),
    [
        (Tucker((3, 4, 5)), (4,), 3),
        (Tucker((2, 2, 4, 5)), (3, 4), 4),
        (TensorTrain((3, 4)), (4,), 2),
        (TensorTrain((6, 4)), (4,), 1),
        (TensorRing((2, 3, 4)), (4,), 0),
        (CP(5), (4,), 0),
        (Hadamard(), (4,), 0),
    ],
)
def test_orthonormal_factors_make_the_same_tensor(
    kind: Any, experts: tuple[int, ...], changed: int, rng: np.random.Generator
) -> None:
    network = LayerSpec(7, 8, experts, kind, bias=False).network
    factors = {name: rng.standard_normal(shape) for name, shape in network.shapes.items()}
    found = orthonormal(network.terms[0], factors)
    tensor = reconstruct_by_einsum(kind, factors)
    np.testing.assert_allclose(reconstruct_by_einsum(kind, found), tensor, atol=1e-12)
    assert {name: each.shape for name, each in found.items()} == dict(network.shapes)
    square = 0
    for array in found.values():
        for axis in range(array.ndim):
            matrix = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
            square += np.allclose(matrix.T @ matrix, np.eye(matrix.shape[1]), atol=1e-12)
    assert square == changed


def test_nearly_dependent_factors_survive_16_bits(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors as a search for large Tucker networks ends with, made by hand."""
    from tensormoe.compression import _stack

    decompose = _stack.decompose
    bad = np.eye(5, dtype="float32") * 1e-3 + 1

    def bent(*given: Any, **named: Any) -> Any:
        found = decompose(*given, **named)
        # bonds: core (…, s), output (out, s)
        factors = dict(found.factors)
        factors["output"] = factors["output"] @ bad
        factors["core"] = factors["core"] @ np.linalg.inv(bad.T).astype("float32")
        return replace(found, factors=factors)

    monkeypatch.setattr(_stack, "decompose", bent)
    tensors = {key: each.bfloat16() for key, each in experts(rng).items()}
    model = save(tmp_path / "m.safetensors", tensors)
    given = np.stack([each.float().numpy().T for each in tensors.values()])
    wanted = Compression("tucker", rank=(3, 4, 5), experts=PATTERN)
    (report,) = compress_checkpoint(model, tmp_path / "out", wanted).groups
    assert report.error < decompose(given, "tucker", rank=(3, 4, 5)).report.error + 5e-3


def stored(output: Path, file: str | None) -> np.ndarray:
    """A group's tensor from the factors in its file, by code that is not ours."""
    assert file is not None
    from safetensors import safe_open

    with safe_open(output / file, "pt") as opened:
        config = functional.LayerConfig.from_dict(json.loads(opened.metadata()["config"]))
    factors = {
        name.rpartition("factors.")[2]: array.double().numpy()
        for name, array in load_file(output / file).items()
    }
    return reconstruct(config.spec.factorization, factors)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_errors_are_those_of_what_is_stored(
    dtype: torch.dtype, scale: float, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {key: (scale * each).to(dtype) for key, each in experts(rng).items()}
    given = np.stack([each.double().numpy().T for each in tensors.values()])
    model = save(tmp_path / "m.safetensors", tensors)
    for dense in (False, True):
        wanted = Compression("tucker", rank=(3, 4, 5), experts=PATTERN, dense=dense)
        output = tmp_path / f"out{dense}"
        (report,) = compress_checkpoint(model, output, wanted).groups
        if dense:
            found = load_file(output / "m.safetensors")
            assert {each.dtype for each in found.values()} == {dtype}
            tensor = np.stack([found[key].double().numpy().T for key in tensors])
        else:
            assert report.file is not None
            assert {each.dtype for each in load_file(output / report.file).values()} == {dtype}
            tensor = stored(output, report.file)
        whole = np.linalg.norm(given)
        assert report.error == pytest.approx(np.linalg.norm(given - tensor) / whole, rel=1e-4)
        lost = np.linalg.norm(given - tensor, axis=(1, 2)) / np.linalg.norm(given, axis=(1, 2))
        assert report.expert_errors == pytest.approx(lost, rel=1e-4)
        # and 16 bits lose little of what the factors hold
        best = decompose(given, "tucker", rank=(3, 4, 5)).report.error
        assert report.error < 1.02 * best + 4e-3


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("stacked", [False, True])
def test_layouts(
    layout: str,
    stacked: bool,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read and written back through pieces of a few rows, an exact rank gives every entry back."""
    from tensormoe.compression import _shards, _values

    monkeypatch.setattr(_values, "_ENTRIES", 16)
    monkeypatch.setattr(_shards, "_CHUNK", 48)
    tensor = np.einsum("nr,ir,or->nio", *(rng.standard_normal((k, 2)) for k in (5, 6, 7)))
    array = torch.tensor(tensor if layout == "in_out" else tensor.swapaxes(1, 2).copy())
    tensors = (
        {"a.experts.w": array} if stacked else {f"a.experts.{k}.w": array[k] for k in range(5)}
    )
    model = save(tmp_path / "m.safetensors", tensors)
    pattern = "experts.w" if stacked else "experts.*.w"
    for dense in (False, True):
        wanted = Compression("cp", rank=2, experts=(pattern,), layout=layout, dense=dense)
        (report,) = compress_checkpoint(model, tmp_path / f"out{dense}", wanted).groups
        assert (report.experts, report.in_features, report.out_features) == (5, 6, 7)
        assert report.error < 1e-6
    found = load_file(tmp_path / "outTrue" / "m.safetensors")
    for key, each in tensors.items():
        torch.testing.assert_close(found[key], each)
    np.testing.assert_allclose(stored(tmp_path / "outFalse", report_file(tmp_path)), tensor)


def report_file(folder: Path) -> str:
    manifest = json.loads((folder / "outFalse" / "tensormoe.json").read_text())
    return str(manifest["groups"][0]["file"])


def test_budgets(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = experts(rng) | experts(rng, rows=12, layer=1)
    model = save(tmp_path / "m.safetensors", tensors)

    def planned(**wanted: Any) -> list[int | None]:
        plan = plan_compression(model, Compression("tucker", experts=PATTERN, **wanted))
        assert plan.dense_entries == 576
        assert all(each.parameters <= (each.budget or 576) for each in plan.groups)
        return [each.budget for each in plan.groups]

    assert planned(budget=0.25) == [48, 96]
    # a number is shared out by sizes
    assert planned(budget=300) == [100, 200]
    assert planned(rank=2) == planned(tolerance=0.5) == [None, None]
    tolerant = Compression("tucker", tolerance=0.5, experts=PATTERN)
    result = compress_checkpoint(model, tmp_path / "out", tolerant)
    assert all(report.error <= 0.5 for report in result.groups)
    assert result.parameters < 576


@pytest.mark.parametrize(
    ("pattern", "key", "found"),
    [
        ("layers.*.experts.*.w1", "layers.3.moe.x.experts.12.w1", 12),
        ("layers.*.experts.*.w1", "m.layers.3.experts.0.w1.weight", 0),
        ("layers.*.experts.*.w1", "layers.experts.0.w1", None),
        ("layers.*.experts.*.w1", "layers.3.experts.07.w1", None),
        ("layers.*.experts.*.w1", "layers.3.experts.7.w1.bias", None),
        ("layers.*.experts.*.w1", "layers.3.my_experts.7.w1", None),
        ("experts.*.w*", "experts.7.w13", 7),
        ("experts.*.*_proj", "experts.7.up_proj.weight", 7),
        ("experts.{expert}.*", "experts.7.mlp.w.weight", 7),
        ("experts.{expert}.*.w", "experts.7.3.w", 7),
        ("e[0-9].*.w", "e1.7.w", None),
        ("w", "w", None),
    ],
)
def test_patterns(pattern: str, key: str, found: int | None) -> None:
    number = Pattern(pattern).number(key)
    assert (None if number is None else number[1]) == found
    if number is not None:
        assert number[0].replace("*", str(found), 1) == key


# every stage of a search, and few sweeps of each: memory is that of one
_MEASURED = """
import sys
from functools import partial
from tensormoe.compression import Compression, _stack, compress_checkpoint, plan_compression

_stack.Search = partial(_stack.Search, sweeps=3, polish=2)
model, output, name, budget, dense = sys.argv[1:]
wanted = Compression(name, budget=float(budget), experts=("experts.*.w",), dense=dense == "dense")
least = plan_compression(model, wanted).memory
compress_checkpoint(model, output, wanted, max_memory=least)
with open("/proc/self/status") as status:
    peak, = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(least, 1024 * peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("name", "budget", "dense"),
    [
        ("tensor_ring", 0.02, "dense"),
        ("cp", 0.03, "factors"),
        ("tucker", 0.02, "dense"),
        ("shared_basis", 0.1, "dense"),
        ("base_delta", 0.15, "factors"),
    ],
)
def test_memory_stays_below_what_is_promised(
    name: str, budget: float, dense: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    count, rows, columns, other = 8, 768, 2048, 300 * 2**20
    size = 2 * rows * columns
    entries: dict[str, Any] = {"other": {"dtype": "F8_E4M3", "shape": [other]}}
    entries["other"]["data_offsets"] = [count * size, count * size + other]
    for k in range(count):
        place = {"data_offsets": [k * size, (k + 1) * size]}
        entries[f"experts.{k}.w"] = {"dtype": "BF16", "shape": [columns, rows], **place}
    head = json.dumps(entries).encode()
    model = tmp_path / "m.safetensors"
    with open(model, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _ in range(count):
            matrix = rng.standard_normal((columns, rows), dtype="float32")
            file.write(encoded(matrix, "bfloat16"))
        # larger than what may be held, and of a dtype that nobody needs to know
        file.truncate(8 + len(head) + count * size + other)
    done = run_python("-c", _MEASURED, model, tmp_path / "out", name, budget, dense)
    assert done.returncode == 0, done.stderr
    promised, peak = map(int, done.stdout.split())
    assert peak < promised < min(2.2 * peak, other)

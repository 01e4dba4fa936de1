"""Experts compressed into few bits: what is on disk, how large it is, and how far off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tensormoe import CP, Hadamard, LayerSpec, TensorRing
from tensormoe.checkpoint import peek_checkpoint
from tensormoe.cli import main
from tensormoe.compression import Compression, compress_checkpoint, plan_compression
from tensormoe.compression._bits import entries_for, full_bytes, layer_bytes
from tensormoe.compression._measure import GroupReport
from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe_torch import MuMoE
from tensormoe_torch.compression._calibrate_checkpoint import calibrate_checkpoint
from tensormoe_torch.compression._text import TextWindows
from tests._calibrated import save_model, save_text
from tests._compress_models import PATTERN, content, experts, save, save_shards
from tests._rounded import stored

BITS = pytest.mark.parametrize("bits", [8, 4])


def sizable(rng: np.random.Generator, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Experts that have something in common, as keys and matrices."""
    shared = torch.tensor(rng.standard_normal((40, 32)), dtype=torch.float32)
    found = experts(rng, 6, rows=32, columns=40)
    return {key: (shared + 0.3 * each).to(dtype) for key, each in found.items()}


def tensor(tensors: dict[str, Any]) -> np.ndarray:
    return np.stack([each.double().numpy().T for each in tensors.values()])


def wanted(name: str, **options: Any) -> Compression:
    return Compression(name, experts=PATTERN, **options)


@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["tucker", "low_rank", "dense"])
def test_files_hold_codes_and_errors_are_theirs(
    name: str, dtype: torch.dtype, bits: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = sizable(rng, dtype)
    model = save(tmp_path / "m.safetensors", tensors)
    budget = None if name == "dense" else 0.25
    chosen = wanted(name, budget=budget, bits=bits)
    plan = plan_compression(model, chosen)
    result = compress_checkpoint(model, tmp_path / "out", chosen)
    (report,) = result.groups
    assert report.file is not None
    path = tmp_path / "out" / report.file
    arrays = load_file(path)
    # bytes, to the byte
    held = sum(each.nbytes for each in arrays.values())
    assert held == report.nbytes == result.nbytes
    assert held <= plan.factor_bytes
    assert report.dense_bytes == sum(each.nbytes for each in tensors.values())
    if budget is not None:
        assert held <= budget * report.dense_bytes
    assert (report.bits, peek_checkpoint(path).bits) == (bits, bits)
    # errors, by a decoder that is not ours
    given = tensor(tensors)
    missing = given - stored(path)
    error = np.linalg.norm(missing) / np.linalg.norm(given)
    assert report.error == pytest.approx(error, rel=1e-3)
    each = np.linalg.norm(missing, axis=(1, 2)) / np.linalg.norm(given, axis=(1, 2))
    np.testing.assert_allclose(report.expert_errors, each, rtol=1e-3)
    loaded, _ = MuMoE.load(path).materialize()
    rounding = 1e-2 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(
        loaded.detach().double(), torch.tensor(stored(path)), rtol=rounding, atol=8 * rounding
    )


@BITS
def test_scales_that_float16_hardly_holds(
    bits: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {key: (1e-4 * each).half() for key, each in sizable(rng, torch.float32).items()}
    model = save(tmp_path / "m.safetensors", tensors)
    (report,) = compress_checkpoint(model, tmp_path / "out", wanted("dense", bits=bits)).groups
    assert report.file is not None
    given = tensor(tensors)
    missing = given - stored(tmp_path / "out" / report.file)
    assert report.error == pytest.approx(np.linalg.norm(missing) / np.linalg.norm(given), rel=1e-3)
    assert report.error < (0.02 if bits == 8 else 0.12)


def test_nearly_dependent_factors_survive_8_bits(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors as a search for large Tucker networks ends with, made by hand."""
    from tensormoe.decomposition import _runs

    fit = _runs.fit
    bad = np.eye(5, dtype="float32") * 1e-2 + 1

    def bent(*given: Any, **named: Any) -> Any:
        found = fit(*given, **named)
        factors = dict(found.factors)
        factors["output"] = factors["output"] @ bad
        factors["core"] = factors["core"] @ np.linalg.inv(bad.T).astype("float32")
        return replace(found, factors=factors)

    model = save(tmp_path / "m.safetensors", sizable(rng, torch.float32))
    chosen = wanted("tucker", rank=(3, 4, 5), bits=8, compare=False)
    (plain,) = compress_checkpoint(model, tmp_path / "plain", chosen).groups
    monkeypatch.setattr(_runs, "fit", bent)
    (report,) = compress_checkpoint(model, tmp_path / "out", chosen).groups
    assert report.error == pytest.approx(plain.error, abs=1e-3)


@BITS
def test_dense_is_plain_rounding_and_needs_no_budget(
    bits: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = sizable(rng)
    model = save(tmp_path / "m.safetensors", tensors)
    (report,) = compress_checkpoint(model, tmp_path / "out", wanted("dense", bits=bits)).groups
    assert report.controls == ()
    assert report.nbytes == report.dense_parameters * (bits + 0.25) / 8
    assert report.error < (0.01 if bits == 8 else 0.11)
    share = (bits + 0.25) / 16
    fits = wanted("dense", bits=bits, budget=share + 1e-6)
    assert compress_checkpoint(model, tmp_path / "fits", fits).groups[0].error == report.error
    with pytest.raises(BudgetError, match=f"dense of {bits} bits takes .* bytes; the budget"):
        plan_compression(model, replace(fits, budget=share - 0.01))
    with pytest.raises(RankError, match="fewer entries"):
        plan_compression(model, wanted("dense"))


@BITS
@pytest.mark.parametrize("name", ["low_rank", "dense"])
def test_rebuilt_matrices_are_those_of_the_rounded_factors(
    name: str, bits: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = sizable(rng, torch.float32)
    model = save_shards(tmp_path / "model", tensors)
    chosen = wanted(name, budget=None if name == "dense" else 0.3, bits=bits)
    factors = compress_checkpoint(model, tmp_path / "factors", chosen)
    dense = compress_checkpoint(model, tmp_path / "dense", replace(chosen, dense=True))
    found = {}
    for path in (tmp_path / "dense").glob("*.safetensors"):
        found |= load_file(path)
    assert {key: (each.shape, each.dtype) for key, each in found.items()} == {
        key: (each.shape, each.dtype) for key, each in tensors.items()
    }
    (report,) = factors.groups
    assert report.file is not None
    np.testing.assert_allclose(
        tensor(found), stored(tmp_path / "factors" / report.file), rtol=1e-4, atol=1e-5
    )
    assert dense.groups[0].error == pytest.approx(report.error, rel=1e-5)
    assert dense.nbytes == factors.nbytes
    if name == "dense":
        # no more than as many levels as codes have, in each group of 64
        groups = tensor(found).astype("float32").reshape(-1, 64)
        assert max(len(np.unique(each)) for each in groups) <= 2**bits


def test_few_bits_allow_more_entries(tmp_path: Path, rng: np.random.Generator) -> None:
    model = save(tmp_path / "m.safetensors", sizable(rng))
    parameters = [
        plan_compression(model, wanted("cp", budget=0.25, bits=bits)).parameters
        for bits in (None, 16, 8, 4)
    ]
    assert parameters[0] == parameters[1]
    assert parameters[2] / parameters[0] == pytest.approx(16 / 8.25, rel=0.03)
    assert parameters[3] / parameters[0] == pytest.approx(16 / 4.25, rel=0.03)
    # numbers are of entries, whatever their bits
    numbers = {
        plan_compression(model, wanted("cp", budget=2000, bits=bits)).parameters
        for bits in (None, 8, 4)
    }
    assert len(numbers) == 1


@settings(max_examples=8)
@given(
    size=st.integers(40, 20_000),
    bits=st.sampled_from([8, 4]),
    itemsize=st.sampled_from([2, 4]),
    bias=st.booleans(),
)
@pytest.mark.parametrize("name", ["cp", "tensor_ring", "low_rank"])
def test_budgets_of_bytes_are_kept_and_used(
    name: str, size: int, bits: int, itemsize: int, bias: bool
) -> None:
    from tensormoe.decomposition._choose import candidates

    sizes = (17, 13, (5,))
    try:
        count = entries_for(name, sizes, size, bits, itemsize, bias)
    except BudgetError:
        # rank 1 has more
        kind = {"cp": CP(1), "tensor_ring": TensorRing(1)}.get(name)
        if kind is not None:
            assert layer_bytes(LayerSpec(*sizes, kind, bias=bias), bits, itemsize) > size - 32
        return
    specs = [LayerSpec(*sizes, each, bias=bias) for each in candidates(name, sizes, count, bias)]
    assert all(layer_bytes(spec, bits, itemsize) <= size for spec in specs)
    # what groups that are not full lose is all that may be left: of each factor one, of 4 bits
    group = 8 * bits + itemsize
    left = size - count * group / 64
    assert left <= group * (1 + max(len(spec.shapes) for spec in specs))


@given(entries=st.integers(60, 4000), bits=st.sampled_from([8, 4]))
def test_shares_of_entries_become_shares_of_bytes(entries: int, bits: int) -> None:
    from tensormoe.decomposition._choose import candidates

    sizes = (17, 13, (5,))
    size = full_bytes(entries + 200, bits, 2)
    count = entries_for(("cp", "low_rank"), sizes, size, bits, 2)
    for name in ("cp", "low_rank"):
        for kind in candidates(name, sizes, count, False):
            spec = LayerSpec(*sizes, kind, bias=False)
            assert layer_bytes(spec, bits, 2) <= size


def test_what_cannot_be(tmp_path: Path, rng: np.random.Generator) -> None:
    model = save(tmp_path / "m.safetensors", sizable(rng, torch.float32))
    with pytest.raises(SpecError, match="bits must be 16, 8, 4 or None"):
        wanted("cp", rank=2, bits=5)
    with pytest.raises(SpecError, match="can't be promised with 8 bits"):
        wanted("cp", tolerance=0.1, bits=8)
    with pytest.raises(SpecError, match="16 bits are of models in bfloat16 or float16; got float"):
        plan_compression(model, wanted("cp", rank=2, bits=16))
    with pytest.raises(RankError, match=r"fewer bytes than the experts' 30,720; got .* of 8 bits"):
        plan_compression(model, wanted("tucker", rank=(6, 200, 200), bits=8))
    assert plan_compression(model, wanted("hadamard", budget=0.9, bits=8)).groups[0].specs == (
        LayerSpec(32, 40, 6, Hadamard(), bias=False),
    )
    for small in (1e-9, 1e-3):
        with pytest.raises(BudgetError):
            plan_compression(model, wanted("cp", budget=small, bits=4))


def test_a_killed_compression_goes_on_and_other_bits_are_another_command(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    first = sizable(rng)
    model = save_shards(tmp_path / "model", first, experts(rng, 6, rows=24, layer=1))
    chosen = wanted("cp", budget=0.5, bits=8, compare=False)
    compress_checkpoint(model, tmp_path / "whole", chosen)

    def stop(now: Any) -> None:
        if now.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(model, tmp_path / "out", chosen, callback=stop)
    with pytest.raises(Exception, match="bits was 8 and is 4"):
        compress_checkpoint(model, tmp_path / "out", replace(chosen, bits=4))
    compress_checkpoint(model, tmp_path / "out", chosen)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    manifest = json.loads((tmp_path / "out" / "tensormoe.json").read_text())
    assert manifest["command"]["bits"] == 8
    assert [each["bits"] for each in manifest["groups"]] == [8, 8]
    again = compress_checkpoint(model, tmp_path / "out", chosen)
    assert again.nbytes == sum(each["nbytes"] for each in manifest["groups"])


def test_commands_without_bits_are_those_of_before(tmp_path: Path) -> None:
    assert "bits" not in wanted("cp", rank=2).to_dict()
    report = GroupReport(
        "a", None, 2, 3, 4, "bfloat16", 1, 24, 9, 0.1, (0.1, 0.1), (), None, "converged"
    )
    before = {k: v for k, v in report.to_dict().items() if k not in ("bits", "nbytes")}
    assert GroupReport.from_dict(before) == report
    assert (report.nbytes, report.dense_bytes) == (18, 48)


def test_workers_write_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    model = save_shards(tmp_path / "model", sizable(rng))
    chosen = wanted("low_rank", budget=0.3, bits=4, compare=False)
    compress_checkpoint(model, tmp_path / "here", chosen)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as own:
        compress_checkpoint(model, tmp_path / "there", chosen, client=own)
    assert content(tmp_path / "here") == content(tmp_path / "there")


def test_the_command_says_bytes(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m.safetensors", sizable(rng))
    words = ["compress", str(model), "--experts", PATTERN[0], "--factorization", "low-rank"]
    words += ["--budget", "25%", "--bits", "8"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "25% of the experts' bytes" in shown
    assert "8 bits: 15 KiB → ≤" in shown
    assert main([*words, "--output", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["bits"] == 8
    assert found["factor_bytes"] <= 0.25 * found["dense_bytes"] == 0.25 * 15360
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    share = found["factor_bytes"] / found["dense_bytes"]
    assert f"({share:.1%}), scales included" in capsys.readouterr().out
    assert "rounded to 8 bits" in (tmp_path / "out" / "README.md").read_text()
    for text in ("5", "eight", ""):
        assert main([*words[:-1], text]) == 2
        assert "--bits must be 8, 4, 16 or auto" in capsys.readouterr().err
    dense = ["compress", str(model), "--experts", PATTERN[0], "--factorization", "dense"]
    assert main([*dense, "--bits", "4", "--dry-run"]) == 0
    assert "dense, in 4 bits" in capsys.readouterr().out


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    save_model(folder / "model")
    save_text(folder / "text.txt")
    options: Any = {"windows": TextWindows(12, 16), "per_expert": True, "dtype": "float64"}
    found = calibrate_checkpoint(folder / "model", folder / "text.txt", fisher=True, **options)
    found.save(folder / "c.safetensors")
    return folder


@BITS
@pytest.mark.parametrize("share", ["equal", "sensitivity"])
@pytest.mark.parametrize("name", ["auto", ("cp", "low_rank"), "low_rank"])
def test_choices_and_shares_keep_to_the_bytes(
    name: Any, share: str, bits: int, calibrated: Path, tmp_path: Path
) -> None:
    path = str(calibrated / "c.safetensors")
    options: Any = {"calibration": path, "share": share, "preset": "mixtral", "compare": False}
    chosen = Compression(name, budget=0.3, bits=bits, **options)
    result = compress_checkpoint(calibrated / "model", tmp_path / "out", chosen)
    held = sum(
        each.nbytes
        for file in (tmp_path / "out" / "experts").iterdir()
        for each in load_file(file).values()
    )
    assert held == result.nbytes <= 0.3 * result.dense_bytes
    assert result.predicted_loss is not None
    if share == "equal":
        assert all(each.nbytes <= 0.3 * each.dense_bytes for each in result.groups)
    if name == "low_rank":
        loss = compress_checkpoint(
            calibrated / "model", tmp_path / "plain", replace(chosen, bits=None)
        ).predicted_loss
        assert loss is not None
        # twice the entries lose less
        assert result.predicted_loss < loss


@BITS
def test_errors_of_outputs_are_those_of_rounded_factors(
    bits: int, calibrated: Path, tmp_path: Path
) -> None:
    path = str(calibrated / "c.safetensors")
    wanted = Compression("low_rank", rank=6, calibration=path, preset="mixtral", compare=False)
    plain, rounded = (
        compress_checkpoint(calibrated / "model", tmp_path / str(each), replace(wanted, bits=each))
        for each in (None, bits)
    )
    for before, after in zip(plain.groups, rounded.groups, strict=True):
        assert before.output_error is not None
        assert after.output_error is not None
        assert after.output_error > before.output_error
        assert after.nbytes < 0.6 * before.nbytes

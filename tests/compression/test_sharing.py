"""Factorizations chosen stack by stack, and one budget shared out by what a model loses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tensormoe.cli import main
from tensormoe.compression import (
    Calibration,
    Compression,
    compress_checkpoint,
    plan_compression,
    predicted_loss,
)
from tensormoe.compression._sharing import LEAST, MOST, Form, loss_curve, shared
from tensormoe.decomposition import decompose
from tensormoe.errors import CheckpointError, SpecError
from tensormoe.selection._allocate_solve import Point
from tensormoe_numpy import MuMoE
from tests._calibrated import calibrated_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated_folder(tmp_path_factory.mktemp("shared"))


def settings(folder: Path, **changes: Any) -> Compression:
    wanted = Compression(
        ("low_rank", "cp", "shared_basis"), budget=0.4, preset="mixtral", compare=False
    )
    options = {"calibration": str(folder / "fisher.safetensors")} | changes
    return replace(wanted, **options)


def stacks(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model" / "model.safetensors")
    found: dict[str, Any] = {}
    for number in range(4):
        for key, array in tensors.items():
            if f"experts.{number}." in key:
                name = key.replace(f"experts.{number}.", "experts.*.")
                found.setdefault(name, []).append(array.T)
    return found


@pytest.mark.parametrize("kind", ["plain", "fisher"])
def test_a_curve_is_what_products_of_every_rank_lose(folder: Path, kind: str) -> None:
    import numpy as np

    calibration = Calibration.load(folder / f"{kind}.safetensors")
    weighting = "fisher" if kind == "fisher" else "inputs"
    layer = calibration.layers[1]
    for key, role in (("w1", "gate_proj"), ("w2", "down_proj")):
        name = f"model.layers.1.block_sparse_moe.experts.*.{key}.weight"
        stack = np.stack(stacks(folder)[name]).astype("float64")
        curve = loss_curve(stack, calibration, layer, role, itemsize=8)
        cost = len(stack) * sum(stack.shape[1:])
        for rank in (2, 5):
            moments = calibration.moments(layer, role, weighting)
            found = decompose(stack, "low_rank", rank=rank, moments=moments, compare=False)
            made = MuMoE.restore(found.config(), found.parameters)
            pairs = [(matrix, matrix - made.expert(n)[0]) for n, matrix in enumerate(stack)]
            loss = predicted_loss(calibration, layer, role, pairs)
            if loss is None:
                loss = calibration.output_error(layer, role, pairs) ** 2
            assert curve[rank].cost == 8 * rank * cost
            # what is fitted has a ridge, and experts of few rows have others' inputs too
            assert curve[rank].loss <= loss * 1.0001
            assert curve[rank].loss == pytest.approx(loss, rel=0.25)


def test_bytes_go_where_they_help_most() -> None:
    steep = [Point(k, 10.0 * 0.5**k, Form()) for k in range(21)]
    flat = [Point(k, 1.0 * 0.9**k, Form()) for k in range(21)]
    found = shared({"steep": steep, "flat": flat}, {"steep": 20, "flat": 20}, 20)
    sizes = {name: part.nbytes for name, part in found.items()}
    assert sum(sizes.values()) <= 20
    assert sizes["steep"] != sizes["flat"]
    for size in sizes.values():
        assert LEAST * 10 <= size <= MOST * 10
    alike = shared({"a": steep, "b": steep}, {"a": 20, "b": 20}, 20)
    assert abs(alike["a"].nbytes - alike["b"].nbytes) <= 1


def test_each_gets_the_form_that_loses_least() -> None:
    factors = [Point(k, 10.0 * 0.8**k, Form(8)) for k in range(21)]
    rounded = [Point(9, 0.1, Form(4, whole=True))]
    sizes = {"a": 40, "b": 40}
    # within ten bytes each, the experts themselves fit
    found = shared({"a": [*factors, *rounded], "b": factors}, sizes, 20, alike=True)
    assert {name: part.form for name, part in found.items()} == {
        "a": Form(4, whole=True),
        "b": Form(8),
    }
    assert [part.nbytes for part in found.values()] == [10, 10]
    # within eight they do not, unless the other one gets fewer
    curves = {"a": [*factors, *rounded], "b": [Point(k, 0.01, Form(8)) for k in range(21)]}
    assert shared(curves, sizes, 16, alike=True)["a"].form == Form(8)
    assert shared(curves, sizes, 16)["a"].form == Form(4, whole=True)


def test_every_stack_gets_the_factors_that_lose_least(folder: Path, tmp_path: Path) -> None:
    import tensormoe_torch.huggingface  # noqa: F401

    wanted, names = settings(folder), {"low_rank", "cp", "shared_basis"}
    result = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    for kind in names:
        one = replace(wanted, factorization=kind)
        alone = compress_checkpoint(folder / "model", tmp_path / kind, one)
        for mine, theirs in zip(result.groups, alone.groups, strict=True):
            assert mine.predicted_loss is not None
            assert theirs.predicted_loss is not None
            assert mine.predicted_loss <= theirs.predicted_loss * 1.05, (mine.name, kind)
    assert all(each.factorization in names for each in result.groups)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = {
        each.spec.factorization.name
        for layer in model.model.layers
        for each in layer.mlp.experts.projections.values()
    }
    assert kinds == {each.factorization for each in result.groups}
    plan = plan_compression(folder / "model", wanted)
    assert {spec.factorization.name for spec in plan.groups[0].specs} == names


def test_a_budget_is_shared_out_once(folder: Path, tmp_path: Path) -> None:
    wanted = settings(folder, share="sensitivity", factorization="low_rank")
    result = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    equal = compress_checkpoint(
        folder / "model", tmp_path / "equal", replace(wanted, share="equal")
    )
    assert result.parameters <= 0.4 * result.dense_parameters
    sizes = [each.parameters for each in result.groups]
    assert sizes != [each.parameters for each in equal.groups]
    assert result.predicted_loss is not None
    assert equal.predicted_loss is not None
    assert result.predicted_loss < equal.predicted_loss
    again = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    assert [each.parameters for each in again.groups] == sizes


def test_an_interrupted_command_keeps_its_shares(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(folder, share="sensitivity", factorization="low_rank")
    whole = compress_checkpoint(folder / "model", tmp_path / "whole", wanted)
    calls = 0

    def stop(now: Any) -> None:
        nonlocal calls
        calls += now.search is None and not now.name.startswith("weighing")
        if calls > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="of 6 groups are done"):
        compress_checkpoint(folder / "model", tmp_path / "out", wanted, callback=stop)

    def never(*_: Any) -> Any:
        raise AssertionError("shares were kept")

    monkeypatch.setattr("tensormoe.compression._run.loss_curve", never)
    again = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    assert [e.parameters for e in again.groups] == [e.parameters for e in whole.groups]


def test_choices_that_cannot_be(folder: Path) -> None:
    for changes, message in (
        ({"share": "most"}, "share must be one of"),
        ({"share": "sensitivity", "calibration": None}, "got no calibration"),
        ({"share": "sensitivity", "budget": None, "rank": 3, "factorization": "cp"}, "no budget"),
        ({"budget": None, "rank": 3}, "within a budget"),
        ({"factorization": ("cp", "nothing")}, "nothing"),
        ({"factorization": ()}, "at least one"),
    ):
        with pytest.raises(SpecError, match=message):
            replace(settings(folder), **changes)
    other = settings(folder, share="sensitivity", calibration=str(folder / "text.txt"))
    with pytest.raises(CheckpointError):
        compress_checkpoint(folder / "model", folder / "never", other)
    assert not (folder / "never").exists()


def test_the_command_chooses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", str(folder / "model"), "--factorization", "low-rank,shared-basis"]
    words += ["--budget", "40%", "--calibration", str(folder / "fisher.safetensors")]
    words += ["--share", "sensitivity"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "low_rank or shared_basis, shared out by sensitivity" in shown
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "factors" in shown
    assert "low_rank" in shown
    assert main([*words, "--output", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["share"] == "sensitivity"
    assert {each["factorization"] for each in found["groups"]} <= {"low_rank", "shared_basis"}


def test_in_place_it_is_the_same(folder: Path) -> None:
    import copy

    from tensormoe_torch import compress

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    calibration = Calibration.load(folder / "fisher.safetensors")
    options: Any = {"budget": 0.4, "calibration": calibration}
    alone = {}
    for kind in ("low_rank", "cp"):
        alone[kind] = compress(copy.deepcopy(model), kind, **options)
    mine = copy.deepcopy(model)
    report = compress(mine, ("low_rank", "cp"), **options)
    for place, module in enumerate(report.modules):
        for k, each in enumerate(module.projections):
            others = [found.modules[place].projections[k] for found in alone.values()]
            assert each.predicted_loss is not None
            assert each.predicted_loss <= 1.05 * min(o.predicted_loss or 0.0 for o in others)
            assert {kind.name for kind, _ in each.report.tried} == {"low_rank", "cp"}
    shared_out = compress(copy.deepcopy(model), "low_rank", share="sensitivity", **options)
    assert shared_out.parameters[1] <= 0.4 * shared_out.parameters[0]
    assert shared_out.predicted_loss is not None
    assert alone["low_rank"].predicted_loss is not None
    assert shared_out.predicted_loss < alone["low_rank"].predicted_loss


def test_in_place_choices_that_cannot_be(folder: Path) -> None:
    from tensormoe_torch import compress

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    calibration = Calibration.load(folder / "plain.safetensors")
    for kind, options, message in (
        ("auto", {}, "within a budget"),
        ("auto", {"budget": 0.3, "rank": 2}, "within a budget"),
        ("cp", {"budget": 0.3, "share": "sensitivity"}, "no calibration"),
        ("cp", {"rank": 3, "share": "sensitivity", "calibration": calibration}, "got None"),
        ("cp", {"budget": 0.3, "share": "fair"}, "share must be"),
    ):
        wanted: Any = options
        with pytest.raises(SpecError, match=message):
            compress(model, kind, **wanted)


@pytest.mark.parametrize("share", ["equal", "sensitivity"])
@pytest.mark.parametrize("budget", [0.3, 0.55])
def test_bits_are_chosen_stack_by_stack(
    folder: Path, tmp_path: Path, share: str, budget: float
) -> None:
    import tensormoe_torch.huggingface  # noqa: F401

    wanted = settings(folder, bits="auto", share=share, budget=budget, factorization="low_rank")
    plan = plan_compression(folder / "model", wanted)
    result = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    assert result.nbytes <= budget * result.dense_bytes
    assert result.nbytes <= plan.factor_bytes * 1.01
    assert result.predicted_loss is not None
    for bits in (None, 8, 4):
        one = replace(wanted, bits=bits, share="equal")
        alone = compress_checkpoint(folder / "model", tmp_path / str(bits), one)
        assert alone.predicted_loss is not None
        assert result.predicted_loss <= 1.05 * alone.predicted_loss, bits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for report in result.groups:
        layer = model.model.layers[int(report.name.split(".")[2])].mlp.experts
        role = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}[report.name.split(".")[-2]]
        found = layer.projections[role]
        assert found.bits == report.bits
        assert found.spec.factorization.name == report.factorization
        assert found.spec.factorization.rank == report.rank


def test_rounded_experts_may_be_what_is_chosen(folder: Path, tmp_path: Path) -> None:
    wanted = settings(folder, bits="auto", budget=0.6, factorization="low_rank")
    result = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    # float32 on disk: 8 bits of the experts themselves take a quarter and lose next to nothing
    assert {(each.factorization, each.bits) for each in result.groups} == {("dense", 8)}
    text = (tmp_path / "out" / "README.md").read_text()
    assert "rounded to 8 bits" in text


def test_bits_are_chosen_in_place(folder: Path) -> None:
    import copy

    from tensormoe_torch import compress

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    calibration = Calibration.load(folder / "fisher.safetensors")
    options: Any = {"budget": 0.12, "calibration": calibration}
    mine = copy.deepcopy(model)
    report = compress(mine, "low_rank", bits="auto", share="sensitivity", **options)
    before, after = 0, 0
    for module in report.modules:
        for each in module.projections:
            before, after = before + each.nbytes[0], after + each.nbytes[1]
            layer = mine.get_submodule(module.name).projections[each.role]
            assert layer.bits == each.bits
    assert after <= 0.12 * before
    alone = compress(copy.deepcopy(model), "low_rank", bits=8, **options)
    assert report.predicted_loss is not None
    assert alone.predicted_loss is not None
    assert report.predicted_loss <= 1.05 * alone.predicted_loss


def test_bits_cannot_be_chosen_blindly(folder: Path) -> None:
    for changes in ({"calibration": None}, {"budget": 1000}, {"budget": None, "rank": 2}):
        with pytest.raises(SpecError, match="needs a calibration, and a budget that is a share"):
            settings(folder, bits="auto", factorization="low_rank", **changes)

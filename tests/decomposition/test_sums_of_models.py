"""Sums of networks, a base and deltas: in files, on the command line and in models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tensormoe import LayerSpec
from tensormoe.cli import main
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.decomposition import Search, decompose
from tensormoe.functional import LayerConfig
from tensormoe.testing import reconstruct
from tensormoe_numpy import MuMoE
from tensormoe_torch import compress
from tests._compress_models import PATTERN, experts, save
from tests._torch_moe import TOKENS, rebuilt, sparse
from tests.decomposition._cases import relative


def of_file(path: Path) -> tuple[LayerSpec, np.ndarray]:
    """A layer's spec and weights from its file, by code that is not ours."""
    with safe_open(path, "pt") as opened:
        config = LayerConfig.from_dict(json.loads(opened.metadata()["config"]))
    factors = {
        name.rpartition("factors.")[2]: array.double().numpy()
        for name, array in load_file(path).items()
    }
    return config.spec, reconstruct(config.spec.factorization, factors)


NAMED: list[Any] = [("base_delta", 2), ("shared_delta", 3), ("shared_basis", (2, 3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "rank"), NAMED)
def test_checkpoints_hold_what_was_found(
    name: str, rank: Any, dtype: torch.dtype, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {key: each.to(dtype) for key, each in experts(rng).items()}
    given = np.stack([each.double().numpy().T for each in tensors.values()])
    model = save(tmp_path / "m.safetensors", tensors)
    made = {}
    for dense in (False, True):
        wanted = Compression(name, rank=rank, experts=PATTERN, dense=dense)
        output = tmp_path / f"out{dense}"
        (report,) = compress_checkpoint(model, output, wanted).groups
        if dense:
            found = load_file(output / "m.safetensors")
            made[dense] = np.stack([found[key].double().numpy().T for key in tensors])
        else:
            assert report.file is not None
            spec, made[dense] = of_file(output / report.file)
            assert (spec.factorization.name, report.rank) == (name, rank)
            assert report.parameters == spec.num_parameters
        assert report.error == pytest.approx(relative(made[dense], given), rel=1e-4)
        each = [relative(a, b) for a, b in zip(made[dense], given, strict=True)]
        assert report.expert_errors == pytest.approx(each, rel=1e-4)
    if dtype == torch.float32:
        assert relative(made[True], made[False]) < 1e-6
    best = decompose(given, name, rank=rank).report.error
    for each in made.values():
        assert relative(each, given) < 1.02 * best + 4e-3


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("base-delta", "--rank", "2"), "base_delta"),
        (("base_delta", "--budget", "80%"), "base_delta"),
        (("shared-basis", "--rank", "2,3"), "shared_basis"),
        (("shared-basis", "--budget", "80%"), "shared_basis"),
    ],
    ids=" ".join,
)
def test_the_command_line(
    words: tuple[str, ...],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rng: np.random.Generator,
) -> None:
    tensors = experts(rng, rows=12)
    given = np.stack([each.double().numpy().T for each in tensors.values()])
    model = save(tmp_path / "m.safetensors", tensors)
    asked = [str(model), "--experts", *PATTERN, "--factorization", *words, "--json"]
    assert main(["compress", *asked, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main(["compress", *asked, "--output", str(tmp_path / "out")]) == 0
    done = json.loads(capsys.readouterr().out)
    (group,) = done["groups"]
    path = tmp_path / "out" / group["file"]
    spec, made = of_file(path)
    assert spec.factorization.name == name
    assert group["rank"] in said["groups"][0]["ranks"]
    assert group["parameters"] == spec.num_parameters <= said["groups"][0]["parameters"]
    if "--budget" in words:
        assert group["parameters"] <= 0.8 * given.size
    assert group["error"] == pytest.approx(relative(made, given), rel=1e-4)
    layer = MuMoE.load(path)
    np.testing.assert_allclose(layer.materialize()[0], made, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize(("kind", "rank"), NAMED[:2])
def test_a_model_of_sums_computes_what_its_dense_reconstruction_does(
    kind: str, rank: Any, name: str
) -> None:
    """The base is mixed by the sum of the router's weights, whatever that is."""
    model = sparse(name)
    original = copy.deepcopy(model)
    search = Search(sweeps=8, polish=1)
    report = compress(model, kind, rank=rank, inputs=TOKENS, search=search)
    wanted: Any = rebuilt(original, model)
    with torch.no_grad():
        found = model(TOKENS).logits
        torch.testing.assert_close(found, wanted(TOKENS).logits, rtol=1e-9, atol=1e-11)
        assert (found - original(TOKENS).logits).norm() > 0.01 * found.norm()
    for module in report.modules:
        assert all(each.rank == rank for each in module.projections)
        assert module.output_error is not None
    model(TOKENS).logits.square().sum().backward()
    factors = [each for key, each in model.named_parameters() if ".factors." in key]
    assert len(factors) == 9 * len(report.modules)
    assert all(each.grad is not None for each in factors)

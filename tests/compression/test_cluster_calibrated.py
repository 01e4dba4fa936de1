"""Compressions that are weighted by a calibration, by the workers of a Dask cluster."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from tensormoe.cli import main
from tensormoe.compression import (
    Calibration,
    Compression,
    compress_checkpoint,
)
from tensormoe.errors import CheckpointError
from tensormoe_torch.compression import TextWindows, calibrate_checkpoint
from tests._calibrated import save_model, save_text
from tests._compress_models import content
from tests.compression._clusters import Processes, after, continued, in_process, journal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    save_model(folder / "model")
    save_text(folder / "text.txt")
    options: Any = {"windows": TextWindows(6, 16), "per_expert": True, "fisher": True}
    found = calibrate_checkpoint(folder / "model", folder / "text.txt", **options)
    found.save(folder / "c.safetensors")
    return folder


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers in this process."""
    with in_process(workers=2) as found:
        yield found


def settings(folder: Path, **changes: Any) -> Compression:
    return Compression("cp", rank=4, calibration=str(folder / "c.safetensors"), **changes)


@pytest.mark.parametrize("weighting", ["inputs", "both", "fisher"])
def test_the_same_bytes_and_errors(
    weighting: str, folder: Path, tmp_path: Path, client: Client
) -> None:
    wanted = settings(folder, weighting=weighting, expert_weights="router")
    continued(folder / "model", tmp_path / "out", wanted, client=client)
    again = compress_checkpoint(folder / "model", tmp_path / "out", wanted)
    alone = compress_checkpoint(folder / "model", tmp_path / "out alone", wanted)
    assert again.groups == alone.groups
    assert all(each.output_error for each in again.groups)
    # and not those of a compression without it
    plain = replace(wanted, calibration=None, weighting="inputs", expert_weights="equal")
    without = compress_checkpoint(folder / "model", tmp_path / "plain", plain)
    for weighted, before in zip(alone.groups, without.groups, strict=True):
        assert weighted.error > before.error
        assert before.output_error is None


def test_the_command_with_workers_in_another_folder(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    words = ["compress", "model", "--factorization", "cp", "--rank", "4", "--weighting", "both"]
    words += ["--calibration", "c.safetensors", "--json"]
    with Processes(tmp_path) as cluster:
        capsys.readouterr()
        output = ["--output", str(tmp_path / "out"), "--scheduler", cluster.address]
        assert main([*words, *output]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert main([*words, "--output", str(tmp_path / "alone")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    found, alone = (json.loads(each) for each in (captured.out, capsys.readouterr().out))
    errors = [[each["output_error"] for each in made["groups"]] for made in (found, alone)]
    assert errors[0] == errors[1]
    assert None not in errors[0]


def test_a_calibration_that_changes_meanwhile(folder: Path, tmp_path: Path, client: Client) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path, kept = tmp_path / "c.safetensors", tmp_path / "kept"
    shutil.copy2(path, kept)
    wanted = settings(tmp_path, expert_weights="frequency")

    def change() -> None:
        found = Calibration.load(path)
        replace(found, ridge=0.5).save(path)

    with pytest.raises(CheckpointError, match=r"worker .*must be the calibration that .* began"):
        compress_checkpoint(
            tmp_path / "model", tmp_path / "out", wanted, client=client, callback=after(1, change)
        )
    assert journal(tmp_path / "out")
    # another one is another command
    with pytest.raises(CheckpointError, match="holds another command's output: calibration_file"):
        compress_checkpoint(tmp_path / "model", tmp_path / "out", wanted, client=client)
    shutil.copy2(kept, path)
    continued(tmp_path / "model", tmp_path / "out", wanted, client=client)


def test_a_calibration_that_workers_do_not_see(
    folder: Path, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unseen(*_: object) -> None:
        raise CheckpointError("'c.safetensors' is not there.")

    monkeypatch.setattr("tensormoe.compression._worker.check_same_calibration", unseen)
    with pytest.raises(CheckpointError, match=r"is not there. .*calibration.*that all workers"):
        compress_checkpoint(folder / "model", tmp_path / "out", settings(folder), client=client)

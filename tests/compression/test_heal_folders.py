"""``tensormoe heal``: folders in, a folder out, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensormoe_torch.huggingface
from tensormoe.cli import main
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.errors import CheckpointError, TrainingError
from tensormoe_torch import MuMoE, compress
from tensormoe_torch.compression import (
    Healing,
    TextWindows,
    heal,
    heal_checkpoint,
    load_model,
    load_tokens,
)
from tensormoe_torch.compression._healing._loss import Distillation
from tests._calibrated import save_model, save_text, save_tokenizer
from tests._compress_models import family
from tests.torch._ranks import Ranks

assert tensormoe_torch.huggingface
CUT = TextWindows(None, 16, batch=4)
WORDS = ("--context", "16", "--batch", "4", "--steps", "6", "--rate", "0.01")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healed")
    save_model(folder / "model")
    save_text(folder / "text.txt", 800)
    save_text(folder / "held.txt", 200, seed=1)
    wanted = Compression("cp", budget=0.3, preset="mixtral", compare=False)
    compress_checkpoint(folder / "model", folder / "factors", wanted)
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= load_file(path)
    return found


def files(folder: Path) -> dict[str, bytes]:
    paths = [each for each in folder.rglob("*") if each.is_file()]
    return {str(each.relative_to(folder)): each.read_bytes() for each in paths}


def run(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["heal", *map(str, words)]) == status
    captured = capsys.readouterr()
    if status:
        assert captured.out == ""
        assert captured.err.count("\n") == 1
    return captured.err if status else captured.out


def healed(folder: Path, output: Path, **changes: Any) -> Any:
    settings = Healing(**{"steps": 6, "lr": 1e-2, **changes.pop("settings", {})})
    given = {"windows": CUT, "every": 2, **changes}
    places = [folder / "model", folder / "factors", folder / "text.txt", output]
    return heal_checkpoint(*places, settings, **given)


def test_a_command_heals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    words = [folder / "model", folder / "factors", "--data", folder / "text.txt"]
    words += ["--held", folder / "held.txt", "--output", output, *WORDS]
    shown = run(capsys, *words)
    assert "step 6 of 6: loss" in shown
    assert "healed" in shown
    # the numbers are those of the function, on windows in the order of the seed
    model, teacher = load_model(folder / "factors"), load_model(folder / "model")
    ids = load_tokens(folder / "text.txt", folder / "model", (model,))
    rows = torch.cat(CUT.of(ids, model))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    batches = rows[order[:24]].split(4)
    report = heal(model, teacher, [*batches], steps=6, lr=1e-2)
    found = load_model(output)
    for name, each in found.state_dict().items():
        assert torch.equal(each, model.state_dict()[name]), name
    # all else is as it was
    before, after = files(folder / "factors"), files(output)
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= same
    old, new = tensors(folder / "factors"), tensors(output)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(".factors." in name or ".gate." in name for name in changed)
    layer = MuMoE.load(next((output / "experts").glob("*layers.1*w2*")))
    down: Any = found.model.layers[1].mlp.experts.down_proj
    assert all(torch.equal(each, down.factors[name]) for name, each in layer.factors.items())
    manifest = json.loads((output / "tensormoe.json").read_text())
    assert (
        manifest["groups"] == json.loads((folder / "factors/tensormoe.json").read_text())["groups"]
    )
    assert manifest["healings"][0]["settings"]["lr"] == 0.01
    assert manifest["made_by"][0]["factorization"] == "cp"
    readme = (output / "README.md").read_text()
    assert "import tensormoe_torch.huggingface" in readme
    assert "trained for 6 steps to predict what `model` predicts" in readme
    assert not (tmp_path / "out.tensormoe-partial").exists()
    # what is there already is shown again
    again = json.loads(run(capsys, *words, "--json"))
    assert again["losses"] == pytest.approx(report.losses, abs=0)
    assert again["output"] == str(output)
    assert again["before"]["tokens"] == 12 * 15
    other = run(capsys, *words, "--steps", "7", status=2)
    assert "steps was 6 and is 7" in other


def test_healed_folders_heal_again(folder: Path, tmp_path: Path) -> None:
    healed(folder, tmp_path / "one")
    places = [folder / "model", tmp_path / "one", folder / "text.txt", tmp_path / "two"]
    heal_checkpoint(*places, Healing(2), windows=CUT)
    manifest = json.loads((tmp_path / "two" / "tensormoe.json").read_text())
    assert [each["settings"]["steps"] for each in manifest["healings"]] == [6, 2]
    assert manifest["made_by"][0]["factorization"] == "cp"
    assert len(manifest["made_by"]) == 2


def test_folders_of_save_pretrained_in_16_bits(folder: Path, tmp_path: Path) -> None:
    model = family("mixtral").bfloat16()
    compress(model, "cp", rank=8, select="model.layers.1.**.experts")
    model.save_pretrained(tmp_path / "factors")
    save_tokenizer(tmp_path / "factors")
    places = [folder / "model", tmp_path / "factors", folder / "text.txt", tmp_path / "out"]
    for dtype in ("auto", "float32"):
        heal_checkpoint(*places, Healing(4, "all", 1e-2), windows=CUT, dtype=dtype)
        old, new = tensors(tmp_path / "factors"), tensors(tmp_path / "out")
        assert old.keys() == new.keys()
        assert {each.dtype for each in new.values()} == {torch.bfloat16}
        assert all(old[name].shape == new[name].shape for name in old)
        # dense experts are stacks in memory, and matrices in files
        assert any("experts.3.w2" in name and not torch.equal(old[name], new[name]) for name in old)
        load_model(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


def stop_at(step: int) -> Any:
    def tell(now: Any) -> None:
        if now.done == step:
            raise KeyboardInterrupt

    return tell


def test_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    whole = healed(folder, tmp_path / "whole", held=folder / "held.txt")
    output, part = tmp_path / "out", tmp_path / "out.tensormoe-partial"
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from the last state in"):
        healed(folder, output, held=folder / "held.txt", callback=stop_at(5))
    assert not output.exists()
    assert (part / "healing.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"lr was 0.01 and is 0.1"):
        healed(folder, output, held=folder / "held.txt", settings={"lr": 0.1})
    seen: list[Any] = []
    report = healed(folder, output, held=folder / "held.txt", callback=seen.append)
    assert seen[0].done == 4
    assert report.losses == whole.losses
    assert not part.exists()
    one, two = tensors(tmp_path / "whole"), tensors(output)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert files(output).keys() == files(tmp_path / "whole").keys()


def test_what_cannot_be_is_refused_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    model, factors, text = folder / "model", folder / "factors", folder / "text.txt"
    ends = ("--data", text, "--output", output, *WORDS)
    assert "must hold factors" in run(capsys, model, model, *ends, status=2)
    small = tmp_path / "small"
    wider = family("olmoe")
    wider.resize_token_embeddings(70, mean_resizing=False)
    wider.save_pretrained(small)
    save_tokenizer(small)
    found = run(capsys, small, factors, *ends, status=2)
    assert "one vocabulary; the original has 70 tokens, and the compressed one 64" in found
    wrong = tmp_path / "wrong"
    save_tokenizer(wrong, 99)
    assert "vocabulary of 64 tokens" in run(
        capsys, model, factors, *ends, "--tokenizer", wrong, status=2
    )
    short = tmp_path / "short.txt"
    save_text(short, 40)
    tiny = tmp_path / "tiny.txt"
    save_text(tiny, 4)
    few = run(capsys, model, factors, *ends, "--data", short, status=2)
    assert "at least one batch of 4 windows; it has 2 of 16 tokens" in few
    assert "at least one window" in run(capsys, model, factors, *ends, "--held", tiny, status=2)
    said = {
        ("--context", "64"): "at most the 32 positions",
        ("--steps", "0"): "steps must be a positive integer",
        ("--steps", "x"): "--steps must be an integer",
        ("--rate", "x"): "--rate must be a number",
        ("--rate", "-1"): "lr must be a positive number",
        ("--train", "routers"): "train must be one of",
        ("--batch", "0"): "batch must be a positive integer",
        ("--every", "0"): "every must be a positive integer",
        ("--held", str(tmp_path / "none")): "existing",
        ("--data", str(tmp_path / "none")): "existing",
        ("--dtype", "int8"): "dtype must be one of",
        ("--device", "x"): "device must be one of PyTorch's",
        ("--output", str(factors)): "another folder than the model's",
        ("--output", str(wrong)): "must be a new folder",
    }
    for words, rule in said.items():
        assert rule in run(capsys, model, factors, *ends, *words, status=2), words
    nowhere = run(capsys, model, tmp_path / "none", *ends, status=2)
    assert "must be a folder" in nowhere
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"small", "wrong", "short.txt", "tiny.txt"}


def test_a_loss_that_is_not_finite_keeps_the_last_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"lr": 1e18, "warmup": 0.0}
    with pytest.raises(TrainingError, match=r"not finite at step \d+.*Lower lr[^\n]*dtype\.$"):
        healed(folder, tmp_path / "out", settings=settings)
    # nothing to go on from
    assert not [*tmp_path.iterdir()]
    calls: list[int] = []
    loss_of = Distillation.__call__

    def poisoned(self: Any, batch: Any) -> Any:
        calls.append(0)
        return loss_of(self, batch) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(Distillation, "__call__", poisoned)
    with pytest.raises(TrainingError, match=r"step 6; .* after step 4.*The last state is in"):
        healed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    state = load_file(tmp_path / "out.tensormoe-partial" / "healing.safetensors")
    assert all(bool(torch.isfinite(each).all()) for each in state.values())
    # whatever it was, it is over
    report = healed(folder, tmp_path / "out")
    assert report.losses == healed(folder, tmp_path / "again").losses


def test_names_that_the_folder_does_not_have(folder: Path, tmp_path: Path) -> None:
    model = family("mixtral")
    compress(model, "cp", rank=8)
    model.save_pretrained(tmp_path / "factors")
    save_tokenizer(tmp_path / "factors")
    path = tmp_path / "factors" / "model.safetensors"
    # without the prefix that transformers puts before the body's names
    renamed = {key.removeprefix("model."): each for key, each in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})
    places = [folder / "model", tmp_path / "factors", folder / "text.txt", tmp_path / "out"]
    with pytest.raises(CheckpointError, match="must have the names that transformers saves by"):
        heal_checkpoint(*places, Healing(2), windows=CUT)
    assert {each.name for each in tmp_path.iterdir()} == {"factors"}


def several(rank: int, folder: Path, output: Path) -> Any:
    """Called in two processes, as torchrun starts them."""
    os.environ["WORLD_SIZE"] = "2"
    try:
        options: dict[str, Any] = {"held": folder / "held.txt"}
        with pytest.raises(CheckpointError, match="another folder"):
            healed(folder, folder / "factors", **options)
        with pytest.raises(CheckpointError, match="must be a new folder"):
            healed(folder, folder / "experts", **options)
        with pytest.raises(KeyboardInterrupt):
            healed(folder, output, **options, callback=stop_at(5))
        torch.distributed.barrier()
        report = healed(folder, output, **options)
        torch.distributed.barrier()
        return report
    finally:
        del os.environ["WORLD_SIZE"]


def test_processes_share_the_work(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    (folder / "experts").mkdir(exist_ok=True)
    (folder / "experts" / "x").touch()
    alone = healed(folder, tmp_path / "alone", held=folder / "held.txt")
    found = ranks(several, folder, tmp_path / "out")
    for report in found:
        assert report.losses == pytest.approx(alone.losses, rel=1e-4)
        assert report.tokens == alone.tokens
        assert report.parameters == alone.parameters
        assert report.after.losses == pytest.approx(alone.after.losses, rel=1e-4)
    one, two = tensors(tmp_path / "alone"), tensors(tmp_path / "out")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)

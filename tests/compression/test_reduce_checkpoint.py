"""``tensormoe reduce`` as people and programs use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.cli import main
from tensormoe_torch import reduce_experts
from tensormoe_torch.compression import (
    FactorizedExperts,
    ReductionProgress,
    TextWindows,
    compress,
    reduce_checkpoint,
)
from tests._calibrated import save_model, save_text, save_tokenizer
from tests._compress_models import COMMON, content, logits
from tests._quantized_models import mxfp4

SMALL = ("--samples", "5", "--context", "16")
WAYS: list[tuple[str, ...]] = [
    ("--how", "merge"),
    ("--how", "merge", "--groups", "outputs"),
    ("--how", "prune"),
    ("--how", "prune", "--score", "reap"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reduced")
    save_model(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\nAbout it.\n")
    (folder / "model" / "LICENSE").write_text("MIT")
    save_text(folder / "text.txt")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    # bars of models that tests save
    capsys.readouterr()
    status = main(["reduce", *map(str, words)])
    captured = capsys.readouterr()
    if status:
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err
    assert captured.err == ""
    return captured.out


def windows(folder: Path) -> list[torch.Tensor]:
    """Five windows of the text, drawn, in their order: w12 is token 12."""
    text = torch.tensor([int(each[1:]) for each in (folder / "text.txt").read_text().split()])
    cut = text[: len(text) // 16 * 16].reshape(-1, 16)
    drawn = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:5]
    return [each[None] for each in cut[drawn.sort().values]]


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_with_fewer_experts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    words = (folder / "model", "--data", folder / "text.txt", "--output", output, *SMALL)
    found = json.loads(run(capsys, *words, "--keep", "50%", *way, "--json"))
    assert {each.name for each in tmp_path.iterdir()} == {"out"}
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    options = dict(zip((each[2:] for each in way[::2]), way[1::2], strict=True))
    wanted = reduce_experts(model, windows(folder), keep=2, **options)  # type: ignore[arg-type]
    plain = json.loads(json.dumps(wanted.to_dict()))
    assert found == {"command": "reduce", "output": str(output), **plain}
    assert found["tokens"] == 80
    again, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(again), logits(model))
    merged = any(isinstance(each, FactorizedExperts) for each in again.modules())
    assert merged == ("merge" in way)
    # what belongs to it besides
    assert AutoTokenizer.from_pretrained(output)("w3 w4")["input_ids"] == [3, 4]
    assert (output / "LICENSE").read_text() == "MIT"
    readme = (output / "README.md").read_text()
    assert readme.startswith("---\nlicense: mit\n---\n\n# model, experts ")
    assert readme.endswith("\nAbout it.\n")
    assert ("import tensormoe_torch.huggingface" in readme) == merged
    before = content(output)
    # the same command on a whole output shows the report
    assert json.loads(run(capsys, *words, "--keep", "50%", *way, "--json")) == found
    assert content(output) == before
    shown = run(capsys, *words, "--keep", "50%", *way)
    assert shown == f"{wanted}\n" + (
        f"{output}: {'after import tensormoe_torch.huggingface, ' if merged else ''}"
        "from_pretrained opens it\n"
    )
    # another one does not
    assert "holds another command's output" in run(capsys, *words, "--keep", "3", *way)


def test_pruned_folders_need_nothing_of_ours(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (folder / "model", "--data", folder / "text.txt", *SMALL)
    run(capsys, *words, "--keep", "3", "--how", "prune", "--output", tmp_path / "out")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}); "
        "assert not any('tensormoe' in name for name in sys.modules); "
        "print(m.config.num_local_experts, type(m.model.layers[0].mlp.experts).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "3 MixtralExperts\n", done.stderr
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    # and are pruned and compressed further
    run(
        capsys, tmp_path / "out", "--data", folder / "text.txt", *SMALL,
        "--keep", "2", "--how", "prune", "--output", tmp_path / "less",
    )  # fmt: skip
    assert main(["compress", str(tmp_path / "out"), "--budget", "50%", "--dry-run"]) == 0


def test_shares_may_be_allotted_over_layers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (folder / "model", "--data", folder / "text.txt", *SMALL, "--json")
    found = json.loads(
        run(capsys, *words, "--keep", "62.5%", "--allot", "--output", tmp_path / "out")
    )
    assert sum(each["experts"][1] for each in found["modules"]) == 5
    assert sorted(each["experts"][1] for each in found["modules"]) == [2, 3]
    shown = run(capsys, *words, "--keep", "3", "--allot", "--output", tmp_path / "no")
    assert "--allot needs a share" in shown
    more = ("--how", "prune", "--keep", "50%", "--allot", "--output", tmp_path / "no")
    assert "equally many experts in every layer" in run(capsys, *words, *more)
    assert not (tmp_path / "no").exists()


def test_merged_folders_are_compressed_further_in_place(folder: Path, tmp_path: Path) -> None:
    told: list[ReductionProgress] = []
    report = reduce_checkpoint(
        folder / "model",
        tmp_path / "out",
        folder / "text.txt",
        keep=2,
        windows=TextWindows(5, 16),
        callback=told.append,
    )
    assert [each.done for each in told] == [0, *range(1, 11)]
    assert {each.total for each in told} == {10}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    smaller = compress(model, "cp", rank=2)
    assert smaller.parameters[0] == report.parameters[1]


def test_what_cannot_be_is_refused_and_nothing_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, output = folder / "model", folder / "text.txt", tmp_path / "out"
    words = (model, "--data", text, "--output", output)

    def refused(message: str, *more: object, given: tuple[Any, ...] = words) -> None:
        assert message in run(capsys, *given, *more)

    for keep in ("x", "0.5", "-1", "50 %", "%"):
        refused("number of experts per layer or a percentage", f"--keep={keep}")
    refused("keep must be a positive integer; got 0", "--keep", "0")
    refused("keep must be a share in (0, 1]", "--keep", "0%")
    refused("keep must be a share in (0, 1]", "--keep", "150%")
    refused("how must be", "--keep", "2", "--how", "drop")
    refused("score='reap' with how='merge'", "--keep", "2", "--score", "reap")
    refused("groups='outputs' with how='prune'", "--keep", "2", "--how=prune", "--groups=outputs")
    few = ("--context", "16", "--samples", "5")
    refused("keep must be 1 to 4 experts per layer; got 5", "--keep", "5", *few)
    refused("keep must leave every layer 1 experts; got 0.1", "--keep", "10%", *few)
    refused("keep must be 2 to 4", "--keep", "1", "--how", "prune", *few)
    refused("at least one window", "--keep", "2", "--context", "32", given=(
        model, "--data", _text(tmp_path, "w1 w2"), "--output", output
    ))  # fmt: skip
    refused("chose 2 of 4", "--keep", "3", "--samples", "1", "--context", "1")
    refused("at most the 32 positions", "--keep", "2", "--context", "64")
    save_tokenizer(tmp_path / "wrong", 99)
    refused("vocabulary of 64 tokens", "--keep", "2", *few, "--tokenizer", tmp_path / "wrong")
    refused("tokenizer must be in", "--keep", "2", *few, "--tokenizer", tmp_path / "nowhere")
    refused("absent.txt", "--keep", "2", given=(
        model, "--data", tmp_path / "absent.txt", "--output", output
    ))  # fmt: skip
    refused("device must be", "--keep", "2", "--device", "x")
    refused("another folder than the model's", "--keep", "2", given=(
        model, "--data", text, "--output", model
    ))  # fmt: skip
    refused("exists", "--keep", "2", given=(model, "--data", text, "--output", tmp_path))
    assert "--keep" in run(capsys, *words)
    dense = tmp_path / "dense"
    _dense(dense)
    refused("must hold experts", "--keep", "2", *few, given=(
        dense, "--data", text, "--output", output
    ))  # fmt: skip
    mxfp4(tmp_path / "quantized")
    refused("quantized; its config.json has quant_method 'mxfp4'", "--keep", "2", given=(
        tmp_path / "quantized" / "model", "--data", text, "--output", output
    ))  # fmt: skip
    left = {"wrong", "short.txt", "dense", "quantized"}
    assert {each.name for each in tmp_path.iterdir()} == left


def _text(folder: Path, words: str) -> Path:
    path = folder / "short.txt"
    path.write_text(words)
    return path


def _dense(folder: Path) -> None:
    import transformers

    sizes = {key: each for key, each in COMMON.items() if key != "num_experts_per_tok"}
    config = transformers.LlamaConfig(intermediate_size=24, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def test_merged_and_factorized_folders_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--data", folder / "text.txt", *SMALL)
    run(capsys, folder / "model", *few, "--keep", "2", "--output", tmp_path / "merged")
    found = run(capsys, tmp_path / "merged", *few, "--keep", "1", "--output", tmp_path / "out")
    assert "must not have been merged before" in found
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    compress(model, "cp", rank=2)
    model.save_pretrained(tmp_path / "factors")
    save_tokenizer(tmp_path / "factors")
    found = run(capsys, tmp_path / "factors", *few, "--keep", "2", "--output", tmp_path / "out")
    assert "must hold experts" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["save_pretrained", "copy_side_files"])
def test_a_failure_leaves_nothing_under_the_name(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    words = (
        folder / "model", "--data", folder / "text.txt", *SMALL,
        "--keep", "2", "--how", "prune", "--output", tmp_path / "out",
    )  # fmt: skip

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "save_pretrained":
            patch.setattr("transformers.MixtralForCausalLM.save_pretrained", fail)
            assert "No space left on device" in run(capsys, *words)
        else:
            patch.setattr("tensormoe_torch.compression._reduce_checkpoint.copy_side_files", fail)
            with pytest.raises(OSError, match="No space left"):
                main(["reduce", *map(str, words)])
            capsys.readouterr()
    assert not (tmp_path / "out").exists()
    run(capsys, *words)
    assert {each.name for each in tmp_path.iterdir()} == {"out"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_local_experts == 2

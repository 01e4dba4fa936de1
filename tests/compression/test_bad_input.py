"""What cannot be compressed, and what the error says; nothing is left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tensormoe.compression import Compression, compress_checkpoint, plan_compression
from tensormoe.errors import BudgetError, CheckpointError, PlanError, RankError, SpecError
from tests._compress_models import PATTERN, experts, save, save_shards


def compress(model: Path, output: Path, **wanted: Any) -> Any:
    options = {"rank": 2, "experts": PATTERN, **wanted}
    return compress_checkpoint(model, output, Compression("cp", **options))


def refused(model: Path, output: Path, rule: str, *parts: str, **wanted: Any) -> str:
    with pytest.raises(CheckpointError, match=rule) as caught:
        compress(model, output, **wanted)
    for part in parts:
        assert part in str(caught.value)
    assert not output.exists()
    return str(caught.value)


KEY = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(
    value: float, dtype: torch.dtype, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {key: each.to(dtype) for key, each in experts(rng).items()}
    tensors[KEY.format(2)][5, 3] = value
    model = save(tmp_path / "m.safetensors", tensors)
    refused(model, tmp_path / "out", "must be finite", KEY.format(2), "'m.safetensors'")


def test_a_stack_names_its_expert(tmp_path: Path, rng: np.random.Generator) -> None:
    stack = torch.tensor(rng.standard_normal((4, 6, 8)))
    stack[3, 5, 7] = torch.nan
    model = save(tmp_path / "m.safetensors", {"layers.0.experts.w": stack})
    refused(model, tmp_path / "out", "expert 3", experts=("experts.w",), layout="in_out", rank=2)


def test_zeros_are_weights_too(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {key: torch.zeros_like(each) for key, each in experts(rng).items()}
    tensors |= experts(rng, layer=1)
    tensors["model.layers.1.block_sparse_moe.experts.1.w1.weight"].zero_()
    model = save(tmp_path / "m.safetensors", tensors)
    result = compress(model, tmp_path / "out", dense=True, rank=3)
    first, second = result.groups
    assert first.error == first.svd_error == 0.0
    assert 0 < second.error < 1
    assert np.isfinite(second.expert_errors).all()
    found = load_file(tmp_path / "out" / "m.safetensors")
    assert not any(found[KEY.format(k)].any() for k in range(4))


def test_ranks_above_the_possible(tmp_path: Path, rng: np.random.Generator) -> None:
    model = save(tmp_path / "m.safetensors", experts(rng))
    for rank in (11, 10**6):
        with pytest.raises(RankError, match=r"\*\.w1.*fewer entries than the experts' 192"):
            compress(model, tmp_path / "out", rank=rank)
    with pytest.raises(RankError, match=r"w1.*one positive integer"):
        compress(model, tmp_path / "out", rank=(2, 2))
    with pytest.raises(BudgetError, match=r"experts\.\*\.w1.*at least 18"):
        compress(model, tmp_path / "out", rank=None, budget=17)
    with pytest.raises(RankError, match=r"w1.*no rank reaches"):
        compress(model, tmp_path / "out", rank=None, tolerance=1e-6)
    assert not (tmp_path / "out").exists()


def test_experts_of_different_shapes_are_listed(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = experts(rng)
    tensors[KEY.format(1)] = torch.zeros(8, 5)
    model = save(tmp_path / "m.safetensors", tensors)
    refused(model, tmp_path / "out", "one shape", KEY.format(1), "(8, 5)", "3 are (8, 6)")
    tensors[KEY.format(1)] = torch.zeros(8, 6, dtype=torch.bfloat16)
    save(model, tensors)
    refused(model, tmp_path / "out", "one shape and dtype", KEY.format(1), "BF16")


def test_experts_that_are_missing(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = experts(rng)
    del tensors[KEY.format(2)]
    model = save(tmp_path / "m.safetensors", tensors)
    refused(model, tmp_path / "out", "without gaps", "2 of 4 are missing")
    # the last one can only be told by the other projections
    tensors = experts(rng) | {k.replace("w1", "w2"): each for k, each in experts(rng, 3).items()}
    save(model, tensors)
    refused(
        model,
        tmp_path / "out",
        "equally many experts",
        experts=("layers.*.experts.*.w1", "layers.*.experts.*.w2"),
    )


def test_patterns_that_match_nothing_or_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    model = save(tmp_path / "m.safetensors", experts(rng))
    near = "'layers.*.block_sparse_moe.experts.*.w1'"
    refused(
        model, tmp_path / "out", "matches none of 4 keys", near, experts=("layers.*.expert.w1",)
    )
    refused(model, tmp_path / "out", "matches none", near, experts=(), preset="qwen_moe")
    both = ("layers.*.experts.*.w1", "experts.*.w*")
    refused(model, tmp_path / "out", "match a key once", *both, experts=both)
    tensors = experts(rng) | {
        k.replace("w1", end): each.clone()
        for k, each in experts(rng).items()
        for end in ("w2", "w3")
    }
    save(model, tensors)
    refused(model, tmp_path / "out", "the preset 'mixtral'", experts=(), preset="olmoe")
    with pytest.raises(SpecError, match="a preset may be given, and not both"):
        Compression("cp", rank=2, experts=PATTERN, preset="mixtral")
    with pytest.raises(SpecError, match="parts of keys"):
        Compression("cp", rank=2, experts=("a..b",))


def test_tensors_that_are_no_matrices(tmp_path: Path, rng: np.random.Generator) -> None:
    flat = {KEY.format(k): torch.ones(6) for k in range(2)}
    model = save(tmp_path / "m.safetensors", flat)
    refused(model, tmp_path / "out", "must be matrices", "(6,)")
    save(model, {KEY.format(k): torch.ones(6, 0) for k in range(2)})
    refused(model, tmp_path / "out", "none of their sizes 0")


def raw(path: Path, code: str, itemsize: int) -> Path:
    """Experts of any dtype that a header can name."""
    entries = {
        KEY.format(k): {
            "dtype": code,
            "shape": [8, 6],
            "data_offsets": [k * 48 * itemsize, (k + 1) * 48 * itemsize],
        }
        for k in range(2)
    }
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(96 * itemsize))
    return path


@pytest.mark.parametrize(
    ("code", "itemsize", "shown"),
    [
        ("F8_E4M3", 1, "F8_E4M3"),
        ("F8_E5M2", 1, "F8_E5M2"),
        ("I8", 1, "int8"),
        ("U8", 1, "uint8"),
        ("NEW", 3, "NEW"),
    ],
)
def test_quantized_experts(code: str, itemsize: int, shown: str, tmp_path: Path) -> None:
    model = raw(tmp_path / "m.safetensors", code, itemsize)
    refused(model, tmp_path / "out", "Dequantize", KEY.format(0), f"got {shown} for")


def test_files_that_are_cut_or_damaged(tmp_path: Path, rng: np.random.Generator) -> None:
    model = save(tmp_path / "m.safetensors", experts(rng))
    whole = model.read_bytes()
    for length in (0, 5, 8, 60, len(whole) - 1):
        model.write_bytes(whole[:length])
        refused(model, tmp_path / "out", "damaged")
    model.write_bytes(b"{" * 100)
    refused(model, tmp_path / "out", "damaged")
    refused(tmp_path / "nothing.safetensors", tmp_path / "out", "there is none")


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensormoe.compression import _stack

    model = save(tmp_path / "m.safetensors", experts(rng))
    read = _stack.read_stack

    def cut(*given: Any) -> Any:
        model.write_bytes(model.read_bytes()[:-8])
        return read(*given)

    monkeypatch.setattr(_stack, "read_stack", cut)
    refused(model, tmp_path / "out", "cut short while it was read")


def test_indices(tmp_path: Path, rng: np.random.Generator) -> None:
    first, second = experts(rng), experts(rng, layer=1)
    folder = save_shards(tmp_path / "m", first, second)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    def told(places: Any, rule: str) -> None:
        index.write_text(json.dumps({"weight_map": places}))
        refused(folder, tmp_path / "out", rule)

    told({**places, "more": places[KEY.format(0)]}, "the key is in no file")
    told({**places, KEY.format(0): places[KEY.format(0).replace("0", "1", 1)]}, "the key is in")
    told({**places, KEY.format(0): "../m.safetensors"}, "beside it")
    told({**places, KEY.format(0): "gone.safetensors"}, "there is none")
    told([], "weight_map")
    index.write_text(json.dumps({"weight_map": places}))
    save(
        folder / "model-00002-of-00002.safetensors", second | {KEY.format(0): first[KEY.format(0)]}
    )
    refused(folder, tmp_path / "out", "a key must be in one file")


def test_folders_that_hold_no_model_or_several(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    refused(folder, tmp_path / "out", "must hold a .safetensors file")
    for name in ("a.safetensors", "b.safetensors"):
        save(folder / name, experts(rng))
    refused(folder, tmp_path / "out", "a.safetensors, b.safetensors. Name one")
    save(folder / "model.safetensors", experts(rng))
    assert len(compress(folder, tmp_path / "out").groups) == 1


def test_stacks_whose_sides_are_unknown(tmp_path: Path, rng: np.random.Generator) -> None:
    stack = torch.tensor(rng.standard_normal((4, 6, 8)))
    model = save(tmp_path / "m.safetensors", {"layers.0.experts.gate_up_proj": stack})
    refused(model, tmp_path / "out", "--layout", experts=("layers.*.experts.gate_up_proj",))
    for layout, sizes in (("in_out", (6, 8)), ("out_in", (8, 6))):
        wanted = Compression("cp", rank=2, experts=("layers.*.gate_up_proj",), layout=layout)
        (group,) = (each.group for each in plan_compression(model, wanted).groups)
        assert (group.in_features, group.out_features) == sizes


def test_too_little_memory_is_said_before_anything_is_read(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensormoe.compression import _stack

    model = save(tmp_path / "m.safetensors", experts(rng))
    monkeypatch.setattr(_stack, "read_stack", None)
    wanted = Compression("cp", rank=2, experts=PATTERN)
    least = plan_compression(model, wanted).memory
    rule = rf"max_memory must be at least {least:,} bytes.*4 × 6 × 8.*got {least - 1:,}"
    with pytest.raises(PlanError, match=rule):
        compress_checkpoint(model, tmp_path / "out", wanted, max_memory=least - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


def test_outputs_that_are_something_else(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = save_shards(tmp_path / "m", experts(rng))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rule = "another folder than the model's"
    for model in (folder, folder / "model.safetensors.index.json", *folder.glob("*.safetensors")):
        with pytest.raises(CheckpointError, match=rule):
            compress(model, folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(CheckpointError, match=rule):
        compress(folder, link)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name in ("full", "file"):
        (tmp_path / name).mkdir() if name == "full" else (tmp_path / name).write_text("")
    (tmp_path / "full" / "thesis.tex").write_text("")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"must be a new folder.*{name}"):
            compress(folder, tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert compress(folder, tmp_path / "empty").groups


def test_names_of_keys_never_leave_the_output(tmp_path: Path, rng: np.random.Generator) -> None:
    names = ["../../experts", "/etc/experts", "a/b\0c.experts", "ü.experts", "x" * 300 + ".experts"]
    tensors = {f"{name}.{k}.w1": torch.ones(8, 6) for name in names for k in range(2)}
    model = save(tmp_path / "m.safetensors", tensors)
    result = compress(
        model,
        tmp_path / "out",
        rank=1,
        experts=("experts.*.w1", "/etc/experts.*.w1", "/experts.*.w1"),
    )
    files = [report.file for report in result.groups]
    assert len(set(files)) == len(names)
    for file in files:
        assert re.fullmatch(r"experts/[A-Za-z0-9_-][A-Za-z0-9._-]*", str(file))
        assert (tmp_path / "out" / str(file)).is_file()

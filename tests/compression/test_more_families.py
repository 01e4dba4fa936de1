"""Families of models: on disk, in place, saved and loaded, all computing the same.

Experts are of low multilinear rank, so that factors of that rank lose nothing, whichever way they
are found: what comes out has to be what the model computed before.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tensormoe_torch.huggingface  # noqa: F401
from tensormoe.compression import PRESETS, Compression, compress_checkpoint, plan_compression
from tensormoe.errors import CheckpointError
from tensormoe_torch import compress
from tensormoe_torch.compression import FactorizedExperts
from tests._compress_models import logits, opened, save, save_shards, tokens
from tests._more_models import MORE, RANK, experts_of, low_rank

QUICK = {"compare": False}


def factorized(model: Any) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, FactorizedExperts)]


@pytest.mark.parametrize("name", MORE)
def test_every_way_computes_what_the_model_did(name: str, tmp_path: Path) -> None:
    model = low_rank(name)
    layers = len(experts_of(model))
    assert layers
    before, said = logits(model), tokens(model)
    model.save_pretrained(tmp_path / "model")

    # no preset is named
    wanted = Compression("tucker", rank=RANK, **QUICK)
    result = compress_checkpoint(tmp_path / "model", tmp_path / "factors", wanted)
    assert all(report.error < 1e-5 for report in result.groups)
    named = Compression("tucker", rank=RANK, preset=MORE[name][0])
    assert [each.group.name for each in plan_compression(tmp_path / "model", named).groups] == [
        report.name for report in result.groups
    ]
    found = opened(tmp_path / "factors")
    assert len(factorized(found)) == layers
    assert not experts_of(found)
    torch.testing.assert_close(logits(found), before, atol=1e-4, rtol=1e-3)
    assert tokens(found) == said

    dense = Compression("tucker", rank=RANK, dense=True, **QUICK)
    compress_checkpoint(tmp_path / "model", tmp_path / "dense", dense)
    plain = opened(tmp_path / "dense")
    assert len(experts_of(plain)) == layers
    torch.testing.assert_close(logits(plain), before, atol=1e-4, rtol=1e-3)

    # the experts matter, and each of them has its place
    broken = copy.deepcopy(model)
    for each in experts_of(broken):
        each.get_parameter("down_proj").data = each.get_parameter("down_proj").flip(0)
    assert (logits(broken) - before).abs().max() > 1e-2

    compress(model, "tucker", rank=RANK)
    assert len(factorized(model)) == layers
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-3)
    assert tokens(model) == said
    model.save_pretrained(tmp_path / "in_place")
    again = opened(tmp_path / "in_place")
    assert torch.equal(logits(again), logits(model))
    assert "quantization_config" in json.loads((tmp_path / "in_place" / "config.json").read_text())


def test_presets_have_types_of_their_own() -> None:
    kinds = [kind for preset in PRESETS.values() for kind in preset.model_types]
    assert len(kinds) == len({*kinds})
    assert {preset for preset, _ in MORE.values()} <= {*PRESETS}


def names(model: Path, **options: Any) -> set[str]:
    wanted = Compression("cp", rank=1, **options)
    return {each.group.name for each in plan_compression(model, wanted).groups}


def test_keys_decide_where_the_type_of_a_model_does_not(tmp_path: Path) -> None:
    def matrices(*keys: str, stacked: bool = False) -> dict[str, torch.Tensor]:
        shape = (4, 8, 6) if stacked else (8, 6)
        places = [""] if stacked else [f"{number}." for number in range(2)]
        return {
            f"layers.0.{key.replace('#', place)}": torch.ones(shape)
            for key in keys
            for place in places
        }

    mixtral = matrices(*(f"block_sparse_moe.experts.#w{k}" for k in (1, 2, 3)))
    # neither a config nor an unknown type says anything
    alone = names(save(tmp_path / "m.safetensors", mixtral))
    assert len(alone) == 3
    folder = save_shards(tmp_path / "model", mixtral)
    assert names(folder) == alone == names(folder, preset="auto")
    # a type whose files look otherwise, as of a model saved as it is in memory
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert names(folder) == alone
    (folder / "config.json").write_text('{"text_config": {"model_type": "jamba"}}')
    jamba = matrices(*(f"feed_forward.experts.#{k}_proj" for k in ("gate", "up", "down")))
    save_shards(folder, {**mixtral, **jamba})
    (folder / "config.json").write_text('{"text_config": {"model_type": "jamba"}}')
    assert len(names(folder)) == 3
    assert names(folder) == names(folder, preset="jamba")
    # two kinds of experts, and no type
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"one preset must fit .*'mixtral', 'jamba'"):
        names(folder)
    (folder / "config.json").write_text("not JSON")
    assert len(names(folder, preset="jamba")) == 3
    with pytest.raises(CheckpointError, match=r"a preset must match .* without config.json"):
        names(save(tmp_path / "none.safetensors", matrices("mlp.#w")))

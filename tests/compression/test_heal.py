"""Compressed models trained to predict what the original predicts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from tensormoe.errors import CheckpointError, SpecError, TrainingError
from tensormoe_torch import compress, replace
from tensormoe_torch.compression import FactorizedExperts, Healing, evaluate, heal, reduce_experts

IDS = torch.randint(0, 32, (6, 12), generator=torch.Generator().manual_seed(3))
BATCHES = [*IDS.split(2)]


def original(**changes: Any) -> Any:
    """A model whose experts matter."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **changes})).eval()


@pytest.fixture(scope="module")
def teacher() -> Any:
    return original()


@pytest.fixture(scope="module")
def compressed(teacher: Any) -> Any:
    model = copy.deepcopy(teacher)
    compress(model, "cp", budget=0.4)
    return model


@pytest.fixture
def model(compressed: Any) -> Any:
    return copy.deepcopy(compressed)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, each in model.state_dict().items() if not torch.equal(each, before[name])
    }


def log_probabilities(model: Any, ids: Tensor) -> Any:
    """In float64, by NumPy: (windows · tokens, vocabulary)."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double().flatten(0, 1).numpy()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_the_loss_is_divergence_and_cross_entropy(model: Any, teacher: Any) -> None:
    p, q = (log_probabilities(each, BATCHES[0]) for each in (teacher, model))
    labels = BATCHES[0][:, 1:].flatten().numpy()
    divergence = (np.exp(p) * (p - q)).sum(-1).mean()
    entropy = -q[np.arange(len(labels)), labels].mean()
    for share in (0.0, 0.3, 1.0):
        mine = copy.deepcopy(model)
        found = heal(mine, teacher, BATCHES[0], steps=1, labels=share).losses[0]
        assert found == pytest.approx((1 - share) * divergence + share * entropy, rel=1e-4)
    # padding is neither predicted nor counted
    mask = torch.ones_like(BATCHES[0])
    mask[1] = 0
    padded = {"input_ids": BATCHES[0], "attention_mask": mask}
    report = heal(model, teacher, padded, steps=1)
    rows = slice(0, 11)
    assert report.losses[0] == pytest.approx((np.exp(p) * (p - q))[rows].sum(-1).mean(), rel=1e-4)
    assert report.tokens == 11


@pytest.mark.parametrize(
    ("train", "parts"),
    [("factors", ("factors.", "gate.")), ("factors only", ("factors.",)), ("all", ("",))],
)
def test_what_is_trained(train: str, parts: tuple[str, ...], model: Any, teacher: Any) -> None:
    before, names = state(model), set(dict(model.named_parameters()))
    originals = state(teacher)
    report = heal(model, teacher, BATCHES, steps=4, train=train)
    wanted = {name for name in names if any(part in name for part in parts)}
    assert changed(model, before) == wanted
    assert not changed(teacher, originals)
    assert report.parameters == sum(before[name].numel() for name in wanted)
    # as it was, but for the numbers
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert not any(each.training for each in model.modules())


def test_half_of_the_loss_comes_back(model: Any, teacher: Any) -> None:
    seen: list[Any] = []
    report = heal(model, teacher, BATCHES, steps=200, lr=1e-2, held=BATCHES, callback=seen.append)
    assert report.before is not None
    assert report.after is not None
    assert report.after.divergence < 0.5 * report.before.divergence
    assert report.after.divergence == pytest.approx(evaluate(teacher, model, BATCHES).divergence)
    assert np.mean(report.losses[-3:]) < 0.5 * np.mean(report.losses[:3])
    assert report.tokens == 200 * 2 * 11
    assert [each.done for each in seen] == [*range(201)]
    assert seen[0].loss is None
    assert [each.loss for each in seen[1:]] == [*report.losses]
    assert max(each.rate for each in seen) == 1e-2
    assert seen[1].rate == pytest.approx(1e-2 / 20)
    assert seen[-1].rate < 1e-5
    assert "won back" in str(report) or "lost nothing" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["recovered"] == report.recovered
    assert "<table" in report._repr_html_()


def test_recovered_is_the_share_of_the_lost_cross_entropy(model: Any, teacher: Any) -> None:
    # labels of the teacher itself, of which compression loses something
    torch.manual_seed(1)
    with torch.no_grad():
        chosen = teacher.generate(IDS[:, :1], max_length=12, do_sample=True, pad_token_id=0)
    report = heal(model, teacher, [chosen], steps=60, lr=1e-2, held=[chosen])
    assert report.before is not None
    assert report.after is not None
    (a, b), c = report.before.losses, report.after.losses[1]
    assert report.recovered == pytest.approx((b - c) / (b - a))
    assert report.recovered > 0
    worse = heal(model, teacher, [chosen], steps=5, lr=1.0, held=[chosen])
    assert worse.recovered is not None
    assert worse.recovered < 0
    assert "worse than before: lower the learning rate" in str(worse)


def test_small_steps_of_16_bits_add_up(model: Any, teacher: Any) -> None:
    model.bfloat16()
    before = state(model)
    # far below half of a digit of bfloat16 each
    taught = copy.deepcopy(teacher).bfloat16()
    report = heal(model, taught, BATCHES, steps=400, lr=2e-5, warmup=0.0)
    assert len(changed(model, before)) > 12
    assert all(each.dtype == torch.bfloat16 for each in model.parameters())
    assert all(np.isfinite(report.losses))


def test_gates_of_our_own_layers_are_routers() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 32}
    teacher = GPT2LMHeadModel(GPT2Config(n_positions=16, initializer_range=0.4, **sizes)).eval()
    model = copy.deepcopy(teacher)
    replace(model, "transformer.h.*.mlp", experts=4, drop=0.0)
    before = state(model)
    heal(model, teacher, BATCHES, steps=3)
    found = changed(model, before)
    assert found
    assert all(".factors." in name or ".gate." in name for name in found)
    assert any(".gate." in name for name in found)


def test_models_without_factors_train_as_a_whole(teacher: Any) -> None:
    model = copy.deepcopy(teacher)
    reduce_experts(model, BATCHES, keep=2, how="prune")
    with pytest.raises(SpecError, match="must hold factors to be healed; MixtralForCausalLM holds"):
        heal(model, teacher, BATCHES, steps=1)
    report = heal(model, teacher, BATCHES, steps=30, train="all", held=BATCHES)
    assert report.after is not None
    assert report.before is not None
    assert report.after.divergence < report.before.divergence


class Stopped(Exception):
    pass


def stop_at(step: int) -> Any:
    def tell(now: Any) -> None:
        if now.done == step:
            raise Stopped

    return tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_healing_goes_on(
    dtype: torch.dtype, compressed: Any, teacher: Any, tmp_path: Path
) -> None:
    one, two, three = (copy.deepcopy(compressed).to(dtype) for _ in range(3))
    taught = copy.deepcopy(teacher).to(dtype)
    options: dict[str, Any] = {"steps": 11, "lr": 1e-2, "held": BATCHES[:1]}
    whole = heal(one, taught, BATCHES, **options)
    options |= {"checkpoint": tmp_path / "state.safetensors", "every": 3}
    with pytest.raises(Stopped):
        heal(two, taught, BATCHES, **options, callback=stop_at(8))
    seen: list[Any] = []
    again = heal(three, taught, BATCHES, **options, callback=seen.append)
    assert seen[0].done == 6
    assert again.losses == whole.losses
    assert again.tokens == whole.tokens
    assert not changed(three, state(one))
    assert again.before is not None
    assert whole.before is not None
    assert again.before.losses == whole.before.losses
    # one that is whole has nothing left to do
    assert heal(two, taught, BATCHES, **options).losses == whole.losses
    assert not changed(two, state(one))


def test_states_of_others_are_refused(model: Any, teacher: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    heal(model, teacher, BATCHES, steps=2, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"another healing: lr was 0.001 and is 0.01"):
        heal(model, teacher, BATCHES, steps=2, lr=1e-2, checkpoint=path)
    other = copy.deepcopy(teacher)
    compress(other, "cp", rank=3)
    with pytest.raises(CheckpointError, match="state of this model's parameters"):
        heal(other, teacher, BATCHES, steps=2, checkpoint=path)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="must be the state of a healing"):
        heal(model, teacher, BATCHES, steps=2, checkpoint=tmp_path / "model.safetensors")


def test_a_loss_that_is_not_finite_leaves_the_last_good_model(model: Any, teacher: Any) -> None:
    taken: list[dict[str, Tensor]] = []

    def tell(now: Any) -> None:
        taken.append(state(model))

    with pytest.raises(TrainingError, match=r"not finite at step (\d+); the model is as it was"):
        heal(model, teacher, BATCHES, steps=40, lr=1e18, warmup=0.0, callback=tell)
    assert all(bool(torch.isfinite(each).all()) for each in model.state_dict().values())
    assert np.isfinite(evaluate(teacher, model, BATCHES).divergence)
    assert any(not changed(model, each) for each in taken[:-1])
    assert all(each.requires_grad for each in model.parameters())


def test_a_model_that_is_not_finite_from_the_start(model: Any, teacher: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    before = state(model)
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 1; .* at the start"):
        heal(model, teacher, BATCHES, steps=3)
    assert not changed(model, before)


def test_what_cannot_be_is_refused(model: Any, teacher: Any) -> None:
    before = state(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps must be a positive integer; got 0"),
        ({"train": "routers"}, "train must be one of 'factors', 'factors only', 'all'"),
        ({"lr": 0.0}, "lr must be a positive number; got 0.0"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"warmup": 1.0}, "warmup must be a number of at least 0 and below 1"),
        ({"labels": 1.5}, "labels must be a number of at least 0 and at most 1"),
        ({"weight_decay": -1.0}, "weight_decay must be a number of at least 0; got -1.0"),
        ({"every": 0}, "every must be a positive integer"),
        ({"clip": 0}, "clip must be a positive number"),
        ({"batches": []}, "batches must hold tokens; got none"),
        ({"batches": IDS.split(2)}, r"got a tuple.*list\(batches\)"),
        ({"held": IDS.split(2)}, "got a tuple"),
        ({"batches": "text"}, "token ids"),
        ({"batches": IDS[:, :1]}, "tokens to predict"),
        ({"batches": IDS.float()}, "token ids"),
        ({"teacher": original(vocab_size=33)}, "one vocabulary; their logits have shapes"),
        ({"model": copy.deepcopy(teacher)}, "must hold factors"),
        ({"model": [model]}, "nn.Modules"),
        ({"model": copy.deepcopy(model).half()}, "float64, float32 or bfloat16 to be trained"),
    ]
    for changes, said in wrong:
        given = {"model": model, "teacher": teacher, "batches": BATCHES, "steps": 2, **changes}
        places = [given.pop(name) for name in ("model", "teacher", "batches")]
        with pytest.raises(SpecError, match=said):
            heal(*places, **given)
    assert not changed(model, before)


def test_factors_of_few_bits_are_refused(model: Any, teacher: Any) -> None:
    layer = model.model.layers[1].mlp.experts.down_proj
    layer.quantize(8)
    for train in ("factors", "all"):
        with pytest.raises(SpecError, match=r"layers.1.*down_proj' have 8 bits. Call dequantize"):
            heal(model, teacher, BATCHES, steps=1, train=train)
    layer.dequantize()
    heal(model, teacher, BATCHES, steps=1)


def test_settings_as_values() -> None:
    settings = Healing(40, lr=2e-3)
    assert eval(repr(settings), {"Healing": Healing}) == settings
    assert Healing(**settings.to_dict()) == settings
    rates = [settings.rate(step) for step in range(40)]
    assert rates[3] == max(rates) == 2e-3
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1.5e-3])
    assert sorted(rates[3:], reverse=True) == rates[3:]
    assert Healing(1).rate(0) == 1e-3


def test_biases_and_merged_experts_train(teacher: Any) -> None:
    model = copy.deepcopy(teacher)
    reduce_experts(model, BATCHES, keep=2)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, FactorizedExperts)
    before = state(model)
    heal(model, teacher, BATCHES, steps=2)
    found = changed(model, before)
    assert "model.layers.0.mlp.experts.groups" not in found
    assert "model.layers.0.mlp.gate.weight" in found

"""Surgery on real model code: what is selected is replaced, and the rest stays as it was."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from tensormoe import CP, Gate, Hadamard, Roofline
from tensormoe.planning import PUBLISHED_ROOFLINES
from tensormoe.selection import linear_cost
from tensormoe_torch import MuMoE, MuMoEMLP, replace
from tensormoe_torch.surgery import Surgery


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=50,
        n_positions=12,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (3, 12))}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 16, 16)}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=5,
    )
    return BertForSequenceClassification(config), {"input_ids": torch.randint(3, 50, (3, 7))}


def mixer() -> tuple[nn.Module, dict[str, Tensor]]:
    path = Path(__file__).parents[2] / "examples" / "surgery_on_pretrained_code.py"
    spec = importlib.util.spec_from_file_location("surgery_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = nn.Sequential(
        *(
            example.MixerBlock(tokens=9, dim=12, token_hidden=10, channel_hidden=24)
            for _ in range(2)
        )
    )
    return model, {"input": torch.randn(4, 9, 12)}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    logits: Tensor = getattr(found, "logits", found)
    return logits


CASES = {
    # make, select, options of full rank, inputs of each replaced module
    "gpt2 blocks": (gpt2, "transformer.h.*.mlp", {"rank": 17}, [36, 36]),
    "gpt2 attention": (
        gpt2,
        ["transformer.h.*.attn.c_attn", "transformer.h.1.attn.c_proj"],
        {"factorization": "tensor_ring", "rank": 5},
        [36, 36, 36],
    ),
    "vit blocks": (vit, "vit.layers.*.mlp", {"factorization": "hadamard"}, [15, 15]),
    "vit attention": (
        vit,
        lambda name, module: name.endswith("o_proj") or name == "classifier",
        {"factorization": "tucker", "rank": 17},
        [15, 15, 3],
    ),
    "bert": (
        bert,
        ["**.intermediate.dense", "bert.encoder.layer.*.output.dense"],
        {"rank": 17},
        [21, 21, 21, 21],
    ),
    "mixer": (mixer, ["*.tokens", "*.channels"], {"rank": 13}, [48, 36, 48, 36]),
}


@pytest.mark.parametrize("experts", [4, (3, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_models_compute_what_they_did(case: str, experts: Any) -> None:
    torch.manual_seed(0)
    make, select, options, inputs = CASES[case]
    model, example = make()
    model.eval()
    before = copy.deepcopy(model)
    wanted = run(model, example)
    surgery = replace(model, select, experts=experts, example=example, **options)
    torch.testing.assert_close(run(model, example), wanted, rtol=0, atol=2e-5)
    assert [each.inputs for each in surgery.replacements] == inputs

    # all else is the same module with the same weights, in the same order
    replaced = {name: model.get_submodule(name) for name in surgery.names}
    kept = [
        name for name, _ in before.named_modules() if not inside(name, surgery.names, strict=False)
    ]
    assert kept == [
        name for name, _ in model.named_modules() if not inside(name, surgery.names, strict=False)
    ]
    state = model.state_dict()
    for key, value in before.state_dict().items():
        if not inside(key, surgery.names):
            assert torch.equal(value, state[key])
    assert all(isinstance(each, MuMoE | MuMoEMLP) for each in replaced.values())
    assert surgery.model_parameters == (count(before), count(model))

    # forward and backward, a copy, and a state dict
    twin = copy.deepcopy(model)
    model.train()
    run(model, example).square().sum().backward()
    for name, module in replaced.items():
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.any(), (name, key)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.equal(run(twin.eval(), example), wanted)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(twin, example), wanted, rtol=0, atol=2e-5)


def inside(name: str, outer: tuple[str, ...], strict: bool = True) -> bool:
    return any(name.startswith(f"{each}.") or (not strict and name == each) for each in outer)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_modes_flags_dtypes_and_hooks_are_kept() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6)})
    model["a"].eval()
    model["b"].requires_grad_(False)
    model["c"].double()
    called: list[str] = []
    handles = {
        "before": model["a"].register_forward_pre_hook(lambda *_: called.append("before")),
        "after": model["a"].register_forward_hook(
            lambda *_, **__: called.append("after"), with_kwargs=True
        ),
        "backward": model["a"].register_full_backward_hook(lambda *_: called.append("backward")),
    }
    old = dict(model.items())
    replace(model, nn.Linear, experts=3)
    assert list(model) == ["a", "b", "c"]
    assert not any(model[name] is old[name] for name in model)
    assert [module.training for module in model.values()] == [False, True, True]
    assert not any(p.requires_grad for p in model["b"].parameters())
    assert all(p.requires_grad for name in "ac" for p in model[name].parameters())
    assert {p.dtype for p in model["c"].parameters()} == {torch.float64}
    model["a"](torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert called == ["before", "after", "backward"]
    for handle in handles.values():
        handle.remove()
    model["a"](torch.randn(2, 6))
    assert len(called) == 3


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(5, 5)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    surgery = replace(model, ["a", "b.1"], experts=3)
    assert surgery.names == ("a",)
    assert model["a"] is model["b"][1]
    assert isinstance(model["a"], MuMoE)


def test_fresh_values_and_other_gates() -> None:
    torch.manual_seed(1)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))})
    gate = Gate("top_k", k=2, bias=True)
    pair = CP(3), Hadamard()
    surgery = replace(
        model, "a", experts=4, factorization=pair, gate=gate, start="paper", drop=0.5, batch=7
    )
    block = model["a"]
    assert isinstance(block, MuMoEMLP)
    assert block.config.first.gate == gate
    assert (block.first.spec.factorization, block.second.spec.factorization) == pair
    assert block.config.drop == 0.5
    assert block.first.init == "paper"
    assert surgery.replacements[0].fit is None
    assert "fresh" in str(surgery)
    # not the old weights: expert factors of the first level start around one
    assert block.first.factors["expert_0"].std() > 0.3


def test_fresh_layers_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    replace(model, ["0", "2"], experts=4, start="variance")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_encoder_layers_of_pytorch_call_their_new_layers() -> None:
    """In evaluation, these hand their weights to a fused kernel."""
    torch.manual_seed(2)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), num_layers=2
    ).eval()
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=mask)
        replace(encoder, "layers.*.linear?", experts=4, rank=9, example=(x, None, mask))
        found = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], wanted[~mask], rtol=0, atol=1e-5)


def test_the_report_counts_what_the_planner_counts() -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32))
    whole = count(model)
    device = Roofline("mine", 1e12, 1e10, 1e11, 1e-6)
    surgery = replace(
        model, nn.Linear, experts=8, budget=2000, batch=48, training=True, roofline=device
    )
    first, second = surgery.replacements
    assert first.before == linear_cost(64, 96, 48, bias=False, training=True)
    assert second.before == linear_cost(96, 32, 48, training=True)
    assert first.after == model[0].cost(48, training=True)
    assert (first.name, first.kind, first.sizes, first.inputs) == ("0", "Linear", (64, 96), 48)
    assert surgery.before.parameters == whole
    assert surgery.after.parameters == count(model)
    assert surgery.after.flops == first.after.flops + second.after.flops
    assert surgery.after.peak_memory == max(first.after.peak_memory, second.after.peak_memory)
    assert 1800 <= model[0].num_parameters <= 2000
    assert first.fit is not None
    assert 0 < first.fit.error < 1
    with pytest.raises(AttributeError):
        surgery.training = False  # type: ignore[misc]

    lines = str(surgery).splitlines()
    assert lines[0].split()[:3] == ["module", "inputs", "parameters"]
    assert "forward and backward" in lines[-2]
    assert lines[-1].endswith("mine")
    assert f"{whole:,} → {count(model):,} parameters" in lines[-3]
    arrows = {tuple(k for k, sign in enumerate(line) if sign == "→") for line in lines[2:4]}
    assert len(arrows) == 1
    assert max(map(len, lines)) < 120


def test_names_of_units() -> None:
    sizes = {"cpu": 2, "a100": 5}
    for name in sizes:
        model = nn.Sequential(nn.Linear(4, 4))
        surgery = replace(model, "0", experts=2, batch=10 ** sizes[name], roofline=name)
        assert isinstance(surgery, Surgery)
        assert surgery.roofline == PUBLISHED_ROOFLINES[name]
        head, _, row, *_ = str(surgery).splitlines()
        assert head.split()[3:6] == ["FLOPs", "peak", "time"]
        assert (" k → " in row) == (name == "cpu")
        assert (" M → " in row) == (name == "a100")
        assert " µs → " in row

"""Two models' predictions, compared with sums written out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tensormoe.cli import main
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe.decomposition import Search
from tensormoe.errors import ShapeError, SpecError
from tensormoe_torch import compress
from tensormoe_torch.compression import evaluate, reduce_experts
from tests._calibrated import save_model, save_text, save_tokenizer
from tests._torch_moe import rebuilt, sparse

QUICK = Search(starts=1, sweeps=8, polish=1)
TOKENS = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(7))


def log_probabilities(model: Any, tokens: Tensor) -> Any:
    """In float64, by NumPy: (tokens, vocabulary)."""
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double().flatten(0, 1).numpy()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    model = sparse("mixtral")
    compressed = copy.deepcopy(model)
    compress(compressed, "cp", rank=4, search=QUICK)
    return model, compressed


def test_figures_are_those_of_every_token(models: tuple[Any, Any]) -> None:
    model, compressed = models
    batches: Any = iter([TOKENS[:2], {"input_ids": TOKENS[2:]}])
    found = evaluate(model, compressed, batches, layers=True)
    p, q = (log_probabilities(each, TOKENS) for each in models)
    labels = TOKENS[:, 1:].flatten().numpy()
    assert found.tokens == len(labels) == 57
    for loss, each in zip(found.losses, (p, q), strict=True):
        assert loss == pytest.approx(-each[np.arange(57), labels].mean(), rel=1e-5)
    assert found.perplexities[1] == pytest.approx(np.exp(found.losses[1]))
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.agreement < 1
    divergences = (np.exp(p) * (p - q)).sum(-1)
    assert found.divergence == pytest.approx(divergences.mean(), rel=1e-4)
    assert found.divergence_99 == pytest.approx(np.sort(divergences)[56], rel=1e-4)
    assert found.weight_bytes[1] < found.weight_bytes[0]
    assert min(found.tokens_per_second) > 0
    assert found.peak_memory is None
    # each layer alone
    names = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert [each.name for each in found.layers] == names
    for place, each in enumerate(found.layers):
        alone = copy.deepcopy(model)
        whole = rebuilt(model, compressed)
        alone.model.layers[place].mlp.experts = whole.get_submodule(each.name)
        wanted = -log_probabilities(alone, TOKENS)[np.arange(57), labels].mean()
        assert each.loss == pytest.approx(wanted, rel=1e-5)
        assert each.increase == pytest.approx(wanted - found.losses[0], abs=1e-5)
    assert found.layers[0].loss != found.layers[1].loss
    assert not any(module._forward_hooks for module in model.modules())
    for shown in (str(found), found._repr_html_(), json.dumps(found.to_dict())):
        assert "perplexit" in shown
    assert "layers.1.mlp.experts compressed alone: loss" in str(found)


def test_a_model_agrees_with_itself_and_padding_does_not_count(models: tuple[Any, Any]) -> None:
    model, compressed = models
    found = evaluate(model, model, TOKENS)
    assert (found.agreement, found.divergence, found.divergence_99) == (1.0, 0.0, 0.0)
    assert found.losses[0] == found.losses[1]
    mask = torch.ones_like(TOKENS)
    mask[1:, 12:] = 0
    padded = evaluate(model, compressed, {"input_ids": TOKENS, "attention_mask": mask})
    alone = evaluate(model, compressed, [TOKENS[:1], TOKENS[1:, :12]])
    assert padded.tokens == alone.tokens == 19 + 22
    assert padded.losses == pytest.approx(alone.losses, rel=1e-5)
    assert padded.divergence == pytest.approx(alone.divergence, rel=1e-4)


def test_merged_experts_stand_in_and_pruned_ones_do_not(models: tuple[Any, Any]) -> None:
    model, _ = models
    merged = copy.deepcopy(model)
    reduce_experts(merged, TOKENS, keep=2)
    assert len(evaluate(model, merged, TOKENS, layers=True).layers) == 2
    pruned = copy.deepcopy(model)
    reduce_experts(pruned, TOKENS, keep=3, how="prune")
    assert evaluate(model, pruned, TOKENS).agreement < 1
    with pytest.raises(SpecError, match="stand in for as many"):
        evaluate(model, pruned, TOKENS, layers=True)


def test_what_cannot_be_compared_is_refused(models: tuple[Any, Any]) -> None:
    model, compressed = models
    for batches, match in (
        ([], "got none"),
        (TOKENS[:, :1], "windows of one token"),
        (torch.randn(2, 3), "must be token ids"),
        (TOKENS[0], "must be token ids"),
    ):
        with pytest.raises(SpecError, match=match):
            evaluate(model, compressed, batches)
    with pytest.raises(SpecError, match="must give logits"):
        evaluate(model.model, compressed, TOKENS)
    with pytest.raises(SpecError, match=r"must be nn\.Modules"):
        evaluate(model, None, TOKENS)  # type: ignore[arg-type]
    other = copy.deepcopy(model)
    other.lm_head = nn.Linear(16, 65, bias=False).double()
    with pytest.raises(SpecError, match="must have one vocabulary"):
        evaluate(model, other, TOKENS)
    with torch.no_grad():
        other.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ShapeError, match="logits must be finite"):
        evaluate(other, other, TOKENS)


def test_folders_and_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    text = save_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    compress_checkpoint(model, out, Compression("cp", rank=4, preset="mixtral", compare=False))
    words = ["evaluate", str(model), str(out), "--data", str(text), "--context", "16"]
    capsys.readouterr()
    assert main([*words, "--layers", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    # 25 windows of 16 tokens, the first token of each is not predicted
    assert found["tokens"] == 25 * 15
    assert found["losses"][0] != found["losses"][1]
    assert len(found["layers"]) == 2
    assert main([*words, "--samples", "3"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "45 tokens" in shown
    assert main(["evaluate", str(model), str(tmp_path), "--data", str(text)]) == 2
    assert "can't open" in capsys.readouterr().err
    save_tokenizer(tmp_path / "wrong", 99)
    assert main([*words, "--tokenizer", str(tmp_path / "wrong")]) == 2
    assert "vocabulary of 64 tokens" in capsys.readouterr().err

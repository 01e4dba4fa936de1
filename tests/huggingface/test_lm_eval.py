"""Tasks of lm-eval on models with factors, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import tensormoe_torch.huggingface
from tensormoe.compression import Compression, compress_checkpoint
from tensormoe_torch.compression import load_model
from tests._calibrated import save_model

lm_eval: Any = pytest.importorskip("lm_eval")
assert tensormoe_torch.huggingface

QUESTIONS = [("w3 w5", "w7 w9"), ("w1 w1 w4", "w2 w8"), ("w6", "w30 w11")]


# its own, and those of what it loads
@pytest.mark.filterwarnings("default")
def test_a_compressed_model_answers(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    wanted = Compression("cp", budget=0.3, preset="mixtral", compare=False)
    compress_checkpoint(tmp_path / "model", tmp_path / "factors", wanted)
    rows = [{"question": q, "choices": c.split(), "answer": 1} for q, c in QUESTIONS]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "which_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    from lm_eval.models.huggingface import HFLM

    model = load_model(tmp_path / "factors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "factors")
    # a token to begin with, and one that no text reaches
    tokenizer.bos_token, tokenizer.eos_token = "w1", "w2"
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found = lm_eval.simple_evaluate(language_model, tasks=[task], bootstrap_iters=0)

    right = 0
    for question, choices in QUESTIONS:
        ids = [int(each[1:]) for each in question.split()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        first, second = (int(each[1:]) for each in choices.split())
        right += bool(logits[second] > logits[first])
    assert found["results"]["which_word"]["acc,none"] == pytest.approx(right / 3)

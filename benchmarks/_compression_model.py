"""A small Mixtral on real text, as a folder of transformers: the subject of study_compression."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from _comparison.text import load_text

from tensormoe_torch import parameter_groups

COMMAND = ("bible", "-f", "gen1:1-rev22:21")
EVERY, LINES = 16, 256
PARTS = ("train", "held", "test")


@dataclass(frozen=True)
class Host:
    """Sizes of the model, and how it is trained.

    Args:
        pieces: of the vocabulary, found by byte-pair encoding.
        hidden: size of tokens.
        intermediate: size inside an expert.
        layers: of the model.
        experts: in each layer.
        top_k: experts per token.
        context: tokens of a window.
        steps: of AdamW, with a warm-up over a tenth of them, then a cosine down to zero.
        batch: windows per step.
        rate: the highest learning rate.
    """

    pieces: int = 1024
    hidden: int = 96
    intermediate: int = 128
    layers: int = 4
    experts: int = 16
    top_k: int = 2
    context: int = 128
    steps: int = 2500
    batch: int = 16
    rate: float = 3e-3

    def build(self) -> MixtralForCausalLM:
        """A model with fresh values."""
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=self.pieces,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=self.experts,
                num_experts_per_tok=self.top_k,
                max_position_embeddings=4 * self.context,
                router_aux_loss_coef=0.01,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )

    def trained(self, folder: Path, seed: int) -> Path:
        """A folder with a model and its tokenizer; trained if it is not there yet."""
        made = folder / f"model-{seed}"
        if made.exists():
            return made
        texts = written(folder)
        tokenizer = self.tokenizer(folder, texts["train"])
        ids = torch.tensor(tokenizer.encode(texts["train"].read_text()))
        torch.manual_seed(seed)
        model = self.build()
        train(model, ids, self, seed)
        part = folder / f"model-{seed}.part"
        # what most sparse models are stored in
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(made)
        return made

    def tokenizer(self, folder: Path, text: Path) -> PreTrainedTokenizerFast:
        """Byte-pair encoding of the training text."""
        path = folder / "tokenizer"
        if not path.exists():
            found = Tokenizer(models.BPE())
            found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            found.decoder = decoders.ByteLevel()
            found.train(
                [str(text)],
                trainers.BpeTrainer(
                    vocab_size=self.pieces,
                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                    show_progress=False,
                ),
            )
            PreTrainedTokenizerFast(tokenizer_object=found).save_pretrained(path)
        return PreTrainedTokenizerFast.from_pretrained(path)


def written(folder: Path) -> dict[str, Path]:
    """Files of the King James Bible of Debian's package bible-kjv, else of Python's reference.

    Of every sixteen pieces of 256 lines one is held out, to choose settings by, and one is for
    tests.
    """
    paths = {part: folder / f"{part}.txt" for part in PARTS}
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    lines = _text().splitlines(keepends=True)
    pieces = [lines[start : start + LINES] for start in range(0, len(lines), LINES)]
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for place, piece in enumerate(pieces):
        rest = place % EVERY
        part = "held" if rest == EVERY // 2 else "test" if rest == EVERY - 1 else "train"
        found[part] += piece
    for part, path in paths.items():
        path.write_text("".join(found[part]))
    return paths


def _text() -> str:
    try:
        raw = subprocess.run(COMMAND, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return raw.stdout
    except FileNotFoundError:
        text = load_text()
        return "".join(text.symbols[each] for each in [*text.train.tolist(), *text.test.tolist()])


def train(model: nn.Module, ids: Tensor, host: Host, seed: int) -> None:
    """Train a model in place, with the loss that balances the experts' loads."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=host.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    warm, losses = max(host.steps // 10, 1), []
    for step in range(host.steps):
        rest = (step - warm) / max(host.steps - warm, 1)
        share = (step + 1) / warm if step < warm else 0.5 + 0.5 * cos(pi * rest)
        for group in optimizer.param_groups:
            group["lr"] = host.rate * share
        starts = torch.randint(len(ids) - host.context, (host.batch,), generator=generator)
        windows = torch.stack([ids[start : start + host.context] for start in starts.tolist()])
        found = model(windows, labels=windows, output_router_logits=True)
        losses.append(found.loss.item())
        optimizer.zero_grad()
        found.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(seed, step + 1, mean(losses[-200:]), file=sys.stderr, flush=True)

"""Tables of a GPU report that compare layers with others on PyTorch: the CPU's comparison again.

The layers are those of ``bench_torch_peers.py`` and, besides, our sparse mixtures. Packages that
are not installed are left out; nothing is downloaded.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from _gpu_records import Cells, Recorder
from _gpu_settings import BFLOAT16, FLOAT32, Precision, Sizes
from _gpu_timing import Turns, torch_elapsed
from _gpu_torch import has_precision
from _peers import Comparison, Contender, comparisons
from _peers_measure import forward_call, step_call
from _peers_modules import FEATURES, HIDDEN
from _shared import Call, interleaved
from torch import nn

from tensormoe_torch import SparseMoE

TOKENS = 1024
MIB = 2**20
# parameters, their gradients, and what a step makes besides
COPIES = 3


@dataclass(frozen=True)
class Entry:
    """One row: a layer with so many experts, beside the plain layer of its comparison."""

    comparison: Comparison
    contender: Contender
    experts: int
    precision: Precision

    def __str__(self) -> str:
        count = f", {self.experts:,} experts" if self.contender.has_experts else ""
        return f"{self.comparison.title}: {self.contender.name}{count}, {self.precision.name}"


class PeerTables:
    """Measures on one device.

    Args:
        recorder: of this part.
        sizes: of the report.
        device: "cuda" or "cpu".
    """

    def __init__(self, recorder: Recorder, sizes: Sizes, device: str) -> None:
        self.recorder, self.sizes, self.device = recorder, sizes, device
        self.elapsed = torch_elapsed(device)
        self.tokens = TOKENS if device == "cuda" else 2

    def run(self) -> None:
        """One table for linear experts, and one for those of two layers."""
        torch.set_float32_matmul_precision("highest")
        self.recorder.each(self._entries(), self._row, self._clean)

    def _entries(self) -> list[Entry]:
        found = []
        capable = self.device == "cuda" and has_precision(self.device, BFLOAT16)
        for precision in (BFLOAT16, FLOAT32) if capable else (FLOAT32,):
            for place, experts in enumerate(self.sizes.peers):
                for comparison in comparisons():
                    layers = (*comparison.contenders, *_sparse(comparison))
                    found += [
                        Entry(comparison, each, experts, precision)
                        for each in layers
                        # the CPU's library; and layers without experts are the same for any number
                        if "oneDNN" not in each.name and (each.has_experts or not place)
                    ]
        return found[:: self.sizes.every]

    def _row(self, entry: Entry) -> None:
        contender = entry.contender
        dtype = getattr(torch, entry.precision.dtype)
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                stored = _entries_of(contender.build(entry.experts))
            if COPIES * stored * entry.precision.itemsize > self._free():
                self.recorder.left_out(str(entry), f"{stored:,} parameters do not fit in memory")
                return
            with torch.device(self.device):
                module = contender.build(entry.experts).to(dtype)
                plain = entry.comparison.contenders[0].build(0).to(dtype)
                if contender.fit is not None:
                    contender.fit(module, self.tokens)
        except ImportError:
            self.recorder.left_out(contender.name, "its package is not installed")
            return
        x = torch.randn(self.tokens, FEATURES, device=self.device, dtype=dtype)
        cells: Cells = {
            "layer": contender.name,
            "experts": entry.experts if contender.has_experts else None,
            "precision": entry.precision.name,
            "parameters": stored,
        }
        for name, make in (("forward", forward_call), ("step", step_call)):
            call = make(module, x)
            memory = self._memory(call)
            turn = Turns(self.elapsed, self.sizes.turn)
            pair = [call, make(plain, x)]
            mine, reference = interleaved(pair, self.sizes.seconds, turn=turn)
            cells |= {
                f"{name} µs": mine * 1e6,
                f"{name} ÷ plain": mine / reference,
                f"{name} MiB": None if memory is None else memory / MIB,
            }
        self.recorder.row(f"PyTorch, {entry.comparison.title}, {self.tokens:,} tokens", cells)

    def _memory(self, call: Call) -> int | None:
        """Bytes that a call takes at its worst moment besides what was there."""
        call()
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _free(self) -> float:
        return torch.cuda.mem_get_info()[0] if self.device == "cuda" else 2**31

    def _clean(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _sparse(comparison: Comparison) -> list[Contender]:
    """Our mixtures that run two experts per token, among those of two layers."""
    if str(HIDDEN) not in comparison.title:
        return []

    def build(experts: int, factorization: str) -> nn.Module:
        return SparseMoE(
            FEATURES,
            HIDDEN,
            experts=experts,
            top_k=2,
            kind="mlp",
            bias=True,
            factorization=factorization,
        )

    return [
        Contender("SparseMoE, top 2", lambda n: build(n, "dense"), ours=True),
        Contender("SparseMoE CP, top 2", lambda n: build(n, "cp"), ours=True),
    ]


def _entries_of(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())

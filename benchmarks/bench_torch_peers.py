"""Our layers on PyTorch against packages that do something near: time and memory on the CPU.

float32, 16 to 1024 experts of 768 → 768 (and two-layer experts of 768 → 3072 → 768), 1 to 1024
tokens; every gate is included. *forward* is a call in eval mode without gradients, *step* one of
training: forward, loss, gradients of parameters and input, plain SGD. Times are medians, each taken
in turns with the plain layer of the same sizes; *× plain* is the ratio within those turns. *MiB* is
the most that tensors occupied at once during the call, parameters not counted.

A layer of more than 3 GiB of parameters, or a call that would take more than a minute as far as
fewer experts foretell, is not run, and the line says so.

    python benchmarks/bench_torch_peers.py --seconds 0.4 --plot torch-peers.png
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from _peers import Comparison, Contender, comparisons
from _peers_measure import Measured, forward_call, measure, step_call
from _peers_modules import FEATURES
from _peers_plot import draw
from _peers_report import GIB, Line, notes, print_block, print_head
from torch import nn

EXPERTS, BATCHES = (16, 64, 256, 1024), (1, 64, 1024)
LARGEST = 3 * GIB
LONGEST = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each figure")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS, help="how many, rising")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture as well")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print_head()
    begin, lines = perf_counter(), []
    for comparison in comparisons():
        race = Race(comparison, arguments.seconds, begin)
        for experts in arguments.experts:
            found = race.run(experts)
            print_block(comparison.title, experts, found)
            lines += found
    for note in notes(lines):
        print(note, flush=True)
    if arguments.plot:
        draw(arguments.plot, lines)
    print(f"{perf_counter() - begin:.0f} s in all", file=sys.stderr)


class Race:
    """One comparison, for more and more experts."""

    def __init__(self, comparison: Comparison, seconds: float, begin: float) -> None:
        self.comparison, self.seconds, self.begin = comparison, seconds, begin
        self.reference = comparison.contenders[0].build(0)
        self.inputs = {batch: torch.randn(batch, FEATURES) for batch in BATCHES}
        self.before: dict[tuple[str, int], Line] = {}
        self.first = True

    def run(self, experts: int) -> list[Line]:
        """The lines for so many experts, by batch; layers without experts come the first time."""
        lines = []
        for contender in self.comparison.contenders:
            if contender.has_experts or self.first:
                said = f"{self.comparison.title}, {experts:4} experts: {contender.name}"
                print(f"{perf_counter() - self.begin:5.0f} s  {said}", file=sys.stderr, flush=True)
                lines += self._lines(contender, experts)
                gc.collect()
        self.first = False
        self.before |= {(line.layer, line.batch): line for line in lines}
        return sorted(lines, key=lambda line: line.batch)

    def _lines(self, contender: Contender, experts: int) -> list[Line]:
        stored = 0
        try:
            if contender.has_experts:
                with torch.device("meta"):
                    stored = _parameters(contender.build(experts))
            too_large = 4 * stored > LARGEST
            module = None if too_large else contender.build(experts)
        except ImportError:
            reason = f"not run: {contender.package} is not installed"
            return [self._line(contender, experts, batch, 0, reason, reason) for batch in BATCHES]
        if module is None:
            reason = f"not run: {4 * stored / GIB:.1f} GiB of parameters"
            return [
                self._line(contender, experts, batch, stored, reason, reason) for batch in BATCHES
            ]
        lines = []
        for batch in BATCHES:
            if contender.fit is not None:
                contender.fit(module, batch)
            stored = _parameters(module)
            both = [
                self._measured(contender, module, experts, batch, stored, training)
                for training in (False, True)
            ]
            lines.append(self._line(contender, experts, batch, stored, *both))
        return lines

    def _line(
        self,
        contender: Contender,
        experts: int,
        batch: int,
        stored: int,
        forward: Measured | str,
        step: Measured | str,
    ) -> Line:
        return Line(
            title=self.comparison.title,
            layer=contender.name,
            ours=contender.ours,
            experts=experts if contender.has_experts else None,
            batch=batch,
            parameters=stored,
            forward=forward,
            step=step,
        )

    def _measured(
        self,
        contender: Contender,
        module: nn.Module,
        experts: int,
        batch: int,
        stored: int,
        training: bool,
    ) -> Measured | str:
        previous = self.before.get((contender.name, batch))
        if previous is not None and previous.experts is not None:
            reason = _forbidding(previous, experts / previous.experts, stored, training)
            if reason is not None:
                return reason
        call = step_call if training else forward_call
        x = self.inputs[batch]
        return measure(call(module, x), call(self.reference, x), self.seconds)


def _forbidding(previous: Line, growth: float, stored: int, training: bool) -> str | None:
    """Reason to leave a call out: its time for fewer experts, extrapolated to this many."""
    found = previous.step if training else previous.forward
    if isinstance(found, str):
        return found
    seconds, memory = growth * found.seconds, growth * found.memory + 4 * stored
    if seconds > LONGEST:
        return f"not run: about {seconds:.0f} s"
    if memory > 0.8 * _machine_memory():
        return f"not run: about {memory / GIB:.0f} GiB"
    return None


def _machine_memory() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        # not said on this system: then nothing is held back
        return float("inf")


def _parameters(module: nn.Module) -> int:
    parameters: Sequence[nn.Parameter] = list(module.parameters())
    return sum(parameter.numel() for parameter in parameters)


if __name__ == "__main__":
    main()

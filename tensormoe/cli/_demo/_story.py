"""Steps of the demo and their text, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tensormoe import LayerSpec
from tensormoe._config import LayerConfig
from tensormoe._format import format_rank
from tensormoe.analysis import Images, explore
from tensormoe.choosing._explore import row_dict
from tensormoe.choosing._rows import Row
from tensormoe.cli._columns import LAYER_COLUMNS
from tensormoe.cli._console import make_table, print_json
from tensormoe.cli._demo import _digits
from tensormoe.cli._demo._picture import draw
from tensormoe.cli._demo._proof import largest_error, routing
from tensormoe.cli._demo._training import HIDDEN, Classifier, History, Linear, train
from tensormoe.cli._profile import resolve_device
from tensormoe.errors import CheckpointError
from tensormoe.factorizations import resolve_factorization
from tensormoe.gates import Gate
from tensormoe.planning import Cost, Roofline
from tensormoe.planning._gate_cost import gate_parameters
from tensormoe.selection import Budget, dense_moe_cost, linear_cost, select_rank
from tensormoe_numpy import MuMoE

if TYPE_CHECKING:
    from rich.console import Console

_RUNS = 3
_BATCH = 1024
_GATE = Gate("entmax")
_FACTORIZATIONS = {"cp": "CP", "tensor_ring": "tensor ring"}


@dataclass
class Entry:
    """A model with what it costs and what came of it.

    Args:
        name: for people.
        factorization: None for linear layers.
        hidden: the size of the body's output.
        body_parameters: of the layer that is compared.
        gate_parameters: of its gate.
        models: one a run, trained.
        histories: one a run.
    """

    name: str
    spec: LayerSpec | None
    hidden: int
    body_parameters: int
    gate_parameters: int
    models: list[Classifier] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)

    @property
    def all_parameters(self) -> int:
        """Body, gate and head."""
        head = (self.hidden + 1) * _digits.CLASSES
        return self.body_parameters + self.gate_parameters + head

    @property
    def accuracies(self) -> list[float]:
        """On the test images, one a run."""
        return [history.accuracies[-1] for history in self.histories]

    @property
    def layer(self) -> MuMoE:
        """The mixture of the first run."""
        body = self.models[0].body
        assert isinstance(body, MuMoE)
        return body

    def model(self, seed: int) -> tuple[Classifier, np.random.Generator]:
        """An untrained model, and the generator that goes on to shuffle its batches."""
        rng = np.random.default_rng(seed)
        body: MuMoE | Linear
        if self.spec is None:
            body = Linear(_digits.PIXELS, self.hidden, rng)
        else:
            spec = self.spec
            body = MuMoE(
                spec.in_features,
                spec.out_features,
                spec.experts,
                spec.factorization,
                gate=_GATE,
                seed=rng,
            )
        return Classifier(body, self.hidden, rng), rng


def tell(
    console: Console,
    folder: Path,
    experts: tuple[int, ...],
    epochs: int,
    seed: int,
    *,
    as_json: bool,
) -> None:
    """Run the demo.

    Args:
        console: where it is told.
        folder: where its files go.
        experts: one size per level.
        epochs: passes over the training images.
        seed: of the first run; the others count up from it.
        as_json: print one JSON object at the end.
    """
    start = perf_counter()
    digits = _digits.load()
    device = resolve_device(None)
    entries = _entries(experts)
    rows = _compare(console, entries, experts, device)
    _train(console, entries, digits, epochs, seed)
    errors = _prove(console, entries, digits)
    _report(console, entries, digits, epochs, seed)
    files = _keep(console, entries, digits, folder)
    picture = folder / "demo.png"
    tables = {
        entry.name: routing(entry.layer, digits.test, digits.test_labels, _digits.CLASSES)
        for entry in entries
        if entry.spec is not None
    }
    draw(picture, {entry.name: entry.histories for entry in entries}, tables)
    files.append(str(picture))
    console.print("\n6  Picture: loss curves, and which digits each expert serves", style="bold")
    console.print(f"   {picture}", soft_wrap=True)
    files.append(_explore(console, entries[0], digits, folder))
    seconds = perf_counter() - start
    console.print(f"\nAll of it took {seconds:.0f} s.", style="dim")
    if as_json:
        print_json(
            {
                "command": "demo",
                "experts": list(experts),
                "epochs": epochs,
                "seeds": [seed + run for run in range(_RUNS)],
                "train_images": len(digits.train),
                "test_images": len(digits.test),
                "device": device.to_dict(),
                "costs": {row.name: row_dict(row) for row in rows},
                "max_relative_error": errors,
                "models": [_entry_dict(entry) for entry in entries],
                "files": files,
                "seconds": seconds,
            }
        )


def _entries(experts: tuple[int, ...]) -> list[Entry]:
    """CP and tensor ring at the budget of the linear layer, and two linear layers."""
    pixels = _digits.PIXELS
    budget = Budget.like_linear(pixels, HIDDEN, gate=False)
    gate = gate_parameters(_GATE, pixels, experts)
    entries = []
    for name, shown in _FACTORIZATIONS.items():
        rank = select_rank(name, pixels, HIDDEN, experts, budget=budget)
        spec = LayerSpec(pixels, HIDDEN, experts, resolve_factorization(name, rank))
        entries.append(Entry(shown, spec, HIDDEN, spec.num_parameters, gate))
    linear = (pixels + 1) * HIDDEN
    entries.append(Entry("linear", None, HIDDEN, linear, 0))
    # the gate's parameters spent on a wider layer instead, its larger head counted
    wide = HIDDEN + gate // (pixels + 1 + _digits.CLASSES)
    entries.append(Entry("linear, wider", None, wide, (pixels + 1) * wide, 0))
    return entries


def _compare(
    console: Console, entries: list[Entry], experts: tuple[int, ...], device: Roofline
) -> list[Row]:
    pixels = _digits.PIXELS
    listed = " × ".join(map(str, experts))
    console.print(f"\n1  A linear layer, {pixels} → {HIDDEN}, and {listed} experts", style="bold")
    rows = [
        _row(entry.name, entry.spec.cost(_BATCH, gate=_GATE), device, entry.spec)
        for entry in entries
        if entry.spec is not None
    ]
    dense = LayerSpec(pixels, HIDDEN, experts, "dense")
    linear = _row("linear", linear_cost(pixels, HIDDEN, _BATCH), device)
    rows.append(replace(linear, expert_rank=dense.expert_rank, expert_span=1))
    cost = dense_moe_cost(pixels, HIDDEN, experts, _BATCH, gate=_GATE)
    rows.append(_row("dense MoE", cost, device, dense))
    heads = [column.head for column in LAYER_COLUMNS]
    table = make_table(*heads[:3], "gate", *heads[3:], left=2)
    gate = gate_parameters(_GATE, pixels, experts)
    for row in rows:
        values, own = row_dict(row), 0 if row.name == "linear" else gate
        cells = [column.cell(values) for column in LAYER_COLUMNS]
        style = "green" if row.name in _FACTORIZATIONS.values() else ""
        counts = (f"{values['parameters'] - own:,}", f"{own:,}" if own else "–")
        table.add_row(*cells[:2], *counts, *cells[3:], style=style)
    console.print()
    console.print(table)
    console.print()
    budget = (pixels + 1) * HIDDEN
    console.print(
        f"Ranks are the best within the {budget:,} parameters of the linear layer; the gate\n"
        f"comes on top. FLOPs, memory and time: a forward call of {_BATCH:,} images with the\n"
        f"gate, as predicted for {device.name}.",
        style="dim",
    )
    return rows


def _row(name: str, cost: Cost, device: Roofline, spec: LayerSpec | None = None) -> Row:
    if spec is None:
        return Row(name, cost, device.time(cost))
    config = LayerConfig(spec, _GATE)
    return Row(name, cost, device.time(cost), config, spec.expert_rank, spec.expert_span)


def _train(
    console: Console, entries: list[Entry], digits: _digits.Digits, epochs: int, seed: int
) -> None:
    count = len(digits.train)
    console.print(
        f"\n2  Training on {count:,} images of handwritten digits, {_RUNS} runs each", style="bold"
    )
    for entry in entries:
        with _progress(console, entry.name, _RUNS * epochs) as report:
            for run in range(_RUNS):
                model, rng = entry.model(seed + run)
                entry.models.append(model)
                entry.histories.append(train(model, digits, epochs, rng, report))


@contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # on a narrow terminal the figures alone
    wide = console.width >= 80
    columns = (
        TextColumn("   {task.description:<14}" if wide else "{task.description:<13}"),
        *((BarColumn(bar_width=28),) if wide else ()),
        TextColumn("{task.fields[state]:<22}"),
        *((TimeElapsedColumn(),) if wide else ()),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, state="")

        def report(loss: float, accuracy: float) -> None:
            progress.update(task, advance=1, state=f"loss {loss:.4f}  test {accuracy:.1%}")

        yield report


def _prove(console: Console, entries: list[Entry], digits: _digits.Digits) -> dict[str, float]:
    images = np.concatenate([digits.train, digits.test])
    console.print(
        f"\n3  Factorized = unfactorized, on all {len(images):,} images in float64", style="bold"
    )
    console.print("   against a plain einsum over all experts, built explicitly", style="dim")
    errors = {}
    for entry in entries:
        if entry.spec is not None:
            errors[entry.name] = error = largest_error(entry.layer, images)
            built = entry.spec.num_experts * (_digits.PIXELS + 1) * HIDDEN
            console.print(
                f"   {entry.name:<14} largest relative error {error:.1e} "
                f"({entry.spec.num_parameters:,} numbers for {built:,})"
            )
    return errors


def _report(
    console: Console, entries: list[Entry], digits: _digits.Digits, epochs: int, seed: int
) -> None:
    tests = len(digits.test)
    console.print(f"\n4  Accuracy on {tests} test images", style="bold")
    table = make_table(
        "model", "rank", "layer", "gate", "all with head", "accuracy", "lowest", "highest", left=2
    )
    best = max(np.mean(entry.accuracies) for entry in entries)
    for entry in entries:
        found = entry.accuracies
        rank = None if entry.spec is None else entry.spec.factorization.rank
        table.add_row(
            entry.name,
            format_rank(rank) if entry.spec is not None else f"hidden {entry.hidden}",
            f"{entry.body_parameters:,}",
            f"{entry.gate_parameters:,}" if entry.gate_parameters else "–",
            f"{entry.all_parameters:,}",
            f"{np.mean(found):.1%}",
            f"{min(found):.1%}",
            f"{max(found):.1%}",
            style="bold green" if np.mean(found) == best else "",
        )
    console.print()
    console.print(table)
    console.print()
    console.print(_verdict(entries, tests), style="dim")


def _verdict(entries: list[Entry], tests: int) -> str:
    """Conclusion from the accuracies, whichever model they favour."""
    means = {entry.name: float(np.mean(entry.accuracies)) for entry in entries}
    linear = means["linear"]
    gaps = ", ".join(
        f"{name} {100 * (means[name] - linear):+.1f}" for name in _FACTORIZATIONS.values()
    )
    # one standard error of the difference of two accuracies on so many images
    noise = 100 * float(np.sqrt(2 * linear * (1 - linear) / tests))
    highest = max(means.values())
    winners = " and ".join(name for name, mean in means.items() if mean == highest)
    return (
        f"Means of {_RUNS} runs; the highest: {winners}.\n"
        f"Points against the linear layer: {gaps}; less than {noise:.1f} is\n"
        f"noise (one standard error on {tests} images). The wider linear layer has as many\n"
        "parameters as the factorized ones with their gates."
    )


def _keep(
    console: Console, entries: list[Entry], digits: _digits.Digits, folder: Path
) -> list[str]:
    console.print("\n5  Checkpoints", style="bold")
    files = []
    for entry in entries:
        if entry.spec is None:
            continue
        path = folder / f"{entry.spec.factorization.name}.safetensors"
        entry.layer.save(path)
        again = MuMoE.load(path)
        if not np.array_equal(again(digits.test), entry.layer(digits.test)):
            raise CheckpointError(
                f"{str(path)!r} gives other outputs than the layer it was saved from."
            )
        files.append(str(path))
        console.print(f"   {path}: loaded again, outputs equal to the last bit", soft_wrap=True)
    return files


def _explore(console: Console, entry: Entry, digits: _digits.Digits, folder: Path) -> str:
    path = folder / "experts.html"
    explore(
        entry.layer,
        digits.test,
        digits.test_labels,
        head=entry.models[0].behind,
        examples=Images(digits.pictures, high=16.0),
        classes=_digits.CLASSES,
        title=f"{entry.name}: experts for digits",
        path=path,
    )
    console.print("\n7  Explorer: what every expert does, to open in a browser", style="bold")
    console.print(f"   {path}", soft_wrap=True)
    return str(path)


def _entry_dict(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "spec": None if entry.spec is None else entry.spec.to_dict(),
        "hidden": entry.hidden,
        "parameters": entry.body_parameters,
        "gate_parameters": entry.gate_parameters,
        "all_parameters": entry.all_parameters,
        "accuracies": entry.accuracies,
        "losses": [history.losses for history in entry.histories],
        "seconds": [history.seconds for history in entry.histories],
    }

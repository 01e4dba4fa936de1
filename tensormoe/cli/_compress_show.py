"""Output of ``tensormoe compress``: bars, tables and JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tensormoe._format import (
    format_bytes,
    format_parameters,
    format_rank,
    format_share,
    format_time,
    plain_rank,
)
from tensormoe._rounding import AUTO, checked_bits_or_auto
from tensormoe.cli._console import make_console, make_table
from tensormoe.compression import (
    Calibration,
    Compression,
    CompressionPlan,
    CompressionProgress,
    CompressionResult,
    GroupPlan,
    GroupReport,
)
from tensormoe.compression._verdict import verdicts
from tensormoe.planning import Roofline

if TYPE_CHECKING:
    from rich.console import Console

MACHINES = (1, 8, 64)
"""Sizes of clusters that a dry run predicts times for."""

_STAGES = {"experts": "decomposing", "files": "writing"}


@contextmanager
def bars(console: Console | None) -> Iterator[Callable[[CompressionProgress], None] | None]:
    """A bar for each stage with its state, sweep by sweep; nothing without a console."""
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with ExitStack() as stack:
        shown = Bars(*columns, console=console)
        tasks: dict[str, TaskID] = {}

        def report(now: CompressionProgress) -> None:
            if not tasks:
                # not before there is something to show: errors come alone
                stack.enter_context(shown)
            stage, total = now.stage, now.total
            if stage not in tasks:
                tasks[stage] = shown.add_task(_STAGES[stage], total=total, state="")
            # a stage without bytes is done as well
            shown.update(tasks[stage], completed=now.done, total=total or None, state=_state(now))

        yield report


def _state(now: CompressionProgress) -> str:
    """Current state of a stage, in words."""
    if now.search is None:
        return now.name
    rank = format_rank(now.search.factorization.rank)
    error = format_share(now.search.error)
    return f"{now.name}: rank {rank}, sweep {now.search.sweep}, off by {error}"


def show_plan(plan: CompressionPlan, device: Roofline, limit: int | None) -> None:
    """Show a plan."""
    console = make_console()
    settings = plan.settings
    calibrated = settings.calibration is not None
    columns = ["experts", "shape", "dtype", "rank", "before", "after", "memory", "time"]
    table = make_table(*columns, *(["rows"] if calibrated else []))
    for each in plan.tried:
        table.add_row(
            each.group.label,
            _shape(each.group.experts, each.group.in_features, each.group.out_features),
            each.group.dtype,
            _planned_rank(each, plan.settings),
            format_parameters(each.group.entries),
            _at_most(format_parameters(each.parameters), plan.settings),
            format_bytes(each.memory),
            format_time(each.seconds),
            *([f"{each.rows:,}"] if each.rows is not None else []),
        )
    if plan.others:
        count = len(plan.others)
        console.print()
        console.print(
            f"gate and up projection: as one tensor or as two, in each of {count} "
            f"{'layer' if count == 1 else 'layers'} what loses less",
            soft_wrap=True,
        )
    shards = len(plan.model.shards)
    console.print()
    console.print(
        f"{plan.model.name}: {format_bytes(plan.model.nbytes)} in {shards} "
        f"{'file' if shards == 1 else 'files'}, {_factors(settings)}, {_wish(settings)}"
    )
    console.print()
    console.print(table)
    console.print()
    console.print(
        f"experts: {format_parameters(plan.dense_entries)} → "
        f"{_at_most(format_parameters(plan.parameters), settings)} parameters; output: "
        f"{_at_most(format_bytes(plan.output_bytes), settings)}",
        soft_wrap=True,
    )
    if checked_bits_or_auto(settings.bits) is not None:
        console.print(
            f"{_bits_asked(settings)}: {format_bytes(plan.dense_bytes)} → "
            f"{_at_most(format_bytes(plan.factor_bytes), settings)} "
            f"({plan.factor_bytes / plan.dense_bytes:.1%}), scales included",
            soft_wrap=True,
        )
    console.print(
        f"memory: {format_bytes(plan.memory)} at most; time: about {format_time(plan.seconds)} "
        f"on {device.name}, as far as FLOPs tell",
        soft_wrap=True,
    )
    if calibrated:
        console.print(f"calibration: {_calibrated(settings)}", soft_wrap=True)
    times = (f"{format_time(plan.seconds_on(each))} on {each}" for each in MACHINES)
    console.print(f"on such machines in a cluster: {', '.join(times)}", soft_wrap=True)
    if plan.quantized and plan.output_bytes >= plan.model.nbytes:
        console.print(
            "The output is not smaller than the model: its weights have 4 or 8 bits, and what is "
            "written has 16.",
            style="bold red",
            soft_wrap=True,
        )
    if limit is not None and plan.memory > limit:
        console.print(f"This does not fit in {format_bytes(limit)}.", style="bold red")
    console.print("A dry run: only headers were read, and nothing was written.")


def show_result(console: Console, result: CompressionResult, settings: Compression) -> None:
    """Show a result."""
    several = not isinstance(settings.factorization, str) or settings.factorization == "auto"
    columns = ["experts", "shape", *(["factors"] if several else []), "rank"]
    columns += ["bits"] if settings.bits == AUTO else []
    columns += ["before", "after", "error"]
    calibrated = settings.calibration is not None
    predicted = result.predicted_loss
    columns += [*(["outputs"] if calibrated else []), *([] if predicted is None else ["loss"])]
    columns += ["SVD error", "joint SVD", "time"]
    table = make_table(*columns)
    for each in result.groups:
        table.add_row(
            each.name.removesuffix(".weight").removeprefix("model."),
            _shape(each.experts, each.in_features, each.out_features),
            *([each.factorization] if several else []),
            format_rank(each.rank),
            *([_bits(each)] if settings.bits == AUTO else []),
            format_parameters(each.dense_parameters),
            format_parameters(each.parameters),
            format_share(each.error),
            *([format_share(each.output_error)] if calibrated else []),
            *([] if predicted is None else [f"{each.predicted_loss:+.4f}"]),
            format_share(each.svd_error),
            format_share(None if each.joint is None else each.joint.error),
            "–" if each.seconds is None else format_time(each.seconds),
        )
    console.print()
    console.print(table)
    console.print()
    console.print(
        f"experts: {format_parameters(result.dense_parameters)} → "
        f"{format_parameters(result.parameters)} parameters "
        f"({result.parameters / result.dense_parameters:.1%}), {_factors(settings)}",
        soft_wrap=True,
    )
    if checked_bits_or_auto(settings.bits) is not None:
        console.print(
            f"{_bits_asked(settings)}: {format_bytes(result.dense_bytes)} → "
            f"{format_bytes(result.nbytes)} ({result.nbytes / result.dense_bytes:.1%}), "
            f"{'if factors were stored' if settings.dense else 'scales included'}; SVDs are of "
            "no more parameters, and not rounded",
            soft_wrap=True,
        )
    if calibrated:
        console.print(
            f"error: of weights; outputs: error of outputs on the calibration's data, weighted by "
            f"{_calibrated(settings)}",
            soft_wrap=True,
        )
    if predicted is not None:
        console.print(
            f"loss: {predicted:+.4f} nats per token, as the calibration predicts it "
            f"{_holding(settings)}; tensormoe evaluate measures it",
            soft_wrap=True,
        )
    for line in _notes(result):
        console.print(line, soft_wrap=True)
    what = (
        "the model with rebuilt experts"
        if settings.dense
        else "experts in factors; README.md says how to open it"
    )
    console.print(f"{result.output}: {what}", soft_wrap=True)


def _holding(settings: Compression) -> str:
    """Errors for which a predicted loss holds."""
    assert settings.calibration is not None
    measured = Calibration.load(settings.calibration).measured
    return "by measured responses" if measured else "for small errors"


def _calibrated(settings: Compression) -> str:
    """Weighting of errors, in words."""
    what = {"both": "inputs and outputs", "fisher": "inputs and gradients", "none": "nothing"}
    shown = what.get(settings.weighting, settings.weighting)
    experts = {"equal": "alike", "frequency": "by frequency", "router": "by router weights"}
    return f"{shown}, experts {experts[settings.expert_weights]}"


def _notes(result: CompressionResult) -> Iterator[str]:
    """Controls that lose less, and searches that were cut short."""
    yield from verdicts(result.groups)
    for ended, what in (("time", "the time limit"), ("stalled", "rounding")):
        count = sum(each.ended == ended for each in result.groups)
        if count:
            yield f"{what} ended the search in {count} of {len(result.groups)} groups"


def plan_dict(plan: CompressionPlan, device: Roofline, limit: int | None) -> dict[str, Any]:
    """A plan in plain values: entries, bytes and seconds."""
    return {
        "command": "compress",
        "dry_run": True,
        "model": plan.model.name,
        "files": [shard.name for shard in plan.model.shards],
        "settings": plan.settings.to_dict(),
        "device": device.to_dict(),
        "max_memory": limit,
        "fits": limit is None or plan.memory <= limit,
        "memory": plan.memory,
        "seconds": plan.seconds,
        "machines": {str(each): plan.seconds_on(each) for each in MACHINES},
        "bytes": plan.model.nbytes,
        "output_bytes": plan.output_bytes,
        "dense_parameters": plan.dense_entries,
        "parameters": plan.parameters,
        "dense_bytes": plan.dense_bytes,
        "factor_bytes": plan.factor_bytes,
        "groups": [
            {
                "name": each.group.name,
                "stacked": each.group.stacked,
                "transposed": each.group.transposed,
                "experts": each.group.experts,
                "in_features": each.group.in_features,
                "out_features": each.group.out_features,
                "dtype": each.group.dtype,
                "ranks": [plain_rank(spec.factorization.rank) for spec in each.specs],
                "dense_parameters": each.group.entries,
                "parameters": each.parameters,
                "nbytes": each.nbytes,
                "memory": each.memory,
                "seconds": each.seconds,
                "rows": each.rows,
                **({"instead": list(each.instead)} if each.instead else {}),
            }
            for each in plan.tried
        ],
    }


def result_dict(result: CompressionResult, settings: Compression) -> dict[str, Any]:
    """A result in plain values."""
    return {
        "command": "compress",
        "dry_run": False,
        "output": result.output,
        "settings": settings.to_dict(),
        "dense_parameters": result.dense_parameters,
        "parameters": result.parameters,
        "predicted_loss": result.predicted_loss,
        "dense_bytes": result.dense_bytes,
        "factor_bytes": result.nbytes,
        "verdicts": list(verdicts(result.groups)),
        "groups": [each.to_dict() | {"svd_error": each.svd_error} for each in result.groups],
    }


def _shape(experts: int, rows: int, columns: int) -> str:
    return f"{experts} × {rows} × {columns}"


def _planned_rank(each: GroupPlan, settings: Compression) -> str:
    """The likeliest rank, and how many others are tried."""
    rank = format_rank(each.specs[0].factorization.rank)
    if len({spec.factorization.name for spec in each.specs}) > 1:
        return f"of {len(each.specs)} in {len({s.factorization.name for s in each.specs})} forms"
    if settings.tolerance is not None:
        return f"≤ {rank}"
    return rank if len(each.specs) == 1 else f"{rank} of {len(each.specs)}"


def _at_most(text: str, settings: Compression) -> str:
    exact = settings.budget is None and settings.tolerance is None
    return text if exact else f"≤ {text}"


def _bits_asked(settings: Compression) -> str:
    """Bits of an entry, in words."""
    return "bits as chosen" if settings.bits == AUTO else f"{settings.bits} bits"


def _bits(each: GroupReport) -> str:
    """Bits of an entry of what was written."""
    return str(each.bits or 8 * each.dense_bytes // each.dense_parameters)


def _factors(settings: Compression) -> str:
    """The factorization, or those to choose from."""
    named = settings.factorization
    shown = named if isinstance(named, str) else " or ".join(map(str, named))  # type: ignore[arg-type]
    return shown if settings.share == "equal" else f"{shown}, shared out by {settings.share}"


def _wish(settings: Compression) -> str:
    if settings.allocation is not None:
        return f"ranks of an allocation by {settings.allocation.by}"
    if settings.tolerance is not None:
        return f"errors up to {settings.tolerance:g}"
    if isinstance(settings.budget, float):
        unit = "parameters" if checked_bits_or_auto(settings.bits) is None else "bytes"
        return f"{100 * settings.budget:.3g}% of the experts' {unit}"
    if settings.budget is not None:
        return f"{format_parameters(settings.budget)} parameters"
    if settings.rank is None:
        return f"in {settings.bits} bits"
    return f"rank {format_rank(settings.rank)}"

"""Train every variant with every seed, under the same conditions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from _tables import make_console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from _comparison.outcome import Outcome, Task
from _comparison.report import draw, save, show
from _comparison.training import Recipe, Run, train
from _comparison.variants import VARIANTS

__all__ = ["compare", "parse", "resolve_recipe"]

_CHOICES = {variant.factorization or "dense": variant for variant in VARIANTS}


def parse(
    description: str, words: Sequence[str] | None = None, tokens: Sequence[str] = ()
) -> argparse.Namespace:
    """The words that both examples understand; those of the command line by default.

    Args:
        description: of the example.
        words: to read instead.
        tokens: kinds of tokens to choose from, the default first.
    """
    parser = argparse.ArgumentParser(description=description)
    if tokens:
        parser.add_argument("--tokens", choices=tokens, default=tokens[0], help="what is predicted")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--seeds", type=int, help="runs of each variant")
    parser.add_argument("--steps", type=int, help="updates a run")
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument(
        "--only", choices=tuple(_CHOICES), help="one variant, to choose settings by"
    )
    parser.add_argument(
        "--holdout", action="store_true", help="score on a part of the training data instead"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written")
    parser.add_argument("--picture", type=Path, help="where the picture goes, if not to --out")
    return parser.parse_args(words)


def resolve_recipe(recipe: Recipe, words: argparse.Namespace) -> Recipe:
    """The recipe, with the changes that the command line asks for."""
    changes = {name: getattr(words, name) for name in ("steps", "rate")}
    changes["scores"] = 1 if words.holdout else None
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def compare(task: Task, recipe: Recipe, words: argparse.Namespace) -> list[Outcome]:
    """Train all, print a table, write figures and a picture, and check.

    Raises:
        RuntimeError: a variant has more parameters than the dense model, or did not learn.
    """
    variants = VARIANTS if words.only is None else (_CHOICES[words.only],)
    outcomes = [Outcome.of(variant, task, recipe) for variant in variants]
    for outcome in outcomes:
        if outcome.parameters > outcomes[0].parameters:
            raise RuntimeError(
                f"{outcome.name} has {outcome.parameters} parameters, more than the dense model's "
                f"{outcomes[0].parameters}"
            )
    seeds = words.seeds or (2 if words.quick else 3)
    with _progress() as start:
        reports = [start(outcome.name, seeds * recipe.steps) for outcome in outcomes]
        trained: dict[str, nn.Module] = {}
        # in turns, so that a busy hour of the machine falls on all of them
        for seed in range(seeds):
            for variant, outcome, report in zip(variants, outcomes, reports, strict=True):
                torch.manual_seed(seed)
                model = task.build(variant)
                outcome.runs.append(train(model, task.batches(seed), recipe, task.score, report))
                if variant.factorization is not None:
                    trained[variant.name] = model
    show(task, recipe, outcomes)
    picture = words.picture or words.out / f"{task.name}.png"
    save(words.out / f"{task.name}.json", task, recipe, outcomes)
    draw(picture, task, outcomes)
    make_console().print(f"\nloss curves: {picture}", soft_wrap=True)
    for name, model in [*trained.items()][:1]:
        page = words.out / f"{task.name}-experts.html"
        task.explore(model, page)
        make_console().print(f"what the experts of {name} do: {page}", soft_wrap=True)
    for outcome in outcomes:
        for run in outcome.runs:
            _check_learned(outcome.name, run)
    return outcomes


def _check_learned(name: str, run: Run) -> None:
    few = max(len(run.losses) // 10, 1)
    first, last = mean(run.losses[:few]), mean(run.losses[-few:])
    if not last < 0.9 * first:
        raise RuntimeError(f"{name} did not learn: loss {first:.3f} at first, {last:.3f} at last")


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[Run], None]]]:
    """Progress bars, one per variant: a function that starts one and returns its step function."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[state]:<36}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=make_console()) as progress:

        def start(name: str, total: int) -> Callable[[Run], None]:
            bar = progress.add_task(name, total=total, state="")

            def report(run: Run) -> None:
                state = f"loss {run.losses[-1]:.3f}"
                if run.scores:
                    score = run.scores[-1]
                    state += f"  test {score.loss:.3f}, {score.accuracy:.1%}"
                progress.update(bar, advance=1, state=state)

            return report

        yield start

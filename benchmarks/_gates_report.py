"""Tables of the study of gates, from the runs that are there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from statistics import mean
from typing import Any

from _gates_runs import DECAY, Found, Runs

__all__ = ["print_screen", "print_tables"]

Row = dict[str, Any]


def print_screen(runs: Runs, names: Iterable[str]) -> None:
    """Print one row per candidate: what it gains over the linear layer on both tasks.

    Args:
        runs: of the stage.
        names: of the candidates.
    """
    cells = [(task, experts) for task in ("text", "images") for experts in (16, 256)]
    heads = [f"{task}, {experts}" for task, experts in cells]
    print(
        f"| gate | mean | {' | '.join(heads)} | dead, %: {' | '.join(heads[1::2])} | first step |"
    )
    print("| --- |" + " ---: |" * (len(cells) + 4))
    table = []
    for name in names:
        gains, dead, first = [], [], 0.0
        for task, experts in cells:
            base = 100 * mean(_all(_screened(runs, task, "linear", []), "accuracy"))
            found = _screened(runs, task, name, [experts])
            gains.append([100 * each - base for each in _all(found, "accuracy")])
            dead.append(_levels(found, "dead", 100))
            first = max(first, *_all(found, "gradient_ratio"))
        total = mean(mean(each) for each in gains)
        parts = [f"{mean(each):+.2f} ± {(max(each) - min(each)) / 2:.2f}" for each in gains]
        row = [name, f"{total:+.2f}", *parts, *dead[1::2], f"{first:.2g}"]
        table.append((total, f"| {' | '.join(row)} |"))
    for _, line in sorted(table, reverse=True):
        print(line)


def _screened(runs: Runs, task: str, model: str, experts: list[int]) -> list[Found]:
    """The scored runs of a model with AdamW and the gate on top."""
    wanted = {"task": task, "model": model, "experts": experts, "total": False, "held_out": False}
    wanted |= {"optimizer": "adamw", "decay": DECAY}
    wanted |= {"factorization": "cp"} if experts else {}
    return [found for key, found in runs.known.items() if wanted.items() <= json.loads(key).items()]


def print_tables(runs: Runs) -> None:
    """Print one table for each task, with rows in the order in which they were run."""
    rows: dict[str, tuple[Row, list[Found]]] = {}
    for key, found in runs.known.items():
        setting = json.loads(key)
        if setting["held_out"]:
            continue
        same = {name: value for name, value in setting.items() if name not in ("rate", "seed")}
        rows.setdefault(json.dumps(same), (setting, []))[1].append(found)
    for name in dict.fromkeys(setting["task"] for setting, _ in rows.values()):
        _print_task(name, [row for row in rows.values() if row[0]["task"] == name])


def _print_task(name: str, rows: list[tuple[Row, list[Found]]]) -> None:
    print(f"\n{name}\n")
    print(
        "| gate | experts | parameters | rate | test accuracy, % | less the linear layer ", end=""
    )
    print("| dead, % | active | polysemanticity | first gradient | kept, % |")
    print("| --- |" + " ---: |" * 10)
    base = {
        (setting["optimizer"], setting["decay"]): mean(_all(found, "accuracy"))
        for setting, found in rows
        if setting["model"] == "linear"
    }
    for setting, found in rows:
        accuracy = [100 * value for value in _all(found, "accuracy")]
        more = ""
        same = setting["optimizer"], setting["decay"]
        if same in base and setting["model"] != "linear":
            more = f"{mean(accuracy) - 100 * base[same]:+.2f}"
        words = [setting["model"]]
        words += ["ring"] * (setting["factorization"] == "tensor_ring")
        words += ["in all"] * setting["total"]
        words += [setting["optimizer"]] * (setting["optimizer"] != "adamw")
        words += [f"decay {setting['decay']:g}"] * (setting["decay"] != DECAY)
        cells = [
            ", ".join(words),
            " × ".join(map(str, setting["experts"])) or "–",
            f"{found[0]['parameters']:,}",
            f"{setting['rate']:g}",
            f"{mean(accuracy):.2f} ({min(accuracy):.2f} – {max(accuracy):.2f})",
            more,
        ]
        if "dead" in found[0]:
            cells += [_levels(found, "dead", 100), _levels(found, "active")]
            cells.append(_levels(found, "polysemanticity", digits=2))
            cells.append(f"{mean(_all(found, 'gradient_ratio')):.2g}")
            if "kept_first" in found[0]:  # of runs long enough to tell
                cells.append(f"{100 * mean(_all(found, 'kept_first')):.0f}")
        print("| " + " | ".join(cells + [""] * (11 - len(cells))) + " |")


def _all(found: Iterable[Found], name: str) -> list[float]:
    return [float(each[name]) for each in found]


def _levels(found: list[Found], name: str, unit: float = 1.0, digits: int = 1) -> str:
    """Means over runs, one per level."""
    levels = zip(*(each[name] for each in found), strict=True)
    return ", ".join(f"{unit * mean(level):.{digits}f}" for level in levels)

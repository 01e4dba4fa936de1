"""The page: one HTML file that loads nothing, with the data inside."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from tensormoe._format import format_bytes, format_experts
from tensormoe._html import facts_html
from tensormoe.analysis._explorer._file import packed
from tensormoe.analysis._explorer._top import TopInputs
from tensormoe.analysis._explorer._value import Exploration, ExploredLevel

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_VERSION = 1
# classes per expert, the largest first; all where there are no more
_CLASSES = 24
# entries of logits of scaled experts for top inputs, for affected ones, and of recorded inputs
_LOGITS = 2**20
# in this order: what a part runs at once may need those before it
_SCRIPTS = ("data", "list", "scatter", "card", "edits", "grids", "start")
# bytes of a page that notebooks show
_NOTEBOOK = 2**21


def page(found: Exploration) -> bytes:
    """The bytes of the page."""
    style, body = (_source(f"page.{end}") for end in ("css", "html"))
    # one function, so that the parts see one another and the page's globals stay as they are
    parts = "".join(_source(f"page_{name}.js") for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(payload(found), separators=(",", ":"))
    # nothing of the data can end the element that holds it, or start a comment in it
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    places = {
        "POLICY": escape(policy, quote=True),
        "TITLE": escape(found.title).encode("ascii", "xmlcharrefreplace").decode("ascii"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": data,
    }
    pieces = []
    for piece in body.split("%%"):
        pieces.append(places.get(piece, piece))
    return "".join(pieces).encode("utf-8")


def in_notebook(found: Exploration) -> str:
    """The page in a frame without rights, or a few facts where it is large."""
    made = found.html()
    if len(made) > _NOTEBOOK:
        level = found.levels[0]
        facts: dict[str, object] = {
            "experts": format_experts(found.experts),
            "inputs": f"{found.inputs:,}",
            "classes": len(found.class_names) or "unknown",
            "unused experts": f"{level.load.dead.size:,}",
            "page": f"{format_bytes(len(made))}: write it with .save('experts.html')",
        }
        return facts_html(found.title, facts)
    return (
        '<iframe sandbox="allow-scripts" width="100%" height="720" style="border: 0" title="'
        f'{escape(found.title, quote=True)}" srcdoc="{escape(made.decode(), quote=True)}"></iframe>'
    )


def payload(found: Exploration) -> dict[str, Any]:
    """Contents of the page: the data file's numbers in single precision, cut where they are many.

    Of many classes each expert keeps the largest; logits are kept of as many top inputs as fit.
    """
    import numpy as np

    numbers = {number: place for place, number in enumerate(found.recorded)}
    labels = [-1 if each.label is None else each.label for each in found.recorded.values()]
    logits = [each.logits for each in found.recorded.values()]
    known = bool(logits) and None not in logits and bool(found.scales)
    table: NDArray[Any] | None = np.array(logits, np.float32) if known else None
    if table is not None and table.size > _LOGITS:
        table = None
    return {
        "version": PAGE_VERSION,
        "title": found.title,
        "inputs": found.inputs,
        "classes": list(found.class_names),
        "columns": list(found.columns),
        "scales": list(found.scales),
        "linear": found.linear,
        "levels": [
            _level(each, numbers, table is not None)
            | {"parts": None if table is None else _parts(found, place)}
            for place, each in enumerate(found.levels)
        ],
        "grids": [packed(each, "float32") for each in found.grids],
        "numbers": packed(np.array(list(found.recorded), "int32")),
        "labels": packed(np.array(labels, "int32")),
        "logits": packed(table),
        "contents": [dict(each.content) for each in found.recorded.values()],
    }


def _level(level: ExploredLevel, numbers: dict[int, int], logits: bool) -> dict[str, Any]:
    special = level.specialization
    made: dict[str, Any] = {
        "experts": level.experts,
        "sum": float(level.load.mass.sum() / max(level.load.inputs, 1)),
        "threshold": level.load.threshold,
        "load": packed(level.load.share, "float32"),
        "frequency": packed(level.load.frequency, "float32"),
        "divergence": None,
        "baseline": None,
        "excess": None,
        "polysemanticity": packed(level.polysemanticity, _single(level.polysemanticity)),
        "top": _inputs(level.top, numbers, logits),
        "affected": None if level.affected is None else _inputs(level.affected, numbers, logits),
        "near": None,
        "histogram": None,
        "effect": None,
        "lost": None,
    }
    if special is not None and level.histogram is not None:
        for name in ("divergence", "baseline", "excess"):
            made[name] = packed(getattr(special, name), "float32")
        made["histogram"] = _largest(level.histogram.shares)
    if level.interventions is not None:
        made["effect"] = _largest(level.interventions.effect)
        lost, gained = (getattr(level.interventions, each) for each in ("lost", "gained"))
        made["lost"] = packed(lost.sum(axis=1), "int32")
        made["gained"] = packed(gained.sum(axis=1), "int32")
        made["correct"] = int(level.interventions.correct.sum())
    if level.nearest is not None:
        made["near"] = {
            "numbers": packed(level.nearest.numbers, "int32"),
            "cosines": packed(level.nearest.cosines, "float32"),
        }
    return made


def _parts(found: Exploration, level: int) -> dict[str, Any] | None:
    """Terms of logits from each expert of a level, input after input; as many inputs as fit.

    Those that more experts show first come before others.
    """
    import numpy as np

    inputs = list(found.recorded.values())
    if not inputs or not inputs[0].contributions:
        return None
    classes, left = len(inputs[0].logits or ()), _LOGITS
    counts = np.full(len(inputs), -1, np.int32)
    for place in _by_rank(found):
        size = inputs[place].contributions[level].experts.size
        left -= size * classes
        if left < 0:
            break
        counts[place] = size
    kept = [each.contributions[level] for each, n in zip(inputs, counts, strict=True) if n >= 0]
    experts = [each.experts for each in kept]
    logits = [each.logits for each in kept]
    return {
        "counts": packed(counts),
        "experts": packed(np.concatenate([np.zeros(0, np.int32), *experts]), "int32"),
        "logits": packed(np.concatenate([np.zeros((0, classes)), *logits]), "float32"),
    }


def _by_rank(found: Exploration) -> list[int]:
    """Places of recorded inputs, those that stand first with an expert before others."""
    import numpy as np

    rank: dict[int, int] = {}
    for level in found.levels:
        for top in (level.top, level.affected):
            if top is not None:
                for slot, numbers in enumerate(np.asarray(top.numbers).T.tolist()):
                    for number in numbers:
                        rank[number] = min(rank.get(number, slot), slot)
    numbers = list(found.recorded)
    return sorted(range(len(numbers)), key=lambda place: (rank[numbers[place]], place))


def _inputs(top: TopInputs, numbers: dict[int, int], logits: bool) -> dict[str, Any]:
    """Places of the inputs among those that are recorded, and what is known of each."""
    import numpy as np

    places = [[numbers.get(each, -1) for each in row] for row in top.numbers.tolist()]
    changed = top.changed if logits else None
    if changed is not None:
        experts, _, scales, classes = changed.shape
        changed = changed[:, : _LOGITS // max(experts * scales * classes, 1)]
    return {
        "places": packed(np.array(places, "int32").reshape(top.numbers.shape)),
        "values": packed(top.values, "float32"),
        "changed": packed(changed, _single(changed)),
        "marks": packed(top.marks, _single(top.marks)),
    }


def _largest(values: NDArray[Any]) -> dict[str, Any]:
    """Classes (N, T) with the largest values of every expert, and the values."""
    import numpy as np

    order = np.argsort(-np.nan_to_num(values, nan=-1.0), axis=1, kind="stable")[:, :_CLASSES]
    found = np.take_along_axis(values, order, axis=1)
    return {"classes": packed(order, "int32"), "values": packed(found, "float32")}


def _single(array: NDArray[Any] | None) -> str | None:
    return None if array is None else "float32"


def _source(name: str) -> str:
    return files("tensormoe.analysis._explorer").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + b64encode(sha256(text.encode("utf-8")).digest()).decode("ascii")

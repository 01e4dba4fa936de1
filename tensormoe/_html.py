"""Values as HTML, for notebooks: one look for specs, plans, layers and reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensormoe._format import Cell, format_experts, format_parameters

if TYPE_CHECKING:
    from tensormoe._drawing import Drawing
    from tensormoe._spec import LayerSpec

# no colours: those of the page are kept, light or dark
_CELL = "text-align: left; padding: 0.1em 1.2em 0.1em 0; vertical-align: top"
_NUMBER = "text-align: right; padding: 0.1em 0 0.1em 1.2em; white-space: nowrap"
_TABLE = '<table style="border-collapse: collapse; margin: 0.4em 0">'


def facts_html(
    title: str, facts: Mapping[str, object], drawings: Mapping[str, Drawing] | None = None
) -> str:
    """Names with their values.

    Args:
        title: of the whole.
        facts: by name.
        drawings: shown when they are opened, by what they are called.
    """
    rows = (
        f'<tr><th style="{_CELL}; white-space: nowrap">{_text(name)}</th>'
        f'<td style="{_CELL}">{_text(value)}</td></tr>'
        for name, value in facts.items()
    )
    return _page(title, [_TABLE, *rows, "</table>"], drawings or {})


def table_html(title: str, rows: Sequence[Sequence[Cell]], notes: Iterable[str] = ()) -> str:
    r"""A table whose first row holds its heads, with notes below.

    >>> table_html("a < b", [["name", "entries"], ["x", ("2", "1")]])[:48]
    '<div class="tensormoe"><strong>a &lt; b</strong>'
    """
    lines = [_TABLE]
    for tag, cells in (("th" if not k else "td", row) for k, row in enumerate(rows)):
        written = (
            f'<{tag} style="{_NUMBER if index else _CELL}">'
            f"{_text(cell if isinstance(cell, str) else ' → '.join(cell))}</{tag}>"
            for index, cell in enumerate(cells)
        )
        lines.append(f"<tr>{''.join(written)}</tr>")
    return _page(title, [*lines, "</table>", *(f"<div>{_text(note)}</div>" for note in notes)], {})


def text_html(title: str, text: str, drawing: Drawing | None = None) -> str:
    """Lines of text as they stand."""
    block = f'<pre style="line-height: 1.3; margin: 0.4em 0">{_text(text)}</pre>'
    return _page(title, [block], {} if drawing is None else {"picture": drawing})


def spec_html(spec: LayerSpec, more: Mapping[str, object] | None = None) -> str:
    """A layer's sizes, and its network."""
    facts = _spec_facts(spec) | dict(more or {})
    return facts_html(repr(spec.factorization), facts, {"network": spec.draw()})


def layer_html(layer: Any) -> str:
    """A layer of any framework: what it is made of, and how to make it again.

    Args:
        layer: has a ``config``, of one layer, of a block of two, of a mixture of layers, or of what
            is added to another layer.
    """
    config = layer.config
    parts = _layers_of(config)
    specs = {name: each.spec for name, each in parts.items()}
    facts: dict[str, object] = {}
    for name, spec in specs.items():
        facts |= {f"{name}{key}": value for key, value in _spec_facts(spec).items()}
    if hasattr(config, "layers"):
        facts["router"] = repr(getattr(config, "router", "–"))
    else:
        gate = next(iter(parts.values())).gate
        facts["gate"] = "none: takes coefficients" if gate is None else repr(gate)
    facts["parameters"] = format_parameters(config.num_parameters)
    facts["dtype"] = getattr(layer, "dtype", None) or "–"
    facts["as code"] = repr(layer)
    drawings = {f"{name}network": spec.draw() for name, spec in specs.items()}
    return facts_html(type(layer).__name__, facts, drawings)


def _layers_of(config: Any) -> dict[str, Any]:
    """Configurations of the layers, by what stands before their facts."""
    if hasattr(config, "spec"):
        return {"": config}
    if hasattr(config, "layer"):
        return {"adapter ": config.layer}
    if hasattr(config, "layers"):
        return {f"{name} ": each for name, each in config.layers.items()}
    return {"first ": config.first, "second ": config.second}


def _spec_facts(spec: LayerSpec) -> dict[str, object]:
    dense = spec.num_experts * (spec.in_features + spec.bias) * spec.out_features
    share = f"{spec.num_parameters / dense:.2%} of the dense experts'"
    return {
        "experts": f"{format_experts(spec.experts)} of {spec.in_features} → {spec.out_features}",
        "factorization": repr(spec.factorization),
        "entries": f"{format_parameters(spec.num_parameters)}, {share}",
        "capacity": f"expert rank {spec.expert_rank:,}, expert span {spec.expert_span:,}",
        "bias": "yes" if spec.bias else "no",
    }


def _page(title: str, lines: Iterable[str], drawings: Mapping[str, Drawing]) -> str:
    shown = (
        f"<details><summary>{_text(name)}</summary>{drawing.svg}</details>"
        for name, drawing in drawings.items()
    )
    head = f'<div class="tensormoe"><strong>{_text(title)}</strong>'
    return "\n".join([head, *lines, *shown, "</div>"])


def _text(value: object) -> str:
    # not at the top: `import tensormoe` loads this module, and html has a table of all entities
    from html import escape

    return escape(str(value))

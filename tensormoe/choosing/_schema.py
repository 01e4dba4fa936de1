"""Requests and responses as JSON Schema, draft 2020-12."""

from __future__ import annotations

from typing import Any

from tensormoe.choosing._request import ITEMSIZES, KINDS, LIMITS, PARTS
from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.gates import Gate
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline
from tensormoe.selection import OBJECTIVES

Schema = dict[str, Any]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def request_schema() -> Schema:
    """The fields of a request; everything else is refused.

    >>> sorted(request_schema()["required"])
    ['experts', 'in_features']
    """
    size = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}, {"type": "null"}]}
    names = list(FACTORIZATIONS)
    bond = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}, {"type": "null"}]}
    fields: dict[str, Schema] = {
        "kind": {
            **_one_of(KINDS),
            "description": "a layer, a block of two, a gated block, or an embedding",
        },
        "in_features": {**size, "description": "size of an input; number of ids of an embedding"},
        "hidden_features": {**size, "description": "size between two layers; 4 × in_features"},
        "out_features": {**size, "description": "size of an output; in_features"},
        "experts": {
            "anyOf": [*size["anyOf"][:2], _list({"type": "integer", "minimum": 1})],
            "description": "number of experts, or one size per level: 128, [16, 8] or '16x8'",
        },
        "factorizations": {
            "anyOf": [_list({"type": "string"}), {"type": "string"}, {"type": "null"}],
            "examples": [names],
            "description": "names to compare; all that are registered",
        },
        "bonds": {
            "anyOf": [
                {"type": "object", "additionalProperties": _list(bond)},
                _list({"type": "string"}),
                {"type": "string"},
                {"type": "null"},
            ],
            "description": "sizes that are fixed, by factorization; null for free ones",
        },
        "budget": {
            "anyOf": [
                {"type": "object", "properties": dict.fromkeys(LIMITS, _QUANTITY)},
                {"type": "integer", "minimum": 1},
                {"type": "string"},
                {"type": "null"},
            ],
            "description": "upper limits on a forward call, in entries, FLOPs, bytes and seconds; "
            "the parameters of what is replaced, with the gate on top",
        },
        "gate_in_budget": {**_FLAG, "description": "whether the budget covers the gate; true"},
        "objective": {**_one_of(OBJECTIVES), "description": "what ranks maximize; capacity"},
        "gate": {
            "anyOf": [{"type": "string"}, _object(Gate.__dataclass_fields__), {"type": "null"}],
            "description": "name of an activation or all fields of a gate; null for none; entmax",
        },
        "top_k": {**size, "description": "experts per token of gates and mixtures that choose; 2"},
        "bias": {**_FLAG, "description": "whether every expert has a bias; true"},
        "batch": {**size, "description": "inputs of a call; 1024"},
        "training": {**_FLAG, "description": "costs of forward and backward; false"},
        "dtype": {**_one_of(ITEMSIZES), "description": "of all arrays; float32"},
        "devices": {**size, "description": "that a layer or block is cut over; 1"},
        "device": {
            "anyOf": [
                {"type": "string", "examples": list(PUBLISHED_ROOFLINES)},
                _object(Roofline.__dataclass_fields__),
                {"type": "null"},
            ],
            "description": "name of a published profile, or a measured one; cpu, "
            "and a100 for 16 bits",
        },
        "selected": {
            "type": ["string", "null"],
            "description": "the factorization that is shown in full; the best one",
        },
        "rank": {
            "anyOf": [*size["anyOf"], _list({"type": "integer", "minimum": 1})],
            "description": "of the selected one, instead of what the budget buys",
        },
        "parts": {
            "anyOf": [_list(_one_of(PARTS)), {"type": "null"}],
            "description": "of the response; all",
        },
    }
    return {
        "$schema": _DRAFT,
        "title": "a request of tensormoe.choosing.explore",
        "type": "object",
        "properties": fields,
        "required": ["in_features", "experts"],
        "additionalProperties": False,
    }


def response_schema() -> Schema:
    """The fields of a response.

    >>> sorted(response_schema()["required"])
    ['errors', 'version']
    """
    figures = {
        "parameters": {**_COUNT, "description": "entries"},
        "flops": {**_COUNT, "description": "of a call"},
        "matmul_flops": {**_COUNT, "description": "of these, in matrix products"},
        "memory": {**_COUNT, "description": "bytes at the worst moment, beyond input and factors"},
        "saved_memory": {**_COUNT, "description": "bytes kept for the backward pass"},
        "bytes_moved": {**_COUNT, "description": "read and written"},
        "time": {"type": "number", "description": "predicted seconds"},
    }
    rank = {"anyOf": [_COUNT, _list(_COUNT), {"type": "null"}]}
    limits = {"type": "object", "additionalProperties": {"type": "number"}}
    row = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "feasible": {"type": "boolean"},
            "note": {"type": "string"},
            "rank": {**rank, "description": "of a single layer"},
            "ranks": {**_list(rank), "description": "one for each layer"},
            **figures,
            "expert_rank": _COUNT_OR_NONE,
            "expert_span": _COUNT_OR_NONE,
            "leg": {"type": "string", "description": "the fastest to cut over the devices"},
            "cut": {
                **_object(("parameters", "memory", "communicated", "time")),
                "description": "one device's part, of a layer without its gate",
            },
            "message": {"type": "string", "description": "why nothing fits"},
            "smallest_budget": limits,
            "alternatives": _list(_object(("change", "smallest_budget"), smallest_budget=limits)),
        },
        "required": ["name", "feasible", "note"],
        "additionalProperties": False,
    }
    point = _object(
        ("rank", "expert_rank", "expert_span", "parameters", "gate_parameters"), rank=rank
    )
    text = {"type": "string"}
    plans = ("network", "program", "plan", "first_batch", "last_batch", "dense")
    layer = _object(
        ("name", "spec", "shapes", "expert_rank", "expert_span", *plans),
        network={**text, "description": "SVG"},
        program={**text, "description": "SVG"},
        plan={**text, "description": "the plan as text"},
    )
    counts = ("matmul_flops", "elementwise_flops", "bytes_read", "bytes_written")
    step = ("label", "count", *counts, "time")
    shown = _object(
        ["factorization", "title", "layers", "steps", "memory", "code", "legs"],
        layers=_list(layer),
        steps=_list(_object(step)),
        memory={**_object(("parameters", "forward", "training", "saved")), "description": "bytes"},
        code={"type": "object", "additionalProperties": text, "description": "by framework"},
        legs=_list(_object(("leg", "parameters", "memory", "communicated", "time"))),
    )
    best = _object(("name", "reason", "others"), name=text, reason=text)
    return {
        "$schema": _DRAFT,
        "title": "a response of tensormoe.choosing.explore",
        "type": "object",
        "properties": {
            "version": _COUNT,
            "errors": {
                **_list(_object(("field", "message"), field=text, message=text)),
                "description": "of a request that cannot be, which has no other answer",
            },
            "request": {"type": "object", "description": "the request, nothing left open"},
            "best": _or_none(best),
            "rows": {**_list(row), "description": "one for each factorization"},
            "gate": _or_none(_object(figures, **figures)),
            "fronts": {"type": "object", "additionalProperties": _list(point)},
            "baselines": {**_list(row), "description": "what is replaced, and other mixtures"},
            "selected": _or_none(shown),
        },
        "required": ["version", "errors"],
        "additionalProperties": False,
    }


_COUNT: Schema = {"type": "integer", "minimum": 0}
_COUNT_OR_NONE: Schema = {"type": ["integer", "null"], "minimum": 0}
_FLAG: Schema = {"type": ["boolean", "null"]}
_QUANTITY: Schema = {"type": ["number", "string"]}


def _one_of(values: Any) -> Schema:
    return {"enum": [*values, None]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_none(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(names: Any, **fields: Schema) -> Schema:
    """An object with exactly these fields."""
    return {
        "type": "object",
        "properties": {name: fields.get(name, {}) for name in names},
        "required": list(names),
        "additionalProperties": False,
    }

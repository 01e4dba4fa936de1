"""From a request to a response: all that can be said about a layer before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensormoe._format import plain_rank
from tensormoe.choosing._best import best
from tensormoe.choosing._compared import compared
from tensormoe.choosing._request import Request, parse_request
from tensormoe.choosing._rows import Row, fronts, row
from tensormoe.choosing._selected import cut_dict, selected
from tensormoe.errors import BudgetError, RequestError, TensormoeError
from tensormoe.planning import Cost, gate_cost
from tensormoe.selection import OBJECTIVES, RankChoice

MakeRow = Callable[[Request, str], Row]

VERSION = 1
"""Of the form of responses."""


def explore(request: Mapping[str, Any] | Request) -> dict[str, Any]:
    """Layers that a budget buys, next to what they replace; plain values, ready for JSON.

    Nothing is raised for a request that cannot be: the response then has ``errors`` alone, a
    message for each field. :func:`request_schema` and :func:`response_schema` say which fields
    there are.

    Args:
        request: plain values, or a request that was checked.

    >>> response = explore({"in_features": 768, "out_features": 768, "experts": 512})
    >>> response["best"]["name"], response["rows"][0]["rank"]
    ('tensor_ring', 288)
    >>> explore({"in_features": "many", "out_features": 768, "experts": 512})["errors"]
    [{'field': 'in_features', 'message': "in_features must be a positive integer; got 'many'. \
Write digits: 768."}]
    """
    return answer_or_errors(request)


def answer_or_errors(request: Mapping[str, Any] | Request, make: MakeRow = row) -> dict[str, Any]:
    """The response to a request, or the errors of its fields."""
    try:
        asked = request if isinstance(request, Request) else parse_request(request)
        return answer(asked, make)
    except RequestError as error:
        return _refused(error.fields.items())
    except TensormoeError as error:
        # sizes that are possible one by one, and not together
        return _refused([("", error)])


def answer(request: Request, make: MakeRow = row) -> dict[str, Any]:
    """The response to a request that was checked.

    Args:
        request: as :func:`parse_request` makes it.
        make: makes a row of a request for a factorization, or has it already.

    Raises:
        TensormoeError: sizes that are possible one by one, and not together.
    """
    # ranks follow the objective, and so does what another one would recommend; that is asked where
    # it takes no search
    fast = "others" in request.parts and {*request.budget.limits} == {"parameters"}
    by_objective = {
        objective: [make(replace(request, objective=objective), name) for name in request.names]
        for objective in (OBJECTIVES if fast else (request.objective,))
    }
    rows = by_objective[request.objective]
    found = best(by_objective, request.objective)
    response: dict[str, Any] = {
        "version": VERSION,
        "request": request.to_dict(),
        "errors": [],
        "best": None
        if found is None
        else {"name": found.name, "reason": found.reason, "others": found.others},
    }
    if "rows" in request.parts:
        response["rows"] = [row_dict(each) for each in rows]
        response["gate"] = _gate(request)
    if "fronts" in request.parts:
        response["fronts"] = {name: front_list(fronts(request, name)) for name in request.names}
    if "baselines" in request.parts:
        response["baselines"] = [row_dict(each) for each in compared(request)]
    if "selected" in request.parts:
        name = request.selected or (None if found is None else found.name)
        shown = next((each for each in rows if each.name == name and each.error is None), None)
        response["selected"] = None if shown is None else selected(request, shown)
    return response


def row_dict(row: Row) -> dict[str, Any]:
    """A row in plain values: counts, bytes and seconds."""
    values: dict[str, Any] = {"name": row.name, "feasible": row.error is None, "note": row.note}
    if row.error is not None or row.cost is None:
        return {**values, **_infeasible(row.error)}
    ranks = [plain_rank(each) for each in row.ranks]
    values |= {
        "rank": ranks[0] if len(ranks) == 1 else None,
        "ranks": ranks,
        **cost_dict(row.cost),
        "time": row.time,
        "expert_rank": row.expert_rank,
        "expert_span": row.expert_span,
    }
    if row.legs:
        part = cut_dict(row.legs[0])
        values |= {"leg": part.pop("leg"), "cut": part}
    return values


def cost_dict(cost: Cost) -> dict[str, int]:
    """A cost in plain values."""
    return {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "matmul_flops": cost.matmul_flops,
        "memory": cost.peak_memory,
        "saved_memory": cost.saved_memory,
        "bytes_moved": cost.bytes_read + cost.bytes_written,
    }


def front_list(front: Sequence[RankChoice]) -> list[dict[str, Any]]:
    """A front in plain values."""
    return [
        {
            "rank": plain_rank(each.rank),
            "expert_rank": each.expert_rank,
            "expert_span": each.expert_span,
            "parameters": each.parameters,
            "gate_parameters": each.gate_parameters,
        }
        for each in front
    ]


def _gate(request: Request) -> dict[str, Any] | None:
    """The share of every row that is the gate's."""
    if request.gate is None:
        return None
    cost = gate_cost(
        request.gate,
        request.in_features,
        request.experts,
        request.batch,
        training=request.training,
        itemsize=request.itemsize,
    )
    return {**cost_dict(cost), "time": request.device.time(cost)}


def _infeasible(error: TensormoeError | None) -> dict[str, Any]:
    found: dict[str, Any] = {"message": str(error)}
    if isinstance(error, BudgetError):
        found["smallest_budget"] = dict(error.needed)
        found["alternatives"] = [
            {
                # levels are a tuple
                "change": {
                    name: [*value] if isinstance(value, tuple) else value
                    for name, value in each.change.items()
                },
                "smallest_budget": dict(each.needed),
            }
            for each in error.alternatives
        ]
    return found


def _refused(errors: Iterable[tuple[str, TensormoeError]]) -> dict[str, Any]:
    listed = [{"field": name, "message": str(error)} for name, error in errors]
    return {"version": VERSION, "errors": listed}

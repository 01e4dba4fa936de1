"""One layer in full: its network, its plan step by step, its memory, and its code."""

from __future__ import annotations

from typing import Any

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe.choosing._code import code
from tensormoe.choosing._request import Request
from tensormoe.choosing._rows import Cut, Row
from tensormoe.planning import Cost, Plan, Roofline
from tensormoe.planning._describe import dense_size, step_rows


def selected(request: Request, row: Row) -> dict[str, Any]:
    """The response's part about one layer."""
    config, cost = row.config, row.cost
    assert config is not None
    assert cost is not None
    layers = _layers(config)
    return {
        "factorization": row.name,
        "title": " and ".join(repr(spec.factorization) for spec in row.specs),
        "layers": [_layer(request, name, layer) for name, layer in layers.items()],
        "steps": step_list(cost, request.device),
        "memory": _memory(request, config),
        "code": code(config, request.batch, request.dtype),
        "legs": [cut_dict(each) for each in row.legs],
    }


def cut_dict(cut: Cut) -> dict[str, Any]:
    """One device's part in plain values."""
    return {
        "leg": cut.leg,
        "parameters": cut.cost.parameters,
        "memory": cut.cost.peak_memory,
        "communicated": cut.cost.communicated,
        "time": cut.time,
    }


def _layers(config: LayerConfig | BlockConfig) -> dict[str, LayerConfig]:
    if isinstance(config, BlockConfig):
        return {"first": config.first, "second": config.second}
    return {"layer": config}


def _layer(request: Request, name: str, layer: LayerConfig) -> dict[str, Any]:
    spec, plan = layer.spec, layer.plan(request.batch)
    entries, flops = dense_size(plan)
    return {
        "name": name,
        "spec": spec.to_dict(),
        "shapes": {name: list(shape) for name, shape in spec.shapes.items()},
        "expert_rank": spec.expert_rank,
        "expert_span": spec.expert_span,
        "network": spec.draw().svg,
        "program": plan.draw(itemsize=request.itemsize).svg,
        "plan": _text(request, layer, plan),
        "first_batch": plan.first_batch,
        "last_batch": plan.last_batch,
        "dense": {"parameters": entries, "flops": flops},
    }


def _text(request: Request, layer: LayerConfig, plan: Plan) -> str:
    return plan.describe(
        layer.gate,
        training=request.training,
        itemsize=request.itemsize,
        roofline=request.device,
    )


def step_list(cost: Cost, device: Roofline) -> list[dict[str, Any]]:
    """The steps of a cost in plain values, with the time that is predicted for each."""
    return [
        {
            "label": label,
            "count": len(each.steps),
            "matmul_flops": each.matmul_flops,
            "elementwise_flops": each.elementwise_flops,
            "bytes_read": each.bytes_read,
            "bytes_written": each.bytes_written,
            "time": device.time(each),
        }
        for label, each in step_rows(cost).items()
    ]


def _memory(request: Request, config: LayerConfig | BlockConfig) -> dict[str, int]:
    """Bytes of parameters, and at the worst moment of a call, forward and in training."""
    forward = config.cost(request.batch, itemsize=request.itemsize)
    training = config.cost(request.batch, itemsize=request.itemsize, training=True)
    return {
        "parameters": request.itemsize * forward.parameters,
        "forward": forward.peak_memory,
        "training": training.peak_memory,
        "saved": training.saved_memory,
    }

"""Cost of routers, and of experts that are run one by one."""

from __future__ import annotations

from dataclasses import replace

from tensormoe.gates import Gate
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.planning import Cost, Library, Routing, StepCost, plan_layer
from tensormoe.planning._block_cost import ACTIVATION_FLOPS
from tensormoe.planning._cost import INDEX_BYTES, contraction_cost
from tensormoe.planning._gate_cost import GATE_ITEMSIZE, GateCall
from tensormoe.planning._layer_cost import layer_cost

# of one entry: a difference, an exponential, a sum, a quotient
_SOFTMAX_FLOPS = 8


def router_cost(
    in_features: int,
    experts: int,
    top_k: int,
    batch: int,
    *,
    bias: bool = False,
    itemsize: int = 4,
    library: Library,
    training: bool = False,
) -> Cost:
    """The cost of logits, scores and the choice of experts.

    Args:
        in_features: size of a token.
        experts: N.
        top_k: experts per token.
        batch: number of tokens.
        bias: whether the projection has a bias.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.
    """
    gate = Gate("top_k", k=top_k, normalization=None, bias=bias)
    call = GateCall(gate, in_features, (experts,), batch, itemsize, library)
    if not training:
        return Cost(call.parameters, call.steps(), call.peak())
    steps = call.steps() + call.backward_steps()
    return Cost(call.parameters, steps, call.peak(training=True), call.saved)


def experts_cost(
    experts: ExpertsConfig,
    batch: int,
    top_k: int,
    *,
    itemsize: int = 4,
    library: Library,
    training: bool = False,
    named: bool | None = None,
) -> Cost:
    """The cost of ``top_k`` experts for each of ``batch`` tokens, sent to them and summed.

    Args:
        experts: the experts.
        batch: number of tokens.
        top_k: experts per token.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.
        named: whether rows name their expert, instead of having coefficients; by default where
            there are several.
    """
    rows = batch * top_k
    named = experts.num_experts > 1 if named is None else named
    routing = Routing(one_expert=True, by_expert=True) if named else Routing()
    calls = [
        plan_layer(layer.spec.network, rows, routing, title=repr(layer.spec.factorization)).cost(
            training=training, itemsize=itemsize, library=library
        )
        for layer in experts.layers.values()
    ]
    moves = 2 if training else 1
    sent, made = itemsize * rows * experts.in_features, itemsize * rows * experts.out_features
    shares = rows * (max(itemsize, GATE_ITEMSIZE) + INDEX_BYTES)
    steps = [StepCost("dispatch", 0, 0, sent + shares, sent)]
    held = peak = sent + shares
    for place, call in enumerate(calls):
        if place:
            hidden = itemsize * rows * (experts.hidden_features or 0)
            inner = hidden * (2 if experts.kind == "swiglu" else 1)
            entries = hidden // itemsize * (2 if experts.kind == "swiglu" else 1)
            steps.append(StepCost("activation", 0, ACTIVATION_FLOPS * entries, inner, hidden))
            peak = max(peak, held + inner + hidden)
            held += hidden + (inner if training else 0)
        steps += call.steps
        peak = max(peak, held + call.peak_memory)
        held += call.saved_memory
    result = itemsize * batch * experts.out_features
    combined = 2 * rows * experts.out_features
    steps.append(StepCost("combine", 0, combined, made + shares, result))
    if training:
        steps.append(
            StepCost("backward combine", 0, moves * combined, result + made, made, backward=True)
        )
        steps.append(
            StepCost(
                "backward dispatch",
                0,
                rows * experts.in_features,
                sent,
                itemsize * batch * experts.in_features,
                backward=True,
            )
        )
    parameters = sum(call.parameters for call in calls)
    total = Cost(parameters, tuple(steps), max(peak, held + 2 * made + result), held)
    return total if training else replace(total, saved_memory=0)


def every_cost(
    experts: ExpertsConfig,
    rows: int,
    *,
    same_rows: bool = False,
    held: int = 0,
    itemsize: int,
    library: Library,
    training: bool,
) -> Cost:
    """The cost of all experts, each on ``rows`` rows.

    Args:
        experts: the experts.
        rows: of each expert.
        same_rows: whether all experts run the same rows.
        held: bytes that are live in the meantime; memory counts from there.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.
    """
    count, steps, peak, parameters = experts.num_experts, [], held, 0
    for place, layer in enumerate(experts.layers.values()):
        if place:
            entries = rows * count * (experts.hidden_features or 0)
            wider = entries * (2 if experts.kind == "swiglu" else 1)
            flops = ACTIVATION_FLOPS * wider
            steps.append(StepCost("activation", 0, flops, itemsize * wider, itemsize * entries))
            peak = max(peak, held + itemsize * (wider + entries))
            held += itemsize * (entries + (wider if training else 0))
        shared = same_rows and not place
        call = layer_cost(
            (layer.every_regimes if shared else layer.each_regimes).program(rows),
            0,
            layer.spec.in_features,
            layer.spec.experts,
            rows,
            training=training,
            itemsize=itemsize,
            library=library,
        )
        steps += call.steps
        peak = max(peak, held + call.peak_memory)
        held += call.saved_memory
        parameters += layer.num_parameters
    return Cost(parameters, tuple(steps), peak, held)


def mixing_cost(
    in_features: int, out_features: int, batch: int, *, itemsize: int, training: bool
) -> Cost:
    """The cost of weights of two outputs per token, and of their sum.

    Args:
        in_features: size of a token.
        out_features: size of an output.
        batch: number of tokens.
        itemsize: bytes per entry.
        training: forward and backward with all gradients, instead of forward alone.
    """
    sizes = {"t": batch, "i": in_features, "j": 2}
    wide = max(itemsize, GATE_ITEMSIZE)
    steps = product_steps("mixing", ("ti", "ij"), "tj", sizes, wide, training)
    weights, outputs = 2 * wide * batch, itemsize * batch * out_features
    # a softmax, then two products and a sum
    work = 2 * _SOFTMAX_FLOPS * batch + 3 * batch * out_features
    steps.append(StepCost("mix", 0, work, weights + 2 * outputs, outputs))
    if training:
        given, made = weights + 3 * outputs, weights + 2 * outputs
        steps.append(StepCost("backward mix", 0, 2 * work, given, made, backward=True))
    saved = weights + 2 * outputs if training else 0
    return Cost(2 * (in_features + 1), tuple(steps), weights + 3 * outputs, saved)


def product_steps(
    label: str,
    operands: tuple[str, str],
    result: str,
    sizes: dict[str, int],
    itemsize: int,
    training: bool,
) -> list[StepCost]:
    """A matrix product, and those of its gradients."""
    made = [contraction_cost(label, operands, result, sizes, itemsize)]
    if training:
        for place in (0, 1):
            given = result, operands[1 - place]
            name = f"backward {label}"
            back = contraction_cost(name, given, operands[place], sizes, itemsize)
            made.append(replace(back, backward=True))
    return made

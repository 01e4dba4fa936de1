"""Costs of linear layers, MLPs, dense and sparse mixtures, counted alike, to compare with."""

from __future__ import annotations

from math import prod

from tensormoe._spec import LayerSpec
from tensormoe._validation import positive_int, positive_ints
from tensormoe.errors import SpecError
from tensormoe.factorizations import BATCH, INPUT, OUTPUT, Dense
from tensormoe.gates import Gate
from tensormoe.planning._cost import INDEX_BYTES, Cost, StepCost, contraction_cost
from tensormoe.planning._gate_cost import GATE_ITEMSIZE, gate_parameters
from tensormoe.planning._layer_cost import layer_cost
from tensormoe.planning._program import Operand, Program
from tensormoe.planning._tree import Builder


def linear_cost(
    in_features: int,
    out_features: int,
    batch: int,
    *,
    bias: bool = True,
    training: bool = False,
    itemsize: int = 4,
) -> Cost:
    """The cost of a linear layer: I·O multiply-adds per input.

    Args:
        in_features: I.
        out_features: O.
        batch: number of inputs.
        bias: whether O entries are added to the result.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry: 4 for float32.

    Raises:
        SpecError: a size is not a positive integer.

    >>> cost = linear_cost(768, 3072, batch=64, bias=False)
    >>> cost.parameters, cost.flops == 2 * 64 * 768 * 3072
    (2359296, True)
    """
    sizes = {
        INPUT: positive_int(in_features, "in_features"),
        OUTPUT: positive_int(out_features, "out_features"),
    }
    operands = [Operand("x", (BATCH, INPUT), "data"), Operand("weight", (INPUT, OUTPUT), "factor")]
    if bias:
        operands.append(Operand("bias", (OUTPUT,), "factor"))
    builder = Builder(tuple(operands), sizes)
    result = builder.contract(0, 1, frozenset((BATCH, OUTPUT)), (BATCH, OUTPUT))
    if bias:
        result = builder.plus(result, 2)
    return layer_cost(
        builder.finish(result),
        (in_features + bias) * out_features,
        in_features,
        (),
        positive_int(batch, "batch"),
        training=training,
        itemsize=positive_int(itemsize, "itemsize"),
    )


def mlp_cost(
    in_features: int,
    hidden_features: int,
    out_features: int,
    batch: int,
    *,
    bias: bool = True,
    training: bool = False,
    itemsize: int = 4,
) -> Cost:
    """The cost of two linear layers with an elementwise activation between: H·(I + O) an input.

    The activation counts one FLOP per entry and writes a new array; training keeps its input and
    its result.

    Args:
        in_features: I.
        hidden_features: H.
        out_features: O.
        batch: number of inputs.
        bias: whether both layers have one.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry: 4 for float32.

    Raises:
        SpecError: a size is not a positive integer.

    >>> mlp_cost(768, 3072, 768, batch=64, bias=False).matmul_flops == 2 * 64 * 2 * 768 * 3072
    True
    """
    hidden_features = positive_int(hidden_features, "hidden_features")
    first, second = (
        linear_cost(rows, columns, batch, bias=bias, training=training, itemsize=itemsize)
        for rows, columns in ((in_features, hidden_features), (hidden_features, out_features))
    )
    entries = batch * hidden_features
    hidden = itemsize * entries
    steps: tuple[StepCost, ...] = (StepCost("activation", 0, entries, hidden, hidden),)
    if not training:
        # the activation's input goes once its result is there
        peak = max(first.peak_memory, 2 * hidden, hidden + second.peak_memory)
        return Cost(first.parameters + second.parameters, first.steps + steps + second.steps, peak)
    steps += (StepCost("backward activation", 0, 2 * entries, 2 * hidden, hidden),)
    result = itemsize * batch * out_features
    gradients = itemsize * second.parameters
    peak = max(
        # saved: the activation's input and result
        2 * hidden + second.peak_memory,
        # back at the activation: their gradients as well
        4 * hidden + gradients + result,
        # the first layer's own result is the activation's input, still saved
        hidden + gradients + result + first.peak_memory,
    )
    return Cost(
        first.parameters + second.parameters,
        first.steps + steps + second.steps,
        peak,
        first.saved_memory + second.saved_memory + 2 * hidden,
    )


def dense_moe_cost(
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    batch: int,
    *,
    bias: bool = True,
    gate: Gate | str = "softmax",
    training: bool = False,
    itemsize: int = 4,
) -> Cost:
    """The cost of a mixture in which every input runs all experts: N·I·O per input, and the gate's.

    It is the layer with 𝒲 stored as it is, planned like any other: every expert runs and the
    results are mixed (N·O more), or the weights are mixed first (I·O more).

    Args:
        in_features: I.
        out_features: O.
        experts: N, or one size per level.
        batch: number of inputs.
        bias: whether every expert has a bias.
        gate: what makes the coefficients.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry: 4 for float32.

    Raises:
        SpecError: a size is not a positive integer.

    >>> dense_moe_cost(768, 768, 16, batch=64, bias=False).parameters == 16 * 768 * (768 + 1)
    True
    """
    spec = LayerSpec(in_features, out_features, experts, Dense(), bias)
    size = positive_int(batch, "batch")
    return spec.cost(size, gate=gate, training=training, itemsize=itemsize)


def sparse_moe_cost(
    in_features: int,
    out_features: int,
    experts: int | tuple[int, ...],
    top_k: int,
    batch: int,
    *,
    bias: bool = True,
    training: bool = False,
    itemsize: int = 4,
) -> Cost:
    """The cost of a mixture in which every input runs ``top_k`` experts: K·I·O per input.

    A softmax router over all N experts picks K; inputs are sent to their experts, which run as one
    grouped product, and the results are mixed. All N experts are stored, and at most
    min(N, K·batch) of them are read.

    Args:
        in_features: I.
        out_features: O.
        experts: N, or one size per level, of which the product counts.
        top_k: K, experts per input.
        batch: number of inputs.
        bias: whether every expert has a bias.
        training: forward and backward with all gradients, instead of forward alone.
        itemsize: bytes per entry: 4 for float32.

    Raises:
        SpecError: a size is not a positive integer, or ``top_k`` is larger than N.

    >>> cost = sparse_moe_cost(768, 768, experts=16, top_k=2, batch=64, bias=False)
    >>> grouped = next(step for step in cost.steps if step.label.startswith("experts"))
    >>> grouped.matmul_flops == 2 * 64 * 2 * 768 * 768
    True
    """
    count = prod(positive_ints(experts, "experts", "level"))
    rows = positive_int(in_features, "in_features")
    columns = positive_int(out_features, "out_features")
    batch, kept = positive_int(batch, "batch"), positive_int(top_k, "top_k")
    if kept > count:
        raise SpecError(f"top_k must be at most the {count} experts; got {kept}. Lower it.")
    gate = Gate("top_k", k=kept, normalization=None)
    stored = count * (rows + bias) * columns
    router = layer_cost(
        Program((), (), (), ()), stored, rows, (count,), batch, gate=gate, itemsize=itemsize
    )
    sizes = {BATCH: batch, "k": kept, "n": min(count, batch * kept), INPUT: rows, OUTPUT: columns}
    sent, run, weights = (BATCH, "k", INPUT), (BATCH, "k", OUTPUT), ("n", INPUT, OUTPUT)
    picks, mixed = (BATCH, "k"), (BATCH, OUTPUT)
    sent_entries, run_entries = batch * kept * rows, batch * kept * columns
    index_bytes = INDEX_BYTES * batch * kept
    # a leg that only the weights have is picked by the data: each input meets one expert a time
    steps = [
        *router.steps,
        StepCost("dispatch", 0, 0, itemsize * sent_entries + index_bytes, itemsize * sent_entries),
        contraction_cost("experts", (sent, weights), run, sizes, itemsize),
    ]
    if bias:
        read = itemsize * (run_entries + sizes["n"] * columns)
        steps.append(StepCost("bias", 0, run_entries, read, itemsize * run_entries))
    steps.append(contraction_cost("combine", (picks, run), mixed, sizes, itemsize))
    routing = max(itemsize, GATE_ITEMSIZE) * batch * kept + index_bytes
    arrived, left = itemsize * sent_entries, itemsize * run_entries
    result = itemsize * batch * columns
    if not training:
        peak = max(router.peak_memory, routing + left + max(arrived, result))
        return Cost(router.parameters, tuple(steps), peak)
    steps += [
        contraction_cost("backward combine", (mixed, run), picks, sizes, itemsize),
        StepCost(
            "backward combine", 0, run_entries, itemsize * (batch * columns + batch * kept), left
        ),
        contraction_cost("backward experts", (run, weights), sent, sizes, itemsize),
        StepCost(
            "backward experts, weights",
            2 * batch * kept * rows * columns,
            0,
            arrived + left,
            itemsize * sizes["n"] * rows * columns,
        ),
        StepCost("backward dispatch", 0, sent_entries, arrived, itemsize * batch * rows),
    ]
    if bias:
        steps.append(
            StepCost("backward bias", 0, run_entries, left, itemsize * sizes["n"] * columns)
        )
    steps += _router_backward(batch, rows, count, itemsize)
    saved = routing + arrived + left + max(itemsize, GATE_ITEMSIZE) * batch * count
    gradients = itemsize * (stored + gate_parameters(gate, rows, (count,)))
    peak = max(router.peak_memory, saved + result + left + arrived + gradients)
    return Cost(router.parameters, tuple(steps), peak, saved)


def _router_backward(batch: int, rows: int, count: int, itemsize: int) -> tuple[StepCost, ...]:
    """Through the softmax, to the projection's weights, and to the input."""
    sizes = {BATCH: batch, INPUT: rows, "n": count}
    entries = batch * count
    data, logits, table = (BATCH, INPUT), (BATCH, "n"), (INPUT, "n")
    return (
        StepCost("backward router", 0, 4 * entries, 2 * itemsize * entries, itemsize * entries),
        contraction_cost("backward router", (data, logits), table, sizes, itemsize),
        contraction_cost("backward router", (logits, table), data, sizes, itemsize),
    )

"""Cost of product routing, and of experts of a few hidden units."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from tensormoe.mixtures._cost import experts_cost
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.mixtures._keys import Keys
from tensormoe.planning import Cost, Library, StepCost
from tensormoe.planning._block_cost import ACTIVATION_FLOPS
from tensormoe.planning._cost import INDEX_BYTES
from tensormoe.planning._gate_cost import GATE_ITEMSIZE


def keys_cost(
    keys: Keys, top_k: int, batch: int, *, itemsize: int, training: bool, pairs: bool = True
) -> Cost:
    """The cost of queries, logits and the choice of experts.

    Args:
        keys: rule from tokens to logits.
        top_k: experts per head, or per level and head.
        batch: number of tokens.
        itemsize: bytes per entry of tokens and parameters.
        training: forward and backward with all gradients, instead of forward alone.
        pairs: whether the best sums over levels are searched for.
    """
    width = max(itemsize, GATE_ITEMSIZE)
    rows, logits = batch * keys.heads, batch * keys.heads * sum(keys.experts)
    tokens = batch * keys.in_features
    products: list[tuple[str, int, int, int, int]] = []
    queries = 0
    if keys.key_features is None:
        outputs = keys.heads * sum(keys.experts)
        products.append(("logits", keys.in_features, tokens, keys.in_features * outputs, logits))
    else:
        queries = rows * keys.levels * keys.key_features
        table = keys.in_features * queries // max(batch, 1)
        products.append(("queries", keys.in_features, tokens, table, queries))
        shared = 1 if keys.share_keys else keys.heads
        table = shared * sum(keys.experts) * keys.key_features
        products.append(("logits", keys.key_features, queries, table, logits))
    steps = []
    for name, inner, left, right, made in products:
        read = width * (left + right)
        steps.append(StepCost(f"router: {name}", 2 * inner * made, 0, read, width * made))
    if queries and keys.query_norm:
        size = width * queries
        steps.insert(1, StepCost("router: query norm", 0, 6 * queries, size, size))
    candidates = rows * sum(max(top_k // rank, 1) for rank in range(1, top_k + 1))
    compared = logits * top_k.bit_length() + (candidates * (keys.levels - 1) if pairs else 0)
    kept = rows * top_k * (width + INDEX_BYTES)
    steps.append(StepCost("router: choice", 0, compared, width * logits, kept))
    saved = width * (queries * (2 if keys.query_norm else 1) + logits) + kept
    if training:
        for name, inner, left, right, made in products:
            for what, size in (("keys", right), ("input", left)):
                label = f"router: {name}, backward → {what}"
                work, read = 2 * inner * made, width * (left + right + made - size)
                steps.append(StepCost(label, work, 0, read, width * size, backward=True))
    peak = saved + width * logits + (width * logits + width * tokens if training else 0)
    own = sum(prod(array.shape) for array in keys.own.values())
    return Cost(own, tuple(steps), peak, saved if training else 0)


def tables_cost(
    experts: int,
    sizes: tuple[int, int, int],
    chosen: int,
    batch: int,
    *,
    itemsize: int,
    library: Library,
    training: bool,
) -> Cost:
    """The cost of ``chosen`` experts per token, whose vectors are rows of tables.

    Gradients of the tables are counted for the rows that are read, as sparse ones are made.

    Args:
        experts: N.
        sizes: size of a token, hidden units per expert, and size of an output.
        chosen: experts per token, of all heads.
        batch: number of tokens.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.
    """
    inner, hidden, outer = sizes
    summed = library.sums_rows and hidden == 1
    rows = batch * chosen
    units = rows * hidden
    steps, parts = [], (("up_proj", inner, batch * inner), ("down_proj", outer, batch * outer))
    for name, width, result in parts:
        size, other = itemsize * units * width, itemsize * (result + units)
        if name == "down_proj" and summed:
            work = 2 * units * width
            steps.append(StepCost(f"{name}: sums", 0, work, size + itemsize * units, other))
            continue
        steps.append(StepCost(f"{name}: look up", 0, 0, size + INDEX_BYTES * rows, size))
        steps.append(StepCost(f"{name}: product", 2 * units * width, 0, size + other, other))
        if name == "up_proj":
            moved = itemsize * units
            steps.append(StepCost("activation", 0, ACTIVATION_FLOPS * units, moved, moved))
    held = itemsize * units * (inner + (0 if summed else outer) + 3)
    if training:
        for name, width, result in reversed(parts):
            size, other = itemsize * units * width, itemsize * (result + units)
            for what in ("rows", "input"):
                label = f"{name}: product, backward → {what}"
                work = 2 * units * width
                steps.append(StepCost(label, work, 0, other + size, size, backward=True))
    peak = held + itemsize * batch * outer
    peak += itemsize * units * (inner + outer) if training else 0
    return Cost(experts * hidden * (inner + outer), tuple(steps), peak, held if training else 0)


def product_cost(
    keys: Keys,
    factorized: ExpertsConfig | None,
    sizes: tuple[int, int, int],
    top_k: int,
    batch: int,
    *,
    itemsize: int,
    library: Library,
    training: bool,
) -> Cost:
    """The cost of routing and experts, in tables or factorized."""
    router = keys_cost(keys, top_k, batch, itemsize=itemsize, training=training)
    chosen = keys.heads * top_k
    if factorized is None:
        experts = tables_cost(
            keys.num_experts,
            sizes,
            chosen,
            batch,
            itemsize=itemsize,
            library=library,
            training=training,
        )
    else:
        experts = experts_cost(
            factorized, batch, chosen, itemsize=itemsize, library=library, training=training
        )
    kept = batch * keys.heads
    kept *= GATE_ITEMSIZE * sum(keys.experts) + top_k * (
        GATE_ITEMSIZE + INDEX_BYTES * (1 + keys.levels)
    )
    return after_routing(router, kept, experts)


def after_routing(router: Cost, record: int, experts: Cost) -> Cost:
    """The cost of a router and of experts, beside whose arrays the routing record is held.

    Args:
        router: its cost.
        record: bytes of the record.
        experts: their cost.
    """
    held = max(record, router.saved_memory)
    peak = max(router.peak_memory, held + experts.peak_memory)
    return replace(router.then(experts), peak_memory=peak)

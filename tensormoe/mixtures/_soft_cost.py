"""Cost of a soft mixture: logits, dispatch, experts that run slots, combine."""

from __future__ import annotations

from dataclasses import replace

from tensormoe._validation import non_negative_int
from tensormoe.errors import PlanError, SpecError
from tensormoe.mixtures._cost import every_cost, product_steps
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.planning import Cost, Library, StepCost
from tensormoe.planning._gate_cost import GATE_ITEMSIZE

# of one entry of both softmaxes and of the normalization: differences, exponentials, sums,
# quotients; backward as in a gate
_FORWARD, _BACKWARD = 8, 12


def soft_cost(
    experts: ExpertsConfig,
    slots: int,
    parameters: int,
    batch: int,
    sets: int,
    *,
    itemsize: int,
    library: Library,
    training: bool,
) -> Cost:
    """The cost of one call.

    Args:
        experts: the experts.
        slots: p.
        parameters: of the whole mixture.
        batch: tokens of all sets.
        sets: how many sets they are in.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.

    Raises:
        PlanError: the batch is not a size.
        SpecError: tokens that cannot be divided into so many sets.
    """
    tokens, rest = divmod(non_negative_int(batch, "batch", PlanError), sets)
    if rest:
        raise SpecError(
            f"sets must divide the {batch} tokens into sets of one size; got {sets}. Count the "
            "sets of a call, as (sets, tokens, in) has them."
        )
    count = experts.num_experts
    sizes = {"s": sets, "t": tokens, "j": count * slots}
    sizes |= {"i": experts.in_features, "o": experts.out_features}
    wide = max(itemsize, GATE_ITEMSIZE)
    weights = sets * tokens * count * slots
    before = [
        *product_steps("logits", ("sti", "ij"), "stj", sizes, wide, training),
        *_softmaxes(weights, wide, training),
        *product_steps("dispatch", ("stj", "sti"), "sji", sizes, itemsize, training),
    ]
    rows = slots * sets
    # both softmaxes beside the logits, in the dtype of the experts once more, and the slots twice
    narrow = 2 * itemsize if itemsize < wide else 0
    slot_bytes = itemsize * rows * count
    held = weights * (3 * wide + narrow) + 2 * slot_bytes * experts.in_features
    run = every_cost(
        experts, rows, held=held, itemsize=itemsize, library=library, training=training
    )
    steps = [*before, *run.steps]
    steps += product_steps("combine", ("stj", "sjo"), "sto", sizes, itemsize, training)
    made = 2 * slot_bytes * experts.out_features
    result = itemsize * sets * tokens * experts.out_features
    held = run.saved_memory
    total = Cost(parameters, tuple(steps), max(run.peak_memory, held + made + result), held)
    return total if training else replace(total, saved_memory=0)


def _softmaxes(entries: int, wide: int, training: bool) -> list[StepCost]:
    size = wide * entries
    made = [StepCost("softmax", 0, 2 * _FORWARD * entries, 2 * size, 2 * size)]
    if training:
        work = 2 * _BACKWARD * entries
        made.append(StepCost("backward softmax", 0, work, 4 * size, size, backward=True))
    return made

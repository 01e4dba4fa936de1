"""A billion experts per block, and a hundred blocks, on many devices: planned, not run.

Times are those of the cost model for H100s in nodes of eight; nothing is measured. Blocks alone are
counted, without attention and embeddings. Every block runs its forward pass twice, so that only the
inputs of blocks are kept; parameters are gathered before each of the passes and gradients summed
over the groups that share a batch, all of it without overlap.

    python benchmarks/study_scaling.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tensormoe._format import format_bytes, format_parameters
from tensormoe.functional import BlockConfig, Options
from tensormoe.planning import Cost, published_roofline

FEATURES, HIDDEN, RANK, LAYERS = 8192, 32768, 6144, 100
EXPERTS = (1000, 1000, 1000)
TOKENS = 2**22
"""Tokens of a training step."""
MEMORY = 75 * 2**30
"""Bytes of a device that a step may take."""
ITEMSIZE = 2
"""bfloat16."""
STATE = 12
"""Bytes per parameter besides: gradients in bfloat16 come and go; float32 weights, two moments."""
NODE = 8
"""Devices that NVLink joins."""
DEVICE = published_roofline("h100", "bfloat16")
NVLINK, NETWORK = 450e9, 50e9
"""Bytes per second that a device sends: inside a node, and by 400 Gbit/s between nodes."""


@dataclass(frozen=True)
class Split:
    """Devices of a group that share each layer, and groups that share a batch.

    Args:
        cut: ``"none"``, ``"hidden"`` or ``"rank"``.
        devices: P of a group.
        groups: D, how many there are.
        calls: of each layer per step; a group runs its tokens in so many parts.
    """

    cut: str
    devices: int
    groups: int
    calls: int = 1

    def block(self) -> BlockConfig:
        """One device's part of a block."""
        whole = Options(EXPERTS, "cp", rank=RANK).block(FEATURES, HIDDEN, FEATURES, "gelu", 0.0)
        if self.cut == "hidden":
            return whole.shard(self.devices)
        if self.cut == "rank":
            first, second = (each.shard("r", self.devices) for each in (whole.first, whole.second))
            return replace(whole, first=first, second=second)
        return whole

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return TOKENS // (self.groups * self.calls)


@dataclass(frozen=True)
class Step:
    """A training step, by the cost model.

    Args:
        parameters: that a device computes with.
        memory: bytes on a device.
        sent: bytes that a device sends for cut layers, and for parameters and gradients.
        seconds: of computation, of communication inside groups, and between them.
    """

    parameters: int
    memory: int
    sent: tuple[float, float]
    seconds: tuple[float, float, float]

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds)


def step(split: Split) -> Step:
    """A training step on ``devices · groups`` devices."""
    block, calls = split.block(), split.calls
    link = NVLINK if split.devices <= NODE else NETWORK
    device = replace(DEVICE, link_bandwidth=link)
    costs = [block.cost(split.tokens, itemsize=ITEMSIZE, training=each) for each in (True, False)]
    alone = sum(device.time(replace(each, collectives=())) for each in costs)
    inside = sum(device.communication_time(each) for each in costs)
    parameters = LAYERS * block.num_parameters
    # parameters for the forward passes and the backward pass, and gradients: of each call
    shared = 4 * calls * ITEMSIZE * parameters * (split.groups - 1) / split.groups
    # a node's devices send at once what belongs to other nodes
    between = NVLINK if split.devices * split.groups <= NODE else NETWORK
    return Step(
        parameters,
        _memory(split, block, costs[0]),
        (LAYERS * calls * sum(_sent(each) for each in costs), shared),
        (LAYERS * calls * alone, LAYERS * calls * inside, shared / between),
    )


def _sent(cost: Cost) -> float:
    return sum(each.sent for each in cost.collectives)


def _memory(split: Split, block: BlockConfig, cost: Cost) -> int:
    """State in slices, two blocks' parameters, inputs of all blocks, one block at work."""
    state = LAYERS * block.num_parameters * (STATE + 2 * ITEMSIZE) // split.groups
    gathered = 2 * 2 * ITEMSIZE * block.num_parameters
    inputs = LAYERS * split.tokens * FEATURES * ITEMSIZE
    return state + gathered + inputs + cost.peak_memory


def splits(devices: int) -> Iterator[Split]:
    """The ways to split a number of devices."""
    yield Split("none", 1, devices)
    for count in (8, 64, 512):
        if count <= devices:
            for cut in ("hidden", "rank"):
                yield Split(cut, count, devices // count)


def fitted(split: Split) -> tuple[Split, Step]:
    """The split with as few calls as memory admits, and its step; one that never fits as it is."""
    while True:
        found = step(split)
        if found.memory <= MEMORY or split.tokens <= 1024:
            return split, found
        split = replace(split, calls=2 * split.calls)


def compare(devices: int = 512) -> None:
    """Print the splits of one number of devices."""
    heads = ("cut", "devices × groups", "tokens per call", "parameters", "memory", "sent for cuts")
    heads += ("sent between groups", "computing", "cuts", "groups", "step")
    print(f"| {' | '.join(heads)} |\n| --- |{' ---: |' * (len(heads) - 1)}")
    for given in splits(devices):
        split, found = fitted(given)
        seconds = " | ".join(f"{each:.1f} s" for each in (*found.seconds, found.total))
        figures = " | ".join(format_bytes(each) for each in found.sent) + f" | {seconds}"
        if found.memory > MEMORY:
            figures = " | ".join(["does not fit", *"–––––"])
        print(
            f"| {split.cut} | {split.devices} × {split.groups} | {split.tokens:,} | "
            f"{format_parameters(found.parameters)} | {format_bytes(found.memory)} | {figures} |"
        )


def scale() -> None:
    """Print the fastest split of every number of devices, and its efficiency."""
    print("| devices | fastest split | step | speed-up | efficiency |")
    print("| ---: | --- | ---: | ---: | ---: |")
    least: tuple[int, float] | None = None
    for devices in (8, 64, 512, 4096):
        tried = [fitted(split) for split in splits(devices)]
        able = [pair for pair in tried if pair[1].memory <= MEMORY]
        if not able:
            print(f"| {devices:,} | does not fit | – | – | – |")
            continue
        best, found = min(able, key=lambda pair: pair[1].total)
        least = least or (devices, found.total)
        gain = least[1] / found.total
        print(
            f"| {devices:,} | {best.cut}, {best.devices} × {best.groups} | {found.total:.1f} s | "
            f"{gain:.1f} × | {gain * least[0] / devices:.0%} |"
        )


def main() -> None:
    """Print both tables."""
    block = Split("none", 1, 1).block()
    experts = block.first.spec.num_experts
    print(
        f"{LAYERS} blocks of {FEATURES:,} → {HIDDEN:,} → {FEATURES:,}, {experts:,} experts each, "
        f"CP of rank {RANK:,}: {format_parameters(LAYERS * block.num_parameters)} parameters; "
        f"{TOKENS:,} tokens per step\n"
    )
    compare()
    print()
    scale()


if __name__ == "__main__":
    main()

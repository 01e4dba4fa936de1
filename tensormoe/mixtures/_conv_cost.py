"""Plan and cost of a factorized convolution: means, gate, patches or convolutions, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tensormoe._format import format_count
from tensormoe._validation import flag, non_negative_int
from tensormoe.errors import PlanError
from tensormoe.factorizations import INPUT, OUTPUT
from tensormoe.planning import Cost, Library, Program, StepCost
from tensormoe.planning._convolved import Way, way_of, with_positions
from tensormoe.planning._gate_cost import GateCall
from tensormoe.planning._layer_cost import ProgramCall

if TYPE_CHECKING:
    from tensormoe.mixtures._conv import ConvConfig


@dataclass(frozen=True)
class ConvPlan:
    """The way that images of one size are run.

    Args:
        config: the layer.
        size: of an image, without channels.
        images: how many.
        program: the steps besides patches and convolutions.
        bias: those that mix biases for kernels of each image; None without biases.
    """

    config: ConvConfig
    size: tuple[int, ...]
    images: int
    program: Program
    bias: Program | None

    @property
    def way(self) -> Way:
        """``"patches"``, ``"convolution"`` or ``"kernels"``."""
        return way_of(self.program)

    @property
    def out_size(self) -> tuple[int, ...]:
        """Size of the output, without channels."""
        return self.config.window.out_size(self.size)

    @property
    def positions(self) -> int:
        """Positions of the output of one image."""
        return prod(self.out_size)

    @property
    def sized(self) -> Program:
        """The steps for images of this size."""
        return with_positions(self.program, self.positions)

    @property
    def batch(self) -> int:
        """Batch of the program: images, or positions of all of them."""
        return self.images if self.config.per_image else self.images * self.positions

    def convolutions(self) -> list[int]:
        """Output channels of each convolution."""
        if self.way == "kernels":
            return [self.config.out_channels]
        return [
            prod(self.program.sizes[leg] for leg in term.input_factor.legs if leg != INPUT)
            for term in self.config.experts.spec.network.terms
            if self.way == "convolution"
        ]

    def describe(self) -> str:
        """The plan as text: the way, and the steps with their FLOPs.

        >>> from tensormoe.mixtures import conv_config
        >>> config = conv_config(16, 32, 3, experts=8, rank=12, padding=1)
        >>> print(config.plan((28, 28), images=4).describe())  # doctest: +ELLIPSIS
        CP(rank=12): 8 experts of 16 → 32 channels, kernel 3×3, 28×28 → 28×28, per image
        patches: 784 rows of 144 features per image
        ...
        """
        spec, config = self.config.experts.spec, self.config
        experts = " × ".join(map(str, spec.experts))
        lines = [
            f"{spec.factorization!r}: {experts} experts of {config.in_channels} → "
            f"{config.out_channels} channels, kernel {_size(config.window.kernel_size)}, "
            f"{_size(self.size)} → {_size(self.out_size)}, per {config.experts_per}"
        ]
        channels = self.convolutions()
        if self.way == "patches":
            lines.append(f"patches: {self.positions} rows of {spec.in_features} features per image")
        elif self.way == "convolution":
            lines.append(f"convolution: into {' and '.join(map(str, channels))} channels")
        else:
            lines.append(
                f"kernels: one convolution with a kernel of each image, {channels[0]} channels"
            )
        call = ProgramCall(self.sized, self.batch, 4)
        for step in call.steps():
            lines.append(
                f"  {step.label}: {format_count(step.matmul_flops + step.elementwise_flops)} FLOPs"
            )
        return "\n".join(lines)


def _size(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))


def conv_cost(
    config: ConvConfig,
    images: int,
    size: tuple[int, ...],
    *,
    itemsize: int,
    library: Library,
    training: bool,
) -> Cost:
    """The cost of one call.

    Args:
        config: the layer.
        images: how many.
        size: of an image, without channels.
        itemsize: bytes per entry.
        library: how the array library runs a layer.
        training: forward and backward with all gradients, instead of forward alone.

    Raises:
        PlanError: the number of images is not a size.
        ShapeError: images smaller than the kernel.
    """
    flag(training, "training", PlanError)
    images = non_negative_int(images, "batch", PlanError)
    positions = prod(config.window.out_size(size))
    programs = config.programs(library.convolves)
    program = programs.program(images, positions)
    plan = ConvPlan(config, size, images, program, programs.bias)
    spec = config.experts.spec
    rows = images if config.per_image else images * positions
    gate = GateCall(config.gate, config.in_channels, spec.experts, rows, itemsize, library)
    call = ProgramCall(plan.sized, plan.batch, itemsize, library)
    steps: list[StepCost] = []
    held = means = 0
    if config.gate is not None:
        steps += _means(config, images, size, positions, itemsize, training)
        held, means = gate.coefficients, itemsize * rows * config.in_channels
    steps += gate.steps()
    before, made = _before(plan, itemsize, training)
    output = itemsize * images * positions * config.out_channels
    behind: list[StepCost] = []
    if plan.way == "kernels":
        behind, before = before, []
        # kernels in the order of a convolution, and the output
        peak = held + max(call.peak(training=training), 2 * call.result + output)
    else:
        # patches and convolved images are freed after their last use, unless training keeps them
        owned = [
            slot
            for slot, operand in enumerate(program.operands)
            if operand.name == "x" or operand.name.startswith("convolved_")
        ]
        peak = held + (made + call.peak(training=True) if training else call.peak(owned))
    steps += [*before, *call.steps(), *behind]
    parameters = spec.num_parameters + gate.parameters
    if not training:
        return Cost(parameters, tuple(steps), max(means + gate.peak(), peak))
    saved = held + means + gate.saved + made + call.saved
    images_bytes = itemsize * images * prod(size) * config.in_channels
    backward = saved + call.result + max(call.backward_peak(), call.gradients)
    backward += made + images_bytes
    steps += [*call.backward_steps(), *(gate.backward_steps() if config.gate else ())]
    peak = max(means + gate.peak(training=True), peak + means + gate.saved, backward)
    return Cost(parameters, tuple(steps), peak, saved)


def _means(
    config: ConvConfig,
    images: int,
    size: tuple[int, ...],
    positions: int,
    itemsize: int,
    training: bool,
) -> list[StepCost]:
    """Means of pixels that the gate sees."""
    channels = images * config.in_channels
    read = itemsize * channels * prod(size)
    rows = channels * (1 if config.per_image else positions)
    shifts = 1 if config.per_image else sum(config.window.kernel_size)
    work = channels * prod(size) * shifts
    made = [StepCost("means of pixels", 0, work, read * shifts, itemsize * rows)]
    if training:
        written = read * shifts
        made.append(
            StepCost("backward means of pixels", 0, work, itemsize * rows, written, backward=True)
        )
    return made


def _before(plan: ConvPlan, itemsize: int, training: bool) -> tuple[list[StepCost], int]:
    """Work besides the program, and bytes of what it makes for it."""
    config = plan.config
    network = config.experts.spec.network
    features, positions = network.in_features, plan.images * plan.positions
    images = itemsize * plan.images * prod(plan.size) * config.in_channels
    if plan.way == "patches":
        made = itemsize * positions * features
        steps = [StepCost("patches", 0, 0, made, made)]
        if training:
            work = positions * features
            steps.append(StepCost("backward patches", 0, work, made, images, backward=True))
        return steps, made
    steps, total = [], 0
    for channels in plan.convolutions():
        kernels = features * channels * (plan.images if plan.way == "kernels" else 1)
        flops, weights = 2 * positions * features * channels, itemsize * kernels
        made = itemsize * positions * channels
        steps.append(StepCost("convolution", flops, 0, images + weights, made))
        if training:
            label = "backward convolution"
            steps += [
                StepCost(f"{label} → images", flops, 0, made + weights, images, backward=True),
                StepCost(f"{label} → kernels", flops, 0, made + images, weights, backward=True),
            ]
        total += made
    if plan.way == "kernels":
        if plan.bias is not None:
            bias = ProgramCall(plan.bias, plan.images, itemsize)
            steps += [*bias.steps(), *(bias.backward_steps() if training else ())]
        return steps, itemsize * positions * network.sizes[OUTPUT]
    return steps, total

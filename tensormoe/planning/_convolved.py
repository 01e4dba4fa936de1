"""Programs of a factorized convolution: over patches, behind a convolution, or for its kernels.

There are three ways to run it, which do the same:

- ``patches``: every patch of an image is a row, as the input of a linear layer;
- ``convolution``: the factor with the input mode is the kernel of a convolution, whose output
  channels are the factor's bonds; the rest of the network is contracted at each position;
- ``kernels``: where an image has one set of coefficients, its kernel is contracted first, and one
  convolution has a kernel for each image.

They compete as other paths do: multiply-adds, and a weight times the entries written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from tensormoe.factorizations import BATCH, INPUT, OUTPUT, Leg, Network, Term
from tensormoe.planning._draft import Draft, Part
from tensormoe.planning._library import Convolutions
from tensormoe.planning._lowering import volume
from tensormoe.planning._path import WRITE_WEIGHT
from tensormoe.planning._program import Operand, Program
from tensormoe.planning._regimes import Regimes, regimes_of
from tensormoe.planning._tree import Builder

Way = Literal["patches", "convolution", "kernels"]

POSITION: Leg = "p"
"""The leg of the positions of an image."""

ANY = 2**31 - 1
"""The size of the positions in a program for images of any size; a prime, so that it divides no
size but those that they are part of."""

# smallest number of positions of a group of programs, and the number that they are sought for
_GROUPS = ((0, 4), (16, 64), (256, 1024), (4096, 16384))


@dataclass(frozen=True)
class Convolved:
    """The form in which a convolution is planned.

    Args:
        convolves: as :attr:`tensormoe.planning.Library.convolves`.
        per_image: whether coefficients are those of an image, and not of a position.
        channels_first: whether features come before the positions of an image, where coefficients
            are those of an image.
    """

    convolves: Convolutions = ""
    per_image: bool = False
    channels_first: bool = False

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways to run it that there are."""
        shared: tuple[Way, ...] = ("convolution",) if self.convolves else ()
        each: tuple[Way, ...] = ("kernels",) if self.convolves == "each" and self.per_image else ()
        return ("patches", *shared, *each)


@dataclass(frozen=True)
class ConvPrograms:
    """The programs of a convolution for images of any number and size.

    Args:
        form: what is planned.
        terms: of the network.
        groups: by range of the positions of an image; one group, by the number of positions, where
            coefficients are those of a position.
        bias: from coefficients to mixed biases (batch, out), for kernels of each image; None
            without biases.
    """

    form: Convolved
    terms: tuple[Term, ...]
    groups: tuple[Regimes, ...]
    bias: Program | None

    def program(self, images: int, positions: int, *, any_size: bool = False) -> Program:
        """The program for so many images of so many positions each: a look-up, no search.

        Its batch are the images, and positions a leg of size :data:`ANY`; or all positions of all
        images, where coefficients are those of a position.

        Args:
            images: how many.
            positions: of the output of one image.
            any_size: whether it is the one for many large images, which is right for all.
        """
        if any_size:
            return self.groups[-1].programs[-1]
        if not self.form.per_image:
            return self.groups[0].program(images * positions)
        index = len(self.groups) - 1
        # a traced framework follows comparisons of symbolic sizes
        while index and _GROUPS[index][0] > positions:
            index -= 1
        return self.groups[index].program(images)


@lru_cache(maxsize=1024)
def conv_programs(network: Network, form: Convolved) -> ConvPrograms:
    """Plan a convolution for images of any number and size.

    Args:
        network: of the experts.
        form: what is planned.
    """
    sought = [rows for _, rows in _GROUPS] if form.per_image else [1]
    groups = [
        regimes_of([ConvDraft(network, form, way, rows) for way in form.ways]) for rows in sought
    ]
    bias = _bias_program(network) if network.biases else None
    return ConvPrograms(form, network.terms, tuple(groups), bias)


def way_of(program: Program) -> Way:
    """The way to run a convolution that a program is a part of."""
    names = {operand.name for operand in program.operands}
    if "x" in names:
        return "patches"
    return "convolution" if "convolved_0" in names else "kernels"


def with_positions(program: Program, positions: int) -> Program:
    """A program for images of one size, for counting; its views are left as they are."""
    sizes = tuple((leg, positions if leg == POSITION else n) for leg, n in program.size_items)
    return replace(program, size_items=sizes)


def _bias_program(network: Network) -> Program:
    names = [f"coefficients_{level}" for level in range(len(network.expert_legs))]
    operands = [
        Operand(name, (BATCH, leg), "data")
        for name, leg in zip(names, network.expert_legs, strict=True)
    ]
    used = dict.fromkeys(each for term in network.terms for each in term.bias_factors)
    operands += [Operand(each.name, each.legs, "factor") for each in used]
    slots = {operand.name: slot for slot, operand in enumerate(operands)}
    builder = Builder(tuple(operands), {**network.sizes, BATCH: 64})
    total: int | None = None
    for term in network.terms:
        factors = [slots[each.name] for each in term.bias_factors]
        legs = {BATCH, *(leg for slot in factors for leg in builder.legs[slot])}
        # what all experts have in common is mixed by the sum of their coefficients
        data = [builder.reduce(slots[name], frozenset(legs)) for name in names]
        made = builder.network([*data, *factors], (BATCH, OUTPUT))
        total = made if total is None else builder.plus(total, made)
    assert total is not None
    return builder.finish(total)


class ConvDraft(Draft):
    """Operands of one way to run a convolution, and its work before a contraction.

    Args:
        network: of the layer.
        form: what is planned.
        way: to run it.
        positions: of an image that a program is sought for; 1 where a position is a row.
    """

    def __init__(self, network: Network, form: Convolved, way: Way, positions: int) -> None:
        self.way = way
        self.positions = positions
        self.terms = network.terms
        self.sizes: dict[Leg, int] = dict(network.sizes)
        self.indices: dict[Leg, int] = {}
        self.picks: dict[Leg, Leg] = {}
        self.spread: dict[int, tuple[int, Leg]] = {}
        places = (POSITION,) if form.per_image and way != "kernels" else ()
        if places:
            self.sizes[POSITION] = positions
        self.rows = (BATCH, *places)

        def ordered(*features: Leg) -> tuple[Leg, ...]:
            first = form.channels_first
            return (BATCH, *features, *places) if first else (BATCH, *places, *features)

        self.output = (BATCH, INPUT, OUTPUT) if way == "kernels" else ordered(OUTPUT)
        operands = [
            Operand(f"coefficients_{level}", (BATCH, leg), "data")
            for level, leg in enumerate(network.expert_legs)
        ]
        self.data = [*range(len(operands))]
        self.x: int | None = None
        self.convolved: list[int] = []
        factors = network.factors
        if way == "patches":
            self.x = len(operands)
            self.data.append(self.x)
            operands.append(Operand("x", ordered(INPUT), "data"))
            factors = network.all_factors
        elif way == "convolution":
            kernels = [term.input_factor for term in network.terms]
            for number, kernel in enumerate(kernels):
                self.convolved.append(len(operands))
                channels = ordered(*(leg for leg in kernel.legs if leg != INPUT))
                operands.append(Operand(f"convolved_{number}", channels, "data"))
            factors = tuple(factor for factor in factors if factor not in kernels)
        self.factors = {factor.name: len(operands) + k for k, factor in enumerate(factors)}
        operands += [Operand(each.name, each.legs, "factor") for each in factors]
        self.operands = tuple(operands)

    @property
    def lowered_sizes(self) -> Mapping[Leg, int]:
        return {**self.sizes, **({POSITION: ANY} if POSITION in self.sizes else {})}

    def _part(
        self, builder: Builder, term: Term, dense: Sequence[int], slots: Mapping[str, int]
    ) -> Part:
        if self.way == "patches":
            return super()._part(builder, term, dense, slots)
        names = [each.name for each in term.factors if each.name in slots]
        listed = [slots[name] for name in names]
        if self.convolved:
            listed.append(self.convolved[self.terms.index(term)])
        legs = {BATCH, *(leg for slot in listed for leg in builder.legs[slot])}
        # what all experts have in common is mixed by the sum of their coefficients
        data = [builder.reduce(slot, frozenset(legs)) for slot in dense]
        return Part((*data, *listed), listed[-1], None)

    def work(self, builder: Builder) -> tuple[int, int]:
        """Constant and slope, over the batch, of patches and convolutions."""
        const, slope = super().work(builder)
        rows, features = self.positions, self.sizes[INPUT]
        if self.way == "patches":
            return const, slope + WRITE_WEIGHT * rows * features
        if self.way == "kernels":
            # the kernels are copied into the order of a convolution
            made = features * self.sizes[OUTPUT]
            slope += WRITE_WEIGHT * made
            return const, slope + rows * (made + WRITE_WEIGHT * self.sizes[OUTPUT])
        for slot in self.convolved:
            legs = [leg for leg in self.operands[slot].legs if leg not in self.rows]
            channels = volume(legs, self.sizes, 1)
            slope += rows * channels * (features + WRITE_WEIGHT)
            # the factor is copied into the order of a kernel
            const += WRITE_WEIGHT * features * channels
        return const, slope

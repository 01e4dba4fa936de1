"""Names and axes of the arrays in state dicts of the paper's released code.

A layer or block of Oldfield et al. 2024 (github.com/james-oldfield/muMoE) keeps

- ``projs.k`` (in, N_k): the projection of the gate's level k;
- ``MuMoE.factors.k``: expert factors, input factor and output factor, in this order; CP as
  (size, R), tensor ring as (r, size, r′). With biases, the input factor has in + 1 rows, the last
  of which is the bias;
- ``MuMoE2.factors.k``: the same for the second layer of a block;
- ``bn.k.running_mean``, ``bn.k.running_var`` (N_k,) and ``bn.k.num_batches_tracked`` (): the
  statistics of a gate with batch norm. One with layer norm keeps nothing;
- ``input_ln.weight``, ``input_ln.bias`` (in,): the norm before the experts, if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

ACTIVATIONS = ("entmax", "sparsemax", "softmax")
"""Activations of a gate; the released code takes any function, and saves none."""

_LAYERS = ("MuMoE", "MuMoE2")


def dotted(prefix: str) -> str:
    """A prefix of names, with the dot that ends it.

    Raises:
        TypeError: no string.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string; got {prefix!r}.")
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def factor_name(layer: int, place: int) -> str:
    """The name of one factor of a layer, 0 for the first and 1 for the second."""
    return f"{_LAYERS[layer]}.factors.{place}"


def find_layers(names: Mapping[str, object]) -> list[str]:
    """The prefixes in ``names`` under which layers of the released code are."""
    return [name.removesuffix("projs.0") for name in names if re.search(r"(^|\.)projs\.0$", name)]


@dataclass(frozen=True)
class Layout:
    """Structure of a state dict's layer, before any size is read.

    Args:
        levels: E, the number of gates' projections.
        layers: 1, or 2 for a block.
        ring: whether factors are a ring's cores, rather than CP's matrices.
        batch_norm: whether the gate has batch norm, rather than layer norm.
        input_norm: whether a norm stands before the experts.
    """

    levels: int
    layers: int
    ring: bool
    batch_norm: bool
    input_norm: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor], ring: bool | None) -> Layout:
        """The layout of a layer's arrays, by their names and numbers of axes.

        Args:
            state: the arrays, prefix removed.
            ring: what their number of axes must say; None to ask them.
        """
        if ring is None:
            ring = any(state[name].ndim == 3 for name in state if name.startswith("MuMoE.factors."))
        return cls(
            sum(1 for name in state if re.fullmatch(r"projs\.\d+", name)),
            1 + any(name.startswith("MuMoE2.") for name in state),
            ring,
            any(name.startswith("bn.") for name in state),
            any(name.startswith("input_ln.") for name in state),
        )

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Names of each array's axes; axes of one name have one size.

        ``in+`` and ``hidden+`` are an input mode with its bias row, if there are biases.
        """
        experts = [f"n{level}" for level in range(self.levels)]
        named: dict[str, tuple[str, ...]] = {
            f"projs.{level}": ("in", mode) for level, mode in enumerate(experts)
        }
        for layer in range(self.layers):
            source, target = (("in", "hidden"), ("hidden", "out"))[layer]
            modes = [*experts, f"{source}+", target if self.layers == 2 else "out"]
            for index, mode in enumerate(modes):
                before, after = self.bond(index), self.bond((index + 1) % len(modes))
                ring = (before, mode, after)
                named[factor_name(layer, index)] = ring if self.ring else (mode, before)
        if self.input_norm:
            named |= {"input_ln.weight": ("in",), "input_ln.bias": ("in",)}
        for level, mode in enumerate(experts if self.batch_norm else ()):
            named[f"bn.{level}.running_mean"] = (mode,)
            named[f"bn.{level}.running_var"] = (mode,)
            named[f"bn.{level}.num_batches_tracked"] = ()
        return named

    def bond(self, place: int) -> str:
        """The bond before a mode, of one size in both layers of a block; CP has a single one."""
        return f"bond {place if self.ring else 0}"

    def sizes(self, state: Mapping[str, Tensor], fixed: Mapping[str, int]) -> dict[str, int]:
        """The size of everything that axes run over: what the first array with such an axis says.

        Args:
            state: the arrays, prefix removed.
            fixed: sizes that are known beforehand.
        """
        found = dict(fixed)
        for name, axes in self.axes().items():
            if name in state and state[name].ndim == len(axes):
                for axis, size in zip(axes, state[name].shape, strict=True):
                    found.setdefault(axis, size)
        # the input mode has a bias row everywhere or nowhere: the first layer says which
        bias = found.get("in+") != found.get("in")
        for mode in ("in", "hidden"):
            if mode in found:
                found[f"{mode}+"] = found[mode] + bias
        return found

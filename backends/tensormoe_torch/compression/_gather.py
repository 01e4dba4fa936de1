"""Sums of second moments of what a model's experts get and give, row by row, nothing else kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensormoe.compression._calibration import VALUES
from tensormoe.errors import ShapeError
from tensormoe.mixtures import hidden_units
from tensormoe_torch.compression._dense import DenseExperts
from tensormoe_torch.compression._samples import Samples

# rows that are multiplied at a time
_BLOCK = 4096


@dataclass(frozen=True)
class Kept:
    """Statistics that are gathered.

    Args:
        outputs: whether second moments of outputs.
        per_expert: whether moments of each expert too.
        gradients: whether second moments of a loss's gradients.
    """

    outputs: bool
    per_expert: bool
    gradients: bool

    def nbytes(self, experts: DenseExperts) -> int:
        """Bytes of a layer's sums, in float64."""
        count = 1 + (experts.count if self.per_expert else 0)
        rows = {_side(role): stack.sizes[0] for role, stack in experts.stacks.items()}
        outs = [stack.sizes[1] for stack in experts.stacks.values()]
        entries = count * sum(size**2 + size for size in rows.values())
        entries += self.outputs * count * sum(size**2 for size in outs)
        entries += self.gradients * sum(size**2 for size in outs)
        return 8 * (entries + 3 * experts.count)


@dataclass(eq=False)
class Sums:
    """Sums over the rows of a layer so far, in float64 on its device.

    Args:
        experts: the layer.
        kept: what is gathered.
        arrays: by the names of :class:`tensormoe.compression.Calibration`, without the layer's.
        tokens: so far.
    """

    experts: DenseExperts
    kept: Kept
    arrays: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, samples: Samples) -> None:
        """Rows of a call of the layer's experts.

        Raises:
            ShapeError: NaN or infinity in what the layer gets or gives.
        """
        self._count(samples)
        for part in _parts(samples):
            rows, index = _rows(part)
            inputs, outputs = run_rows(self.experts, rows, index)
            for side, x in inputs.items():
                self._check(x, side)
                self._add(side, x, index, mean=True)
            for role, y in outputs.items():
                self._check(y, f"outputs of {role}")
                if self.kept.outputs:
                    self._add(f"{role}.outputs", y, index)

    def add_gradients(self, samples: Samples, given: Tensor) -> None:
        """Gradients with respect to the outputs of every projection.

        Args:
            samples: what the layer got.
            given: (tokens, out), the gradient with respect to what it gave.
        """
        parts = zip(_parts(samples), given.split(_tokens(samples)), strict=True)
        for part, gradient in parts:
            rows, index = _rows(part)
            with torch.enable_grad():
                _, outputs = run_rows(self.experts, rows, index, True)
            count = part.index.shape[1]
            weights = part.weights.reshape(-1, 1)
            last = gradient.repeat_interleave(count, dim=0) * weights.to(gradient.dtype)
            down = outputs["down_proj"]
            others = {role: each for role, each in outputs.items() if role != "down_proj"}
            found = {"down_proj": last}
            if others:
                listed = torch.autograd.grad(down, [*others.values()], last.to(down.dtype))
                found |= dict(zip(others, listed, strict=True))
            for role, each in found.items():
                self._check(each, f"gradients of {role}")
                self._put(f"{role}.gradients", _product(each))

    def finished(self, dtype: str) -> Iterator[tuple[str, Any]]:
        """The arrays on the host: means over rows in a dtype, counts, and what tells the model."""
        counts = self.arrays["counts"]
        rows = float(counts.sum())
        for name, array in self.arrays.items():
            if name == "counts":
                found = array.to(torch.int64)
            elif name in ("weights", "squares"):
                found = array
            elif "experts" in name.split("."):
                shape = (-1, *(1,) * (array.ndim - 1))
                found = array / counts.clamp(min=1).reshape(shape)
            else:
                found = array / rows
            if found.ndim and name not in ("counts", "weights", "squares"):
                found = found.to(getattr(torch, dtype))
            yield name, found.cpu().numpy()
        for role in self.experts.stacks:
            yield f"{role}.values", first_values(self.experts, role).numpy()

    def _count(self, samples: Samples) -> None:
        self.tokens += len(samples.x)
        index = samples.index.reshape(-1)
        weights = samples.weights.reshape(-1).double()
        ones = torch.ones_like(weights)
        for name, each in (("counts", ones), ("weights", weights), ("squares", weights**2)):
            empty = each.new_zeros(self.experts.count)
            self._put(name, empty.index_add_(0, index, each))

    def _add(self, name: str, rows: Tensor, index: Tensor, mean: bool = False) -> None:
        self._put(name, _product(rows))
        if mean:
            self._put(f"{name}.mean", rows.double().sum(dim=0))
        if not self.kept.per_expert:
            return
        size = rows.shape[1]
        whole = rows.new_zeros((self.experts.count, size, size), dtype=torch.float64)
        means = rows.new_zeros((self.experts.count, size), dtype=torch.float64)
        whole = self.arrays.setdefault(f"{name}.experts", whole)
        if mean:
            means = self.arrays.setdefault(f"{name}.experts.mean", means)
        for place in index.unique().tolist():
            own = rows[index == place]
            whole[place] += _product(own)
            means[place] += own.double().sum(dim=0)

    def _put(self, name: str, value: Tensor) -> None:
        if name in self.arrays:
            self.arrays[name] += value
        else:
            self.arrays[name] = value

    def _check(self, found: Tensor, what: str) -> None:
        if not bool(torch.isfinite(found).all()):
            raise ShapeError(
                f"activations must be finite; got NaN or infinity in the {what} of the experts "
                f"{self.experts.name!r}. Look at the weights before them, or at the dtype."
            )


def run_rows(
    experts: DenseExperts, rows: Tensor, index: Tensor, leaves: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of every projection, for rows of an expert each.

    Args:
        experts: of a layer.
        rows: (rows, in).
        index: (rows,), their experts.
        leaves: whether outputs of the first projections are leaves, to differentiate by.

    Returns:
        Inputs by side, ``inputs`` or ``hidden``, and outputs by role.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def project(role: str, x: Tensor) -> Tensor:
        inputs[_side(role)] = x
        found = experts.stacks[role].routed(x, index)
        if leaves:
            found = found.detach().requires_grad_()
        outputs[role] = found
        return found

    hidden = hidden_units(experts.stacks, project, experts.act, rows)
    inputs["hidden"] = hidden
    outputs["down_proj"] = experts.stacks["down_proj"].routed(hidden, index)
    return inputs, outputs


def first_values(experts: DenseExperts, role: str) -> Tensor:
    """The first entries of every expert's matrix, in float32 on the host: (N, k)."""
    # of both projections as one, the first outputs are those of the gate
    weights = experts.stacks[role if role in experts.stacks else "gate_proj"].weights
    return torch.stack([each[0, :VALUES].detach().float().cpu() for each in weights])


def _side(role: str) -> str:
    return "hidden" if role == "down_proj" else "inputs"


def _product(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide.T @ wide


def _tokens(samples: Samples) -> int:
    return max(1, _BLOCK // max(samples.index.shape[1], 1))


def _parts(samples: Samples) -> Iterator[Samples]:
    size = _tokens(samples)
    arrays: Mapping[str, Any] = vars(samples)
    for x, index, weights in zip(*(each.split(size) for each in arrays.values()), strict=True):
        yield Samples(x, index, weights)


def _rows(samples: Samples) -> tuple[Tensor, Tensor]:
    """(rows, in) and (rows,): a token for each of its experts."""
    index = samples.index.reshape(-1)
    return samples.x.repeat_interleave(samples.index.shape[1], dim=0), index

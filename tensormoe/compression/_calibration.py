"""Inputs and outputs of a model's experts on real data, as second moments by layer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from tensormoe._validation import choice
from tensormoe.compression._calibration_arrays import (
    beside,
    checked_ridge,
    entry_of,
    fits,
    listed,
    shape_of,
    side_of,
)
from tensormoe.compression._calibration_file import StoredArrays, open_arrays, write_arrays
from tensormoe.compression._predicted import Pairs, lost
from tensormoe.compression._response import Response
from tensormoe.decomposition import Moments
from tensormoe.decomposition._moments import RIDGE
from tensormoe.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTINGS = ("none", "inputs", "both", "fisher")
"""Weightings of errors: nothing, the second moments of inputs, those of inputs and
outputs, or those of inputs and of a loss's gradients."""

EXPERT_WEIGHTS = ("equal", "frequency", "router")
"""Weights of an expert: as much as any other, as often as it is chosen, or the sum of the router's
squared weights."""

VALUES = 4
"""Entries of every expert's matrix that tell one model's weights from another's."""

_ROLES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_DIGESTS = {
    "config": "configuration",
    "checkpoint": "names and shapes of tensors",
    "module": "names and shapes of parameters",
    "tokenizer": "tokenizer",
}
# values are compared across 16-bit dtypes
_CLOSE = 1e-2


@dataclass(frozen=True, eq=False)
class Calibration:
    """Second moments of what the experts of a model get and give on calibration data.

    A *row* is a token and one of the experts that it goes to. Of every layer, whose name is that of
    the module with its experts in PyTorch, the arrays are

    - ``LAYER.counts`` (N,): rows of each expert; ``LAYER.weights`` and ``LAYER.squares`` (N,): sums
      of the router's weights and of their squares;
    - ``LAYER.inputs`` (in, in) and ``LAYER.inputs.mean`` (in,): second moments and mean of the
      tokens, of all rows; ``LAYER.hidden`` and ``LAYER.hidden.mean``: of the inputs of the down
      projection;
    - ``LAYER.ROLE.outputs`` (out, out): of the outputs of a projection, ``gate_proj``, ``up_proj``
      or ``down_proj``; ``LAYER.ROLE.gradients``: of a loss's gradients with respect to them;
    - ``LAYER.ROLE.response`` (points, 2): predicted and measured increases of the loss, in nats per
      token, by errors of several sizes;
    - ``LAYER.ROLE.values``: the first entries of every expert's matrix, which tell the model;
    - with ``.experts`` behind inputs, hidden and outputs, the same for each expert, (N, …, …), and
      with ``.experts.mean`` its means.

    Args:
        arrays: by these names; of a loaded calibration they are read when they are asked for.
        tokens: that reached each layer, by its name.
        model: digests of the model that it was gathered with, by what they are of.
        ridge: share of the mean second moment that is added to all before anything is weighted by
            them.

    Raises:
        CheckpointError: arrays that are not those of a calibration.
        SpecError: a ridge that is not a positive number.
    """

    arrays: Mapping[str, NDArray[Any]]
    tokens: Mapping[str, int]
    model: Mapping[str, str]
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        object.__setattr__(self, "ridge", checked_ridge(self.ridge))
        if not self.tokens:
            raise CheckpointError("a calibration must have layers; got none.")
        for layer in self.tokens:
            self._check(layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the model's order."""
        return tuple(self.tokens)

    def roles(self, layer: str) -> tuple[str, ...]:
        """The projections of a layer's experts."""
        return tuple(each for each in _ROLES if f"{layer}.{each}.values" in self.arrays)

    def rows(self, layer: str) -> int:
        """Tokens times the experts that each went to."""
        return int(self.arrays[f"{layer}.counts"].sum())

    def frequencies(self, layer: str) -> NDArray[Any]:
        """Each expert's share of the rows, (N,)."""
        counts = self.arrays[f"{layer}.counts"]
        found: NDArray[Any] = counts / counts.sum()
        return found

    def mean_weights(self, layer: str) -> NDArray[Any]:
        """Mean of the router's weights of each expert's rows, (N,); 0 for those without any."""
        counts = self.arrays[f"{layer}.counts"]
        found: NDArray[Any] = self.arrays[f"{layer}.weights"] / counts.clip(min=1)
        return found

    def find(self, module: str) -> str:
        """The layer of a module of experts, also under the name that files give it.

        Names in files differ from those in PyTorch (``block_sparse_moe`` and ``mlp``), the numbers
        in them do not.

        Raises:
            CheckpointError: no such layer.
        """
        if module in self.tokens:
            return module
        numbers = re.findall("[0-9]+", module)
        found = [each for each in self.tokens if re.findall("[0-9]+", each) == numbers]
        if len(found) != 1:
            raise CheckpointError(
                f"the calibration must have the layer {module!r}; it has {listed(self.layers)}. "
                "Calibrate all layers that are compressed."
            )
        return found[0]

    def moments(
        self,
        layer: str,
        role: str,
        weighting: str = "inputs",
        experts: str = "equal",
        bias: bool = False,
    ) -> Moments | None:
        """Moments that the decomposition of a projection is weighted by.

        Args:
            layer: one of :attr:`layers`.
            role: of the projection; ``gate_up_proj`` is both halves side by side.
            weighting: one of :data:`WEIGHTINGS`. ``both`` measures outputs by their own second
                moments, a ridge added: an error counts more in directions that carry more. Two
                halves are measured each by itself. Inputs are those of each expert where they were
                gathered; those of few rows are mixed with all rows', as if each expert had as many
                of these as there are features.
            experts: one of :data:`EXPERT_WEIGHTS`.
            bias: whether the matrices have one more row, of biases.

        Returns:
            The moments; None where nothing is weighted.

        Raises:
            SpecError: unknown words, or moments that were not gathered.
            CheckpointError: no such layer or projection.
        """
        choice(weighting, WEIGHTINGS, "weighting", SpecError)
        choice(experts, EXPERT_WEIGHTS, "expert_weights", SpecError)
        parts = self._parts(layer, role)
        self.check_kept(layer, role, weighting)
        if (weighting, experts) == ("none", "equal"):
            return None
        inputs = None if weighting == "none" else self._mixed_inputs(layer, role, bias)
        outputs = None
        if weighting in ("both", "fisher"):
            kind = "outputs" if weighting == "both" else "gradients"
            outputs = beside([self._metric(f"{layer}.{part}.{kind}") for part in parts])
        shares = None
        if experts != "equal":
            kept = "counts" if experts == "frequency" else "squares"
            shares = self.arrays[f"{layer}.{kept}"].astype("float64")
        return Moments(inputs, outputs, shares, self.ridge)

    def output_error(
        self,
        layer: str,
        role: str,
        pairs: Pairs,
        bias: bool = False,
    ) -> float:
        """Relative error of a projection's outputs on the calibration data.

        Every row counts once: √(Σ ‖Δₙᵀ x‖² / Σ ‖Wₙᵀ x‖²). This is exact where the moments of each
        expert were gathered; otherwise every expert is taken to get what all of them get.

        Args:
            layer: one of :attr:`layers`.
            role: of the projection.
            pairs: of every expert its matrix (in, out), and what is missing of it.
            bias: whether the matrices have one more row, of biases.
        """
        return lost(self, layer, role, pairs, bias).output_error

    def apart(self, layer: str, role: str) -> bool:
        """Whether second moments of each expert's own inputs of a projection were gathered."""
        return f"{side_of(layer, role)}.experts" in self.arrays

    def inputs_of_experts(
        self, layer: str, role: str, bias: bool = False
    ) -> Iterator[NDArray[Any]]:
        """Second moments of what each expert gets: its own where they were gathered, or all rows'.

        Args:
            layer: one of :attr:`layers`.
            role: of the projection.
            bias: whether a last input is always 1.

        Raises:
            CheckpointError: no such layer or projection.
        """
        self._parts(layer, role)
        experts = shape_of(self.arrays, f"{layer}.counts")[0]
        if not self.apart(layer, role):
            yield from repeat(self._inputs(layer, role, bias), experts)
            return
        for place in range(experts):
            yield self._inputs(layer, role, bias, place)

    def gradients(self, layer: str, role: str) -> NDArray[Any] | None:
        """Second moments of a loss's gradients with respect to a projection's outputs, (out, out).

        Those of two halves are taken to be independent. None where they were not gathered.

        Raises:
            CheckpointError: no such layer or projection.
        """
        keys = [f"{layer}.{part}.gradients" for part in self._parts(layer, role)]
        if any(key not in self.arrays for key in keys):
            return None
        return beside([self.arrays[key] for key in keys])

    def response(self, layer: str, role: str) -> Response:
        """The measured response of the loss to errors of a projection; the identity without one.

        Raises:
            CheckpointError: no such layer or projection.
        """
        keys = [f"{layer}.{part}.response" for part in self._parts(layer, role)]
        if any(key not in self.arrays for key in keys):
            return Response()
        return Response.of([self.arrays[key] for key in keys])

    @property
    def measured(self) -> bool:
        """Whether the response of the loss was measured, of all layers."""
        return all(
            f"{layer}.{role}.response" in self.arrays
            for layer in self.layers
            for role in self.roles(layer)
        )

    def sizes(self, layer: str, role: str) -> tuple[int, int, int | None]:
        """Experts, inputs and outputs of a projection, from shapes alone; None if not known."""
        keys = [f"{layer}.{part}.outputs" for part in self._parts(layer, role)]
        outputs = [shape_of(self.arrays, key)[0] for key in keys if key in self.arrays]
        rows = shape_of(self.arrays, side_of(layer, role))[0]
        experts = shape_of(self.arrays, f"{layer}.counts")[0]
        return experts, rows, sum(outputs) if len(outputs) == len(keys) else None

    def check_kept(self, layer: str, role: str, weighting: str) -> None:
        """Refuse a weighting by moments that were not gathered; reads shapes alone.

        Raises:
            SpecError: they were not.
        """
        kind = {"both": "outputs", "fisher": "gradients"}.get(weighting)
        for part in self._parts(layer, role) if kind else ():
            if f"{layer}.{part}.{kind}" not in self.arrays:
                raise SpecError(
                    f"weighting={weighting!r} needs second moments of {kind}; the calibration was "
                    f"gathered without. Calibrate with {kind}, or weight by inputs alone."
                )

    def check_model(self, found: Mapping[str, str], what: str) -> None:
        """Refuse another model than the one that the calibration was gathered with.

        Args:
            found: digests of the model that is there, as far as they are known.
            what: it is, for the message.

        Raises:
            CheckpointError: digests that both have differ.
        """
        differing = [
            text
            for key, text in _DIGESTS.items()
            if key in found and key in self.model and found[key] != self.model[key]
        ]
        if differing:
            raise CheckpointError(
                f"the calibration must be of the model that is compressed; its "
                f"{' and its '.join(differing)} differ from those of {what}. Calibrate that model."
            )

    def check_values(self, layer: str, role: str, values: NDArray[Any]) -> None:
        """Refuse weights of another model, of the same shapes.

        Args:
            layer: one of :attr:`layers`.
            role: of the projection.
            values: (N, k) first entries of every expert's matrix: its first input, and the first
                outputs.

        Raises:
            CheckpointError: another number of experts, or other values.
        """
        import numpy as np

        kept = self.arrays[f"{layer}.{self._parts(layer, role)[0]}.values"]
        same = kept.shape[0] == values.shape[0]
        columns = min(kept.shape[1], values.shape[1])
        scale = float(np.abs(kept).max()) if kept.size else 0.0
        if not same or not np.allclose(
            kept[:, :columns], values[:, :columns], rtol=_CLOSE, atol=_CLOSE * scale
        ):
            raise CheckpointError(
                f"the calibration must be of the weights that are compressed; those of {role} in "
                f"{layer!r} differ. Calibrate this model."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            TypeError: not a path.
            CheckpointError: the file can't be written.
        """
        about = {"tokens": dict(self.tokens), "model": dict(self.model), "ridge": self.ridge}
        write_arrays(path, self.arrays, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Open a file of :meth:`save`; arrays are read when they are asked for.

        Raises:
            TypeError: not a path.
            CheckpointError: not a calibration, damaged, or of a later version.
        """
        arrays, about = open_arrays(path)
        try:
            tokens = {str(name): int(count) for name, count in about["tokens"].items()}
            model = {str(name): str(digest) for name, digest in about["model"].items()}
            found = cls(arrays, tokens, model, float(about["ridge"]))
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as error:
            raise CheckpointError(f"{os.fspath(path)!r} is no calibration: {error}") from None
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        if isinstance(self.arrays, StoredArrays):
            return self.arrays.nbytes
        return sum(each.nbytes for each in self.arrays.values())

    def __repr__(self) -> str:
        least, most = min(self.tokens.values()), max(self.tokens.values())
        count = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        return f"Calibration({len(self.layers)} layers, {count} tokens, ridge {self.ridge:g})"

    def _parts(self, layer: str, role: str) -> tuple[str, ...]:
        """The recorded projections that make a wanted one."""
        there = self.roles(layer)
        if role in there:
            return (role,)
        if role == "gate_up_proj" and {"gate_proj", "up_proj"} <= set(there):
            return ("gate_proj", "up_proj")
        raise CheckpointError(
            f"the calibration must have the projection {role!r} of {layer!r}; it has "
            f"{listed(there)}."
        )

    def _inputs(self, layer: str, role: str, bias: bool, expert: int | None = None) -> NDArray[Any]:
        """Second moments of the inputs of a projection: of all rows, or of an expert's."""
        import numpy as np

        key = side_of(layer, role)
        if expert is None:
            found, mean = self.arrays[key], self.arrays[f"{key}.mean"]
        else:
            found = entry_of(self.arrays, f"{key}.experts", expert)
            mean = entry_of(self.arrays, f"{key}.experts.mean", expert)
        if not bias:
            return found
        return np.block([[found, mean[:, None]], [mean[None, :], np.ones((1, 1), found.dtype)]])

    def _mixed_inputs(self, layer: str, role: str, bias: bool) -> NDArray[Any]:
        """Second moments of inputs, (in, in); of each expert, (N, in, in), where they are known."""
        import numpy as np

        pooled = self._inputs(layer, role, bias)
        if not self.apart(layer, role):
            return pooled
        size = len(pooled)
        counts = self.arrays[f"{layer}.counts"].tolist()
        found = np.empty((len(counts), size, size), pooled.dtype)
        own = self.inputs_of_experts(layer, role, bias)
        for mixed, rows, each in zip(found, counts, own, strict=True):
            mixed[...] = (rows * each + size * pooled) / (rows + size)
        return found

    def _metric(self, key: str) -> NDArray[Any]:
        """The metric of outputs: second moments of theirs or of gradients, and a ridge."""
        import numpy as np

        found = self.arrays[key].astype("float64")
        mean = np.trace(found) / len(found) or 1.0
        whole: NDArray[Any] = found + self.ridge * mean * np.eye(len(found))
        return whole

    def _check(self, layer: str) -> None:
        """Refuse arrays that are missing or do not fit."""
        shapes = {
            key.removeprefix(f"{layer}."): shape_of(self.arrays, key)
            for key in self.arrays
            if key.startswith(f"{layer}.")
        }
        for name in ("counts", "weights", "squares", "hidden", "hidden.mean"):
            if name not in shapes:
                raise CheckpointError(f"a calibration must have {layer}.{name}; it has not.")
        if len(shapes["counts"]) != 1:
            raise CheckpointError(f"{layer}.counts must have shape (N,); got {shapes['counts']}.")
        for name, shape in shapes.items():
            if not fits(name, shape, shapes["counts"][0]):
                raise CheckpointError(f"{layer}.{name} must fit its layer; got shape {shape}.")

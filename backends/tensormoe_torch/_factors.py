"""The factors of a layer, which are called for the mixture that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor, nn

from tensormoe.errors import ShapeError
from tensormoe.functional import LayerConfig
from tensormoe.gates import OneExpert, TopK
from tensormoe_torch._autograd import mix, no_autocast
from tensormoe_torch._checks import compute_dtype


class Factors(nn.ParameterDict):
    """Factors and bias by name; called with inputs and coefficients, the mixture of the experts.

    They are a module that is called, since what others hang on a module works around its call:
    PyTorch's pruning, adapters of PEFT on single parameters, gradients of single samples in
    opacus, and ``fully_shard``.

    Args:
        config: the layer.
        parameters: by name.
    """

    def __init__(self, config: LayerConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.config = config
        self._names = tuple((f"factors.{name}", name) for name in config.spec.shapes)

    # a dictionary of parameters cannot be called
    __call__ = nn.Module.__call__

    def by_name(self) -> dict[str, Tensor]:
        """The factors by canonical name, computed ones too."""
        return {name: getattr(self, short) for name, short in self._names}

    def forward(self, x: Tensor, *coefficients: Tensor | TopK | OneExpert) -> Tensor:
        """The mixture (..., out) of the experts' outputs.

        Args:
            x: (..., in), or ids (...) for a layer whose input is indexed.
            coefficients: (..., N_e) or a ``TopK`` a level, checked already.
        """
        levels = self.config.spec.levels
        if len(coefficients) != levels:
            raise ShapeError(
                f"factors are called with an input and {levels} coefficients, one per level; got "
                f"{len(coefficients)}. Call the layer, or register per_sample_gradients in opacus."
            )
        return mixture(self.config, self.by_name(), x, coefficients)


def mixture(
    config: LayerConfig,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    coefficients: Sequence[Tensor | TopK | OneExpert],
) -> Tensor:
    """The mixture (..., out) of a layer with its factors by canonical name."""
    lead = tuple(x.shape if config.indexed_input else x.shape[:-1])
    weight = next(iter(parameters.values()))
    dtype = compute_dtype(weight)
    if dtype != weight.dtype:
        parameters = {name: array.to(dtype) for name, array in parameters.items()}
    rows, given = x, [*coefficients]
    if len(lead) != 1:
        count = (prod(lead),)
        rows = x.reshape(*count, *x.shape[len(lead) :])
        given = [with_lead(each, count) for each in given]
    if rows.dtype != dtype and rows.dtype.is_floating_point:
        rows = rows.to(dtype)
    with no_autocast(x.device.type):
        return mix(config, parameters, rows, given, lead)


def with_lead(given: Tensor | TopK | OneExpert, lead: tuple[int, ...]) -> Tensor | TopK | OneExpert:
    """Coefficients of as many inputs with other leading axes."""
    if isinstance(given, OneExpert):
        return OneExpert(given.indices.reshape(lead), given.counts)
    if isinstance(given, TopK):
        shape = (*lead, given.values.shape[-1])
        return TopK(given.indices.reshape(shape), given.values.reshape(shape))
    return given.reshape(*lead, given.shape[-1])

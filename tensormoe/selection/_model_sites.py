"""Layers of whatever stands for a model: descriptions, a configuration, or the model itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tensormoe._validation import brief, choice
from tensormoe.backend import get_backend, known_backends
from tensormoe.errors import SpecError
from tensormoe.factorizations import Factorization
from tensormoe.selection._allocation import read_json
from tensormoe.selection._config_sites import config_sites
from tensormoe.selection._sensitivity import Sensitivity
from tensormoe.selection._sites import LayerSite

PARTS = ("experts", "mlp", "attention", "linear")
"""Parts of a model that a budget can be shared out over."""


@runtime_checkable
class Surveys(Protocol):
    """Optional members of an adapter: layers of a model, and what it loses by their ranks."""

    def model_sites(self, model: Any, parts: Sequence[str] | None, /) -> tuple[LayerSite, ...]:
        """Layers of some parts of a model, in its order; by default experts, or else MLPs."""
        ...

    def model_sensitivities(
        self,
        model: Any,
        sites: Sequence[LayerSite],
        kinds: Sequence[type[Factorization]],
        experts: int | tuple[int, ...],
        inputs: Any,
        share: float,
        /,
    ) -> Iterable[Sensitivity]:
        """Losses at ranks around a share of the parameters."""
        ...


def sites_of(model: Any, what: str | Sequence[str] | None) -> tuple[LayerSite, ...]:
    """The layers of a model that are wanted.

    Raises:
        SpecError: nothing that is known, or without such layers.
    """
    parts = checked_parts(what)
    if isinstance(model, str | os.PathLike):
        path = os.path.join(model, "config.json") if os.path.isdir(model) else model
        return config_sites(read_json(path, "a configuration"), parts)
    if isinstance(model, Mapping):
        return config_sites(model, parts)
    if isinstance(model, LayerSite):
        model = [model]
    if isinstance(model, list | tuple):
        for place, each in enumerate(model):
            if not isinstance(each, LayerSite):
                raise SpecError(f"layers must be LayerSite values; got {brief(each)} at {place}.")
        if parts is not None:
            raise SpecError("what must be left out where layers are given; got both.")
        return tuple(model)
    if hasattr(model, "model_type") and callable(getattr(model, "to_dict", None)):
        return config_sites(model.to_dict(), parts)
    return _surveyor(model).model_sites(model, parts)


def measured(
    model: Any,
    sites: Sequence[LayerSite],
    kinds: Sequence[type[Factorization]],
    experts: int | tuple[int, ...],
    inputs: Any,
    share: float,
) -> Iterable[Sensitivity]:
    """Sensitivities of a model with values, from calibration inputs.

    Raises:
        SpecError: something without values, or that the library can't run.
    """
    if isinstance(model, str | os.PathLike | Mapping | list | tuple | LayerSite):
        raise SpecError(
            f"sensitivities must be measured on a model with values; got {brief(model)}. Pass the "
            "model, or sensitivities=…"
        )
    return _surveyor(model).model_sensitivities(model, sites, kinds, experts, inputs, share)


def checked_parts(what: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The parts that are asked for.

    Raises:
        SpecError: unknown ones, none, or MLPs with the linear layers in them.
    """
    if what is None:
        return None
    listed = [what] if isinstance(what, str) else what
    if not isinstance(listed, list | tuple):
        raise SpecError(f"what must be one of {', '.join(PARTS)}, or several; got {brief(what)}.")
    parts = tuple(dict.fromkeys(choice(each, PARTS, "what", SpecError) for each in listed))
    if not parts:
        raise SpecError(f"what must be at least one of {', '.join(PARTS)}; got none.")
    if "linear" in parts and len({"mlp", "attention"} & {*parts}) > 0:
        raise SpecError(
            f"what must not name a layer twice; got {', '.join(parts)}. Linear layers are those of "
            "attention and MLPs: drop one."
        )
    return parts


def _surveyor(model: Any) -> Surveys:
    roots = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    for root in dict.fromkeys(roots):
        if root in known_backends():
            backend: Any = get_backend(root)
            if isinstance(backend, Surveys):
                return backend
    raise SpecError(
        "model must be the values of a config.json or its path, a model of PyTorch, or LayerSite "
        f"values; got {brief(model)}, a {type(model).__qualname__}."
    )

"""Words of the command line as a request, and errors of its fields as errors of options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tensormoe._validation import choice
from tensormoe.choosing import Request, parse_request
from tensormoe.choosing._words import parse_bytes
from tensormoe.cli._options import FORMATS
from tensormoe.cli._profile import DEVICES, resolve_device
from tensormoe.cli._settings import DEFAULT, option_name
from tensormoe.errors import BudgetError, RequestError, SpecError, TensormoeError
from tensormoe.planning import Roofline

_POSITIONAL = ("in_features", "out_features", "experts")
_OPTIONS = {
    "hidden_features": "hidden",
    "factorizations": "factorization",
    "selected": "factorization",
    "gate_in_budget": "gate_on_top",
}
"""Options by the field of a request, where their names differ."""

_MEASURED_DTYPE = "float32"

_FIELDS = (
    *_POSITIONAL,
    "kind",
    "hidden_features",
    "budget",
    "objective",
    "bonds",
    "gate",
    "bias",
    "batch",
    "training",
    "dtype",
    "devices",
    "factorizations",
    "top_k",
)


def parse_layer(arguments: argparse.Namespace, **fields: Any) -> Request:
    """The request that a command's words make.

    Args:
        arguments: of the command line.
        fields: of a request, instead of an option's or besides.

    Raises:
        RequestError: words that cannot be; one error for each option.
    """
    values: dict[str, Any] = {"gate_in_budget": not arguments.gate_on_top}
    for field in _FIELDS:
        value = getattr(arguments, _OPTIONS.get(field, field), None)
        if value not in (None, []):
            values[field] = value
    errors: dict[str, TensormoeError] = {}
    try:
        device = _device(arguments.device, arguments.dtype)
        values |= {} if device is None else {"device": device}
    except SpecError as error:
        errors["device"] = error
    try:
        request = parse_request({**values, **fields})
    except RequestError as error:
        errors |= error.fields
    if errors:
        raise RequestError(
            {name: _placed(name, error, arguments) for name, error in errors.items()}
        )
    return replace(request, device=_with_link(request.device, arguments))


def parse_format(arguments: argparse.Namespace) -> str:
    """The form of what is printed.

    Raises:
        SpecError: an unknown one.
    """
    return choice(arguments.format, FORMATS, option_name(arguments, "format"), SpecError)


def _device(name: str | None, dtype: str) -> Roofline | str | None:
    """A published device by name, whose profile follows the dtype; this machine's as measured.

    None where nothing is named and this machine was not measured, or not with the dtype.
    """
    if name in DEVICES and name != "this":
        return name
    if name is None and dtype != _MEASURED_DTYPE:
        return None
    found = resolve_device(name)
    return None if found.name == "cpu" else found


def _with_link(device: Roofline, arguments: argparse.Namespace) -> Roofline:
    """The device, with the link speed that a command names.

    Raises:
        SpecError: ``--link`` without ``--devices``, or devices whose link is not known.
    """
    link = parse_bytes(arguments.link, option_name(arguments, "link"))
    if arguments.devices is None:
        for name in ("link", "leg"):
            if getattr(arguments, name, None) is not None:
                raise SpecError(f"--{name} is for a layer cut over --devices; got none. Give both.")
        return device
    if link is not None:
        return replace(device, link_bandwidth=float(link))
    if device.link_bandwidth is None:
        raise SpecError(
            f"--devices needs the speed of the link between them; it is not known for "
            f"{device.name}. Pass --link 10GB, bytes per second in one direction, or --device h100."
        )
    return device


def _placed(field: str, error: TensormoeError, arguments: argparse.Namespace) -> TensormoeError:
    """An error that says which option it is about."""
    message = str(error)
    if field in _POSITIONAL:
        return SpecError(message if message.startswith(field) else f"{field}: {message}")
    name = _OPTIONS.get(field, field)
    if arguments.sources.get(name) == DEFAULT:
        return error
    option = option_name(arguments, name)
    for name in (option.split(" ")[0], field, field.removesuffix("s")):
        if message.startswith(f"{name} "):
            return SpecError(option + message[len(name) :])
    return SpecError(f"{option}: {message}")


def placed(error: TensormoeError, arguments: argparse.Namespace) -> TensormoeError:
    """An error about a budget, or that starts with the name of a value, as one of its option."""
    name = "budget" if isinstance(error, BudgetError) else str(error).split(" ")[0]
    if name in _POSITIONAL or name not in arguments.sources:
        return error
    return _placed(name, error, arguments)


def as_words(change: Mapping[str, object]) -> str:
    """A change to a request as the command line takes it: an alternative that is shown.

    >>> as_words({"experts": (16, 32)}), as_words({"gate": False})
    ('16x32', '--gate-on-top')
    """
    words = []
    for name, value in change.items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        words.append("x".join(map(str, listed)) if name == "experts" else "--gate-on-top")
    return " ".join(words)

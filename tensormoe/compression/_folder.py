"""A compressed model as a folder that loaders of models open: config, README, names of tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tensormoe.checkpoint._model_config import IMPORT, PROJECTION_NAMES, model_config
from tensormoe.compression._config_file import (
    CONFIG,
    QUANTIZED,
    found_config,
    quantization,
    read_config,
    unquantized,
)
from tensormoe.compression._groups import Group
from tensormoe.compression._quantized import METHODS
from tensormoe.compression._shards import Model
from tensormoe.errors import CheckpointError

README = "README.md"

_MAX_BYTES = 64 * 2**20
_ROLES = {name: role for role, names in PROJECTION_NAMES.items() for name in names}
# of stacks: roles of a tensor, and the name between it and the module that has the experts
_STACKS = {
    "gate_up_proj": ("gate_up_proj", ""),
    "up_proj": ("up_proj", ""),
    "down_proj": ("down_proj", ""),
    "input_linear": ("gate_up_proj", ".experts"),
    "output_linear": ("down_proj", ".experts"),
}
_COMPLETE = (
    {"gate_proj", "up_proj", "down_proj"},
    {"up_proj", "down_proj"},
    {"gate_up_proj", "down_proj"},
)


@dataclass(frozen=True)
class Place:
    """Position of a group's layer in a model.

    Args:
        module: name of the module that holds the experts of a layer.
        role: which of their projections the group is.
    """

    module: str
    role: str

    @property
    def prefix(self) -> str:
        """Prefix of the names of the layer's arrays."""
        return f"{self.module}.projections.{self.role}."


@dataclass(frozen=True)
class Whole:
    """Whether a loader can open a compressed model.

    Args:
        config: what ``config.json`` must hold; None where no loader can open the folder.
        reason: why not.
    """

    config: Mapping[str, Any] | None
    reason: str = ""


def place_of(group: Group) -> Place | None:
    """Position of a group in a model; None if its name does not determine it."""
    if group.pair is not None:
        found = _place(group.pair.key, group.stacked)
        return None if found is None else replace(found, role=group.pair.role)
    return _place(group.name, group.stacked)


def _place(name: str, stacked: bool) -> Place | None:
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    if stacked:
        role, inside = _STACKS.get(last, ("", ""))
        return Place(stem + inside, role) if role and stem else None
    module, _, star = stem.rpartition(".")
    return Place(module, _ROLES[last]) if star == "*" and last in _ROLES and module else None


def whole_model(
    model: Model,
    configs: Iterable[tuple[Group, Mapping[str, Any]]],
    kept: Collection[str],
    bits: Mapping[str, int | None] | None = None,
) -> Whole:
    """The configuration of a compressed model, or why it can have none.

    Args:
        model: as it was.
        configs: of the layer of each group, as checkpoints store them.
        kept: keys of all tensors that are not in factors.
        bits: 8 or 4 of the entries of each group, by its name; None for entries of their dtype.
    """
    modules: dict[str, dict[str, Mapping[str, Any]]] = {}
    rounded: dict[str, dict[str, int]] = {}
    for group, config in configs:
        place = place_of(group)
        if place is None:
            return Whole(None, f"the name {group.name!r} does not tell which projection it is")
        modules.setdefault(place.module, {})[place.role] = config
        few = (bits or {}).get(group.name)
        if few is not None:
            rounded.setdefault(place.module, {})[place.role] = few
    entries: dict[str, dict[str, Any]] = {}
    for module, layers in modules.items():
        left = {key.removeprefix(f"{module}.") for key in kept if key.startswith(f"{module}.")}
        biases = [role for role in layers if f"{role}_bias" in left]
        others = sorted(left - {f"{role}_bias" for role in biases})
        if others or set(layers) not in _COMPLETE:
            left_out = f"{module}.{others[0]}" if others else "others"
            return Whole(
                None,
                f"of the experts {module!r}, only {', '.join(layers)} are in factors and "
                f"{left_out} are not",
            )
        entries[module] = {
            "kind": "FactorizedExperts",
            "act": None,
            "biases": biases,
            "projections": layers,
            **({"bits": rounded[module]} if module in rounded else {}),
        }
    try:
        config = read_config(model)
    except CheckpointError as error:
        return Whole(None, f"the model has no {CONFIG} that can be read ({error})")
    found = quantization(config)
    if found and found.get("quant_method") not in METHODS:
        return Whole(None, "the model is quantized as well")
    return Whole({**unquantized(config), QUANTIZED: model_config(entries)})


def plain_config(model: Model) -> Mapping[str, Any] | None:
    """The configuration of a model all of whose weights were dequantized; None for others."""
    config = found_config(model)
    if quantization(config).get("quant_method") not in METHODS:
        return None
    return unquantized(config)


def readme(model: Model, whole: Whole, summary: str) -> str:
    """README of the folder: a section about the factors, then the model's own README.

    Args:
        model: as it was.
        whole: whether loaders can open it.
        summary: a sentence on what was done.
    """
    opening = (
        f"{opened_by(whole.config, needs_import=True)} {_FACTORS}"
        if whole.config is not None
        else _CLOSED.format(reason=whole.reason)
    )
    return headed_readme(model, "experts in factors", f"{summary}\n\n{opening}")


def headed_readme(model: Model, title: str, text: str) -> str:
    """A section of its own, then the README that the model had.

    Args:
        model: as it was.
        title: behind its name.
        text: of the section.
    """
    before = _own_readme(model)
    # the hub reads the text between these lines
    front, rest = "", before
    if before.startswith("---\n") and "\n---\n" in before[3:]:
        end = before.index("\n---\n", 3) + 5
        front, rest = before[:end] + "\n", before[end:].lstrip("\n")
    found = f"{front}# {model.name}, {title}\n\n{text}"
    return f"{found}\n{rest}" if rest else found


def opened_by(config: Mapping[str, Any], *, needs_import: bool) -> str:
    """Code that opens a folder, in Markdown.

    Args:
        config: of the model.
        needs_import: whether transformers has to know the library first.
    """
    loader = _loader(config)
    if needs_import:
        return _IMPORTED.format(module=IMPORT, loader=loader)
    return _PLAIN.format(loader=loader)


_IMPORTED = """\
This line has to run before the model is loaded:

```python
import {module}  # pip install 'tensormoe[huggingface]'
```

Then transformers opens the folder as any other:

```python
from transformers import {loader}

model = {loader}.from_pretrained("this folder")
```

Without it, transformers warns of an unknown quantization type, and fills the experts with random
numbers."""

_FACTORS = """\
Each file in `experts/` is a layer of tensormoe as well, which `MuMoE.load` opens in every
framework. `tensormoe.json` says what was lost.
"""

_PLAIN = """\
The folder is opened as any other:

```python
from transformers import {loader}

model = {loader}.from_pretrained("this folder")
```"""

_CLOSED = """\
No loader of models can open this folder, so it has no `config.json`: {reason}. Each file in
`experts/` is a layer of tensormoe, which `MuMoE.load` opens in every framework; all else of the
model is beside them. `tensormoe.json` says which layer stands for which tensors.
"""


def _loader(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    if not isinstance(first, str) or not first.isidentifier():
        return "AutoModel"
    return "AutoModelForCausalLM" if first.endswith("ForCausalLM") else first


def _own_readme(model: Model) -> str:
    if model.folder is None:
        return ""
    try:
        with open(os.path.join(model.folder, README), encoding="utf-8") as file:
            return file.read(_MAX_BYTES)
    except (OSError, UnicodeDecodeError):
        return ""


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A configuration as its file has it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

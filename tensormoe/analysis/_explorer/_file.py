"""The data file: JSON with a schema version, arrays as base64 of their little-endian bytes."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormoe._validation import brief
from tensormoe.analysis._explorer._top import TopInputs
from tensormoe.analysis._explorer._value import (
    Contributions,
    Exploration,
    ExploredLevel,
    NearestExperts,
    RecordedInput,
    wanted_inputs,
)
from tensormoe.analysis._histograms import ClassHistogram
from tensormoe.analysis._interventions import Interventions
from tensormoe.analysis._use import ExpertLoad
from tensormoe.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, VERSION = "tensormoe exploration", 1
_DTYPES = ("float32", "float64", "int32", "int64")
_PARTS = {
    "load": (ExpertLoad, ("mass", "counts")),
    "histogram": (ClassHistogram, ("mass", "squares", "inputs")),
    "interventions": (Interventions, ("lost", "gained", "correct", "inputs")),
    "top": (TopInputs, ("numbers", "values", "changed", "marks")),
    "affected": (TopInputs, ("numbers", "values", "changed", "marks")),
    "nearest": (NearestExperts, ("numbers", "cosines")),
}


def checked_path(path: str | os.PathLike[str]) -> Path:
    """A path that a page or a data file can be written to.

    Raises:
        SpecError: another extension, or a folder that does not exist.
    """
    _check_is_path(path)
    target = Path(path)
    if "\0" in str(path):
        raise SpecError(f"path must not hold a null character; got {str(path)!r}.")
    if target.suffix.lower() not in (".html", ".json"):
        raise SpecError(f"path must end in .html or .json; got {str(path)!r}. Rename the file.")
    if not target.parent.is_dir():
        raise SpecError(
            f"the folder of path must exist; {str(target.parent)!r} does not. Create it first."
        )
    if target.is_dir():
        raise SpecError(f"path must be a file; {str(path)!r} is a folder. Choose another one.")
    return target


def _check_is_path(path: object) -> None:
    if not isinstance(path, str) and not (
        isinstance(path, os.PathLike) and isinstance(os.fspath(path), str)
    ):
        raise SpecError(f"path must be a str or an os.PathLike of str; got {brief(path)}.")


def packed(array: NDArray[Any] | None, dtype: str | None = None) -> dict[str, Any] | None:
    """An array as JSON holds it: ``dtype``, ``shape``, and ``base64`` of its bytes."""
    import numpy as np

    if array is None:
        return None
    values = np.asarray(array, dtype)
    if values.dtype.name not in _DTYPES:
        values = values.astype("int64" if values.dtype.kind in "iu" else "float64")
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    content = b64encode(little.tobytes()).decode("ascii")
    return {"dtype": values.dtype.name, "shape": list(values.shape), "base64": content}


def to_json(found: Exploration) -> bytes:
    """The bytes of the data file."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "title": found.title,
        "inputs": found.inputs,
        "class_names": list(found.class_names),
        "columns": list(found.columns),
        "scales": list(found.scales),
        "linear": found.linear,
        "levels": [_level(each) for each in found.levels],
        "grids": [packed(each) for each in found.grids],
        "recorded": [
            {
                "number": number,
                "content": dict(each.content),
                "label": each.label,
                "logits": each.logits,
                "contributions": [
                    {"experts": packed(part.experts), "logits": packed(part.logits)}
                    for part in each.contributions
                ],
            }
            for number, each in found.recorded.items()
        ],
    }
    return json.dumps(values).encode("ascii")


def _level(level: ExploredLevel) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, (_, fields) in _PARTS.items():
        part = getattr(level, name)
        made[name] = (
            None if part is None else {each: packed(getattr(part, each)) for each in fields}
        )
    # what has no array, and figures that follow from the others, for readers of the file
    made["load"] |= {"inputs": level.load.inputs, "threshold": level.load.threshold}
    special = level.specialization
    made["figures"] = {
        "divergence": packed(None if special is None else special.divergence),
        "baseline": packed(None if special is None else special.baseline),
        "polysemanticity": packed(level.polysemanticity),
    }
    return made


def read_json(path: str | os.PathLike[str]) -> Exploration:
    """The exploration of a data file.

    Raises:
        CheckpointError: not such a file, or one of another version.
    """
    _check_is_path(path)
    if "\0" in str(path):
        raise CheckpointError(f"path must not hold a null character; got {str(path)!r}.")
    try:
        values = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} can't be read: {error.strerror}. Choose another file."
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{str(path)!r} must be a data file of an exploration; it is not JSON. Write it with "
            "Exploration.save('….json')."
        ) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} must be a data file of an exploration; its format is another. Write it "
            "with Exploration.save('….json')."
        )
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{str(path)!r} must have version {VERSION}; got {values.get('version')!r}. Open it "
            "with the release that wrote it."
        )
    try:
        return _from_dict(values)
    except (KeyError, TypeError, ValueError, AttributeError, Base64Error) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged: {type(error).__name__} {error}. Write it anew."
        ) from None


def _from_dict(values: Mapping[str, Any]) -> Exploration:
    names = tuple(map(_string, values["class_names"]))
    found = Exploration(
        _whole(values["inputs"]),
        tuple(_read_level(each, len(names)) for each in values["levels"]),
        tuple(_unpacked(each) for each in values["grids"]),  # type: ignore[misc]
        {
            _whole(each["number"]): RecordedInput(
                _read_content(each["content"]),
                None if each["label"] is None else _whole(each["label"]),
                None if each["logits"] is None else tuple(map(float, each["logits"])),
                # not in files of earlier releases
                tuple(map(_read_contributions, each.get("contributions", ()))),
            )
            for each in values["recorded"]
        },
        names,
        tuple(map(_string, values["columns"])),
        tuple(map(float, values["scales"])),
        values["linear"] is True,
        _string(values["title"]),
    )
    if not found.levels:
        raise ValueError("no levels")
    unknown = wanted_inputs(found.levels) - set(found.recorded)
    if unknown:
        raise ValueError(f"input {min(unknown)} is not recorded")
    for number, each in found.recorded.items():
        if each.contributions:
            _check_contributions(number, each, found.experts)
    return found


def _read_contributions(values: Mapping[str, Any]) -> Contributions:
    experts, logits = _unpacked(values["experts"]), _unpacked(values["logits"])
    if experts is None or logits is None:
        raise ValueError("contributions without arrays")
    return Contributions(experts, logits)


def _check_contributions(number: int, found: RecordedInput, experts: tuple[int, ...]) -> None:
    classes = len(found.logits or ())
    right = len(found.contributions) == len(experts) and all(
        part.logits.shape == (part.experts.size, classes)
        and part.experts.dtype.kind == "i"
        and ((part.experts >= 0) & (part.experts < count)).all()
        for part, count in zip(found.contributions, experts, strict=True)
    )
    if not right:
        raise ValueError(f"contributions to input {number} do not fit")


def _read_level(values: Mapping[str, Any], classes: int) -> ExploredLevel:
    parts: dict[str, Any] = {}
    for name, (kind, fields) in _PARTS.items():
        part = values[name]
        if part is None:
            parts[name] = None
            continue
        arrays = {each: _unpacked(part[each]) for each in fields}
        if name == "load":
            arrays |= {"inputs": _whole(part["inputs"]), "threshold": float(part["threshold"])}  # type: ignore[dict-item]
        parts[name] = kind(**arrays)
    level = ExploredLevel(**parts)
    experts = level.experts
    for name, (_, fields) in _PARTS.items():
        part = getattr(level, name)
        for field in fields if part is not None else ():
            array = getattr(part, field)
            if array is None and field in ("changed", "marks"):
                continue
            per_class = field in ("inputs", "correct")
            if array is None or array.shape[:1] != ((classes if per_class else experts),):
                raise ValueError(f"{name}.{field} has shape {array.shape}")
    return level


def _unpacked(packed: Mapping[str, Any] | None) -> NDArray[Any] | None:
    import numpy as np

    if packed is None:
        return None
    if packed["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {packed['dtype']!r}")
    dtype, shape = np.dtype(packed["dtype"]), tuple(map(_whole, packed["shape"]))
    content = b64decode(packed["base64"], validate=True)
    if len(content) != prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes for shape {shape}")
    little = np.frombuffer(content, dtype.newbyteorder("<"))
    return little.astype(dtype).reshape(shape)


def _read_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an input, of the kinds that there are and no other."""
    made: dict[str, Any] = {}
    if "image" in content:
        made["image"] = _string(content["image"])
        if not made["image"].startswith("data:image/png;base64,"):
            raise ValueError("an image that is not a PNG")
    if "text" in content:
        made["text"] = _string(content["text"])
    if "tokens" in content:
        made["tokens"] = list(map(_string, content["tokens"]))
        made["first"] = -_whole(-content["first"])
    if "cells" in content:
        made["cells"] = list(map(_string, content["cells"]))
    return made


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a whole number")
    return value

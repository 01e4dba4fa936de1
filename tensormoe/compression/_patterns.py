"""Patterns on the keys of experts' tensors, and those of known families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType

from tensormoe.errors import SpecError

LAYOUTS = ("auto", "out_in", "in_out")
"""Layouts of a stored matrix: (out, in), (in, out), or ``"auto"``.

``"auto"`` is (out, in), as PyTorch's linear layers store it, and for stacks of all experts what the
sizes of a layer's two projections say."""

EXPERT = "{expert}"

_PARTS = r"[^.]+(?:\.[^.]+)*"
_NUMBER = r"(?P<expert>0|[1-9][0-9]*)"


@dataclass(frozen=True)
class Pattern:
    """A pattern on keys.

    ``*`` stands for one part of a key or more, and inside a part for any characters. The last part
    that is a ``*``, or ``{expert}`` where that is another one, is the number of the expert, unless
    the tensor is a stack of all experts. What comes before the pattern, and a last part ``weight``,
    need not be written.

    Args:
        text: as it is written: parts with dots between, none of them empty.

    Raises:
        SpecError: an empty part, or ``{expert}`` twice.

    >>> Pattern("layers.*.experts.*.w1").number("model.layers.3.moe.experts.7.w1.weight")
    ('model.layers.3.moe.experts.*.w1.weight', 7)
    >>> Pattern("layers.*.experts.*.w1").number("layers.3.shared_experts.7.w1.weight") is None
    True
    >>> Pattern("experts.{expert}.layers.*.w1").number("experts.7.layers.3.w1")
    ('experts.*.layers.3.w1', 7)
    >>> Pattern("layers.*.experts.down_proj").matches("model.layers.3.mlp.experts.down_proj")
    True
    """

    text: str

    def __post_init__(self) -> None:
        parts = self.text.split(".") if isinstance(self.text, str) else [""]
        if not all(parts) or parts.count(EXPERT) > 1:
            raise SpecError(
                "a pattern of experts must be parts of keys with dots between, one of them the "
                f"expert's number; got {self.text!r}. Write for example 'layers.*.experts.*.w1'."
            )

    @property
    def stacked(self) -> bool:
        """Whether the pattern may stand for stacks of experts."""
        return EXPERT not in self.text

    def number(self, key: str) -> tuple[str, int] | None:
        """The key with a ``*`` for the expert's number, and the number; None for other keys."""
        parts = tuple(self.text.split("."))
        if EXPERT in parts:
            place = parts.index(EXPERT)
        elif "*" in parts:
            place = len(parts) - 1 - parts[::-1].index("*")
        else:
            return None
        found = _compiled(parts, place).fullmatch(key)
        if found is None:
            return None
        start, stop = found.span("expert")
        return f"{key[:start]}*{key[stop:]}", int(found["expert"])

    def matches(self, key: str) -> bool:
        """Whether the key is that of a stack."""
        return self.stacked and bool(_compiled(tuple(self.text.split(".")), None).fullmatch(key))


@dataclass(frozen=True)
class Preset:
    """Keys under which a family of models keeps its experts.

    Args:
        alternatives: patterns of the projections, one tuple for each way of writing them; the
            first way of which every pattern matches a key is taken.
        families: names of the models, for people.
        stacked: whether one tensor, of three axes, holds all experts of a layer and projection.

    >>> PRESETS["mixtral"].alternatives[0][0]
    'layers.*.block_sparse_moe.experts.*.w1'
    """

    alternatives: tuple[tuple[str, ...], ...]
    families: str
    stacked: bool = False


_GATED = (
    "layers.*.mlp.experts.*.gate_proj",
    "layers.*.mlp.experts.*.up_proj",
    "layers.*.mlp.experts.*.down_proj",
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "mixtral": Preset(
            (tuple(f"layers.*.block_sparse_moe.experts.*.{name}" for name in ("w1", "w3", "w2")),),
            "Mixtral, MiniMax, Phi-3.5-MoE",
        ),
        "qwen_moe": Preset((_GATED,), "Qwen1.5-MoE, Qwen2-MoE, Qwen3-MoE"),
        "olmoe": Preset((_GATED,), "OLMoE, FlexOlmo"),
        "deepseek": Preset((_GATED,), "DeepSeekMoE, DeepSeek-V2, DeepSeek-V3"),
        "fused": Preset(
            (
                ("layers.*.experts.gate_up_proj", "layers.*.experts.down_proj"),
                ("layers.*.input_linear", "layers.*.output_linear"),
            ),
            "stacks of all experts: GPT-OSS, Llama 4, Granite, models saved as they are in memory",
            stacked=True,
        ),
    }
)
"""Known families of models by the name that :class:`Compression` and ``--preset`` take."""


def closest(patterns: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Patterns of the keys there are that look most like the given ones."""
    there = list(dict.fromkeys(_general(key) for key in keys))
    found: dict[str, None] = {}
    for text in patterns:
        wanted = text.replace(EXPERT, "*")
        found |= dict.fromkeys(get_close_matches(wanted, there, n=3, cutoff=0.3))
    return list(found)


def fitting(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of presets all of whose patterns match a key."""
    return [
        name
        for name, preset in PRESETS.items()
        if any(
            all(
                any(_takes(text, key, shape, preset.stacked) for key, shape in shapes.items())
                for text in texts
            )
            for texts in preset.alternatives
        )
    ]


def _takes(text: str, key: str, shape: tuple[int, ...], stacked: bool) -> bool:
    pattern = Pattern(text)
    if stacked:
        return len(shape) == 3 and pattern.matches(key)
    return len(shape) == 2 and pattern.number(key) is not None


@lru_cache(maxsize=256)
def _compiled(parts: tuple[str, ...], expert: int | None) -> re.Pattern[str]:
    written = []
    for index, part in enumerate(parts):
        if index == expert:
            written.append(_NUMBER)
        elif part == "*":
            written.append(_PARTS)
        else:
            written.append(re.escape(part).replace(r"\*", "[^.]*"))
    return re.compile("".join((r"(?:.*\.)?", r"\.".join(written), r"(?:\.weight)?")), re.DOTALL)


def _general(key: str) -> str:
    """A key as a pattern: numbers become ``*``, and what need not be written is left out."""
    parts = ["*" if part.isdigit() else part for part in key.split(".")]
    if parts[-1] == "weight" and len(parts) > 1:
        parts.pop()
    if parts[0] == "model" and len(parts) > 1:
        parts.pop(0)
    return ".".join(parts)

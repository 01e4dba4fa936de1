"""Patterns on the keys of experts' tensors, and those of known families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
        model_types: values of ``model_type`` in a ``config.json`` for which it is chosen.
        interleaved: whether gate and up projection take turns in a stack, and the experts have a
            function of both of their own; else they are halves.

    >>> PRESETS["mixtral"].alternatives[0][0]
    'layers.*.block_sparse_moe.experts.*.w1'
    """

    alternatives: tuple[tuple[str, ...], ...]
    families: str
    stacked: bool = False
    model_types: tuple[str, ...] = ()
    interleaved: bool = False


AUTO = "auto"
"""The preset that a model's ``config.json`` and keys decide."""

_GATED = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = ("w1", "w3", "w2")


def _listed(
    parent: str, names: tuple[str, ...], families: str, model_types: str, stacked: bool = False
) -> Preset:
    """A preset of one way of writing: a tensor per expert, or a stack per layer."""
    expert = "" if stacked else "*."
    patterns = tuple(f"layers.*.{parent}.{expert}{name}" for name in names)
    return Preset((patterns,), families, stacked, tuple(model_types.split()))


_STACKS = ("gate_up_proj", "down_proj")

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "mixtral": _listed("block_sparse_moe.experts", _NUMBERED, "Mixtral", "mixtral"),
        "minimax": _listed(
            "block_sparse_moe.experts", _NUMBERED, "MiniMax, MiniMax-M2", "minimax minimax_m2"
        ),
        "phi_moe": _listed("block_sparse_moe.experts", _NUMBERED, "Phi-3.5-MoE", "phimoe"),
        "qwen_moe": _listed(
            "mlp.experts",
            _GATED,
            "Qwen1.5-MoE, Qwen2-MoE, Qwen3-MoE, Qwen3-Next",
            "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text",
        ),
        "olmoe": _listed("mlp.experts", _GATED, "OLMoE, FlexOlmo", "olmoe flex_olmo"),
        "deepseek": _listed(
            "mlp.experts",
            _GATED,
            "DeepSeekMoE, DeepSeek-V2, DeepSeek-V3, dots.llm1",
            "deepseek_v2 deepseek_v3 deepseek_v32 dots1",
        ),
        "glm_moe": _listed(
            "mlp.experts",
            _GATED,
            "GLM-4.5, GLM-4.5-Air, GLM-4.7-Flash, Solar-Open",
            "glm4_moe glm4_moe_lite solar_open",
        ),
        "ernie_moe": _listed("mlp.experts", _GATED, "ERNIE 4.5", "ernie4_5_moe"),
        "hunyuan_moe": _listed("mlp.experts", _GATED, "Hunyuan-A13B", "hunyuan_v1_moe"),
        "jamba": _listed("feed_forward.experts", _GATED, "Jamba", "jamba"),
        "lfm_moe": _listed("feed_forward.experts", _NUMBERED, "LFM2-MoE", "lfm2_moe"),
        "nemotron_h": _listed(
            "mixer.experts", ("up_proj", "down_proj"), "Nemotron 3", "nemotron_h"
        ),
        "gpt_oss": replace(
            _listed("mlp.experts", _STACKS, "GPT-OSS", "gpt_oss", True), interleaved=True
        ),
        "llama4": _listed("feed_forward.experts", _STACKS, "Llama 4", "llama4 llama4_text", True),
        "granite_moe": _listed(
            "block_sparse_moe",
            ("input_linear", "output_linear"),
            "Granite 3 MoE, Granite 4",
            "granitemoe granitemoeshared granitemoehybrid",
            True,
        ),
        "gemma": _listed("experts", _STACKS, "Gemma 4", "gemma4 gemma4_text", True),
        "fused": Preset(
            (
                ("layers.*.experts.gate_up_proj", "layers.*.experts.down_proj"),
                ("layers.*.input_linear", "layers.*.output_linear"),
            ),
            "stacks of all experts, as models are in memory",
            stacked=True,
        ),
    }
)
"""Known families of models by the name that :class:`Compression` and ``--preset`` take."""


def takes_turns(preset: str | None, model_types: Iterable[str]) -> bool:
    """Whether gate and up projection of a model take turns, by its family or its type."""
    if preset is not None and preset in PRESETS and PRESETS[preset].interleaved:
        return True
    kinds = {*model_types}
    return any(each.interleaved and kinds & {*each.model_types} for each in PRESETS.values())


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

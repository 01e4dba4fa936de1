"""Layers of a model from the values of its ``config.json``, for known families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tensormoe._validation import brief, positive_int
from tensormoe.errors import SpecError
from tensormoe.selection._sites import LayerSite

_ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_MOST_LAYERS = 100_000


def config_sites(config: Any, parts: Sequence[str] | None) -> tuple[LayerSite, ...]:
    """Layers of a transformer, by the names that transformers 5 gives them.

    Args:
        config: the values of a ``config.json``.
        parts: of the model; by default experts if there are any, else MLPs.

    Raises:
        SpecError: an unknown family, values of other types, or a model without such layers.

    >>> config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12}
    >>> config_sites(config, ("attention",))[1].name
    'transformer.h.0.attn.c_proj'
    """
    if not isinstance(config, Mapping):
        raise SpecError(f"a configuration must be a mapping of names; got {brief(config)}.")
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise SpecError(
            f"model_type of a configuration must be one of {', '.join(FAMILIES)}; got "
            f"{brief(name)}. Of other models pass the model itself, on the meta device: "
            "AutoModel.from_config(config) under torch.device('meta')."
        )
    values = _Values(config)
    found = [*FAMILIES[name](values)]
    return chosen_parts(found, parts, name)


def chosen_parts(
    found: Sequence[tuple[str, LayerSite]], parts: Sequence[str] | None, what: str
) -> tuple[LayerSite, ...]:
    """Layers of some parts.

    Args:
        found: of a whole model, each with its part: ``"experts"``, ``"mlp"``, ``"attention"``, or
            ``"mlp_linear"`` for a linear layer in an MLP, and ``"linear"`` for one elsewhere.
        parts: by default experts if there are any, else MLPs.
        what: names the model, for messages.

    Raises:
        SpecError: there are no such layers.
    """
    if parts is None:
        there = {part for part, _ in found}
        parts = next(([each] for each in ("experts", "mlp", "linear") if each in there), ["mlp"])
    wanted = {*parts}
    if "linear" in wanted:
        wanted |= {"attention", "mlp_linear"}
    chosen = tuple(site for part, site in found if part in wanted)
    for each in parts:
        covered = {"linear", "attention", "mlp_linear"} if each == "linear" else {each}
        if not any(part in covered for part, _ in found):
            others = sorted({part for part, _ in found} - {"mlp_linear"})
            raise SpecError(
                f"the model must have layers of the part {each!r}; {what} has none. It has "
                f"{', '.join(others) or 'none that are known'}."
            )
    return chosen


@dataclass(frozen=True)
class _Values:
    """Values of a configuration, checked when they are read."""

    given: Mapping[str, Any]

    def size(self, name: str, default: int | None = None, *others: str) -> int:
        """A positive integer, under the first of several names that is there."""
        for key in (name, *others):
            if self.given.get(key) is not None:
                return positive_int(self.given[key], f"{key} of a configuration")
        if default is None:
            raise SpecError(
                f"a configuration of the family {self.given['model_type']!r} must have {name!r}; "
                "it is missing. Pass the whole config.json."
            )
        return default

    def count(self, name: str, default: int = 0) -> int:
        """An integer of at least zero."""
        value = self.given.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SpecError(
                f"{name} of a configuration must be a non-negative integer; got {brief(value)}."
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.given.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise SpecError(f"{name} of a configuration must be true or false; got {brief(value)}.")
        return value

    def layers(self, name: str, *others: str) -> int:
        found = self.size(name, None, *others)
        if found > _MOST_LAYERS:
            raise SpecError(f"{name} of a configuration must be plausible; got {found:,}.")
        return found

    def numbers(self, name: str) -> set[int]:
        """A list of layers."""
        value = self.given.get(name) or []
        if not isinstance(value, list | tuple) or not all(type(each) is int for each in value):
            raise SpecError(
                f"{name} of a configuration must be a list of integers; got {brief(value)}."
            )
        return {*value}

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        value = self.given.get("dtype") or self.given.get("torch_dtype") or "float32"
        found = _ITEMSIZES.get(str(value).removeprefix("torch."))
        if found is None:
            raise SpecError(
                f"dtype of a configuration must be one of {', '.join(_ITEMSIZES)}; got "
                f"{brief(value)}."
            )
        return found

    def stem(self, prefix: str) -> str:
        """Name of the part that has the layers: none of its own in a model without a head."""
        listed = self.given.get("architectures")
        first = listed[0] if isinstance(listed, list | tuple) and listed else "For"
        return prefix if (isinstance(first, str) and "For" in first) or "LMHead" in first else ""


Found = Iterator[tuple[str, LayerSite]]


def _linears(
    part: str, stem: str, sizes: Mapping[str, tuple[int, int, bool]], itemsize: int
) -> Found:
    for name, (rows, columns, bias) in sizes.items():
        yield part, LayerSite.of_linear(f"{stem}.{name}", rows, columns, bias, itemsize)


def _mlp(
    stem: str, names: Sequence[str], sizes: tuple[int, int], bias: bool, itemsize: int
) -> Found:
    """An MLP as a whole, and its linear layers: the last one down, the others up."""
    width, hidden = sizes
    yield (
        "mlp",
        LayerSite.of_mlp(stem, width, hidden, gated=len(names) == 3, bias=bias, itemsize=itemsize),
    )
    *up, down = names
    linears = dict.fromkeys(up, (width, hidden, bias)) | {down: (hidden, width, bias)}
    yield from _linears("mlp_linear", stem, linears, itemsize)


_GATED = ("gate_proj", "up_proj", "down_proj")


def _gpt2(values: _Values) -> Found:
    width = values.size("n_embd", 768, "hidden_size")
    hidden = values.size("n_inner", 4 * width)
    for k in range(values.layers("n_layer", "num_hidden_layers")):
        stem = f"{values.stem('transformer.')}h.{k}"
        attention = {"c_attn": (width, 3 * width, True), "c_proj": (width, width, True)}
        yield from _linears("attention", f"{stem}.attn", attention, values.itemsize)
        yield from _mlp(f"{stem}.mlp", ("c_fc", "c_proj"), (width, hidden), True, values.itemsize)


def _vit(values: _Values) -> Found:
    width, hidden = values.size("hidden_size", 768), values.size("intermediate_size", 3072)
    bias = values.flag("qkv_bias", True)
    for k in range(values.layers("num_hidden_layers")):
        stem = f"{values.stem('vit.')}layers.{k}"
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (width, width, bias))
        attention["o_proj"] = (width, width, True)
        yield from _linears("attention", f"{stem}.attention", attention, values.itemsize)
        yield from _mlp(f"{stem}.mlp", ("fc1", "fc2"), (width, hidden), True, values.itemsize)


def _attention(values: _Values, stem: str, inner: bool, outer: bool) -> Found:
    """Query, key, value and output, with biases or without."""
    width, heads = values.size("hidden_size"), values.size("num_attention_heads")
    size = values.size("head_dim", max(1, width // heads))
    shared = values.size("num_key_value_heads", heads) * size
    sizes = {
        "q_proj": (width, heads * size, inner),
        "k_proj": (width, shared, inner),
        "v_proj": (width, shared, inner),
        "o_proj": (heads * size, width, outer),
    }
    yield from _linears("attention", f"{stem}.self_attn", sizes, values.itemsize)


def _decoder(biases: bool | None) -> Callable[[_Values], Found]:
    """Llama and its kin; ``biases`` of query, key and value alone, None as configured for all."""

    def layers(values: _Values) -> Found:
        own = values.flag("attention_bias", False)
        inner, outer = (own, own) if biases is None else (biases, False)
        sizes = values.size("hidden_size"), values.size("intermediate_size")
        bias = values.flag("mlp_bias", False)
        for k in range(values.layers("num_hidden_layers")):
            stem = f"{values.stem('model.')}layers.{k}"
            yield from _attention(values, stem, inner, outer)
            yield from _mlp(f"{stem}.mlp", _GATED, sizes, bias, values.itemsize)

    return layers


def _experts(values: _Values, stem: str, count: int, hidden: int) -> Found:
    width, itemsize = values.size("hidden_size"), values.itemsize
    name = f"{stem}.mlp.experts"
    yield "experts", LayerSite.of_experts(name, count, width, hidden, itemsize=itemsize)


def _sparse(count: str, hidden: str, *others: str) -> Callable[[_Values], Found]:
    """All MLPs are experts: Mixtral and OLMoE."""

    def layers(values: _Values) -> Found:
        own = values.flag("attention_bias", False)
        experts, size = values.size(count, None, *others), values.size(hidden)
        for k in range(values.layers("num_hidden_layers")):
            stem = f"{values.stem('model.')}layers.{k}"
            yield from _attention(values, stem, own, own)
            yield from _experts(values, stem, experts, size)

    return layers


def _qwen_moe(shared: bool) -> Callable[[_Values], Found]:
    """Some MLPs are experts: Qwen2-MoE, with a shared expert, and Qwen3-MoE."""

    def layers(values: _Values) -> Found:
        width = values.size("hidden_size")
        own = values.flag("qkv_bias", True) if shared else values.flag("attention_bias", False)
        step, dense = values.size("decoder_sparse_step", 1), values.numbers("mlp_only_layers")
        experts = values.count("num_experts") or values.count("num_local_experts")
        for k in range(values.layers("num_hidden_layers")):
            stem = f"{values.stem('model.')}layers.{k}"
            yield from _attention(values, stem, own, False if shared else own)
            if k in dense or not experts or (k + 1) % step:
                sizes = width, values.size("intermediate_size")
                yield from _mlp(f"{stem}.mlp", _GATED, sizes, False, values.itemsize)
                continue
            yield from _experts(values, stem, experts, values.size("moe_intermediate_size"))
            if shared:
                sizes = width, values.size("shared_expert_intermediate_size")
                name = f"{stem}.mlp.shared_expert"
                yield from _mlp(name, _GATED, sizes, False, values.itemsize)

    return layers


def _deepseek(values: _Values) -> Found:
    """The first MLPs are dense, the others experts with shared ones; attention is latent."""
    width, heads = values.size("hidden_size"), values.size("num_attention_heads")
    rope, plain = values.size("qk_rope_head_dim", 64), values.size("qk_nope_head_dim", 128)
    value, latent = values.size("v_head_dim", 128), values.size("kv_lora_rank", 512)
    bias, query = values.flag("attention_bias", False), values.count("q_lora_rank")
    size, count = values.size("moe_intermediate_size"), values.size("n_routed_experts")
    shared = values.count("n_shared_experts")
    queries = {"q_proj": (width, heads * (plain + rope), False)}
    if query:
        queries = {
            "q_a_proj": (width, query, bias),
            "q_b_proj": (query, heads * (plain + rope), False),
        }
    attention = {
        **queries,
        "kv_a_proj_with_mqa": (width, latent + rope, bias),
        "kv_b_proj": (latent, heads * (plain + value), False),
        "o_proj": (heads * value, width, bias),
    }
    for k in range(values.layers("num_hidden_layers")):
        stem = f"{values.stem('model.')}layers.{k}"
        yield from _linears("attention", f"{stem}.self_attn", attention, values.itemsize)
        if k < values.count("first_k_dense_replace"):
            sizes = width, values.size("intermediate_size")
            yield from _mlp(f"{stem}.mlp", _GATED, sizes, False, values.itemsize)
            continue
        yield from _experts(values, stem, count, size)
        if shared:
            name = f"{stem}.mlp.shared_experts"
            yield from _mlp(name, _GATED, (width, shared * size), False, values.itemsize)


FAMILIES: Mapping[str, Callable[[_Values], Found]] = MappingProxyType(
    {
        "gpt2": _gpt2,
        "vit": _vit,
        "llama": _decoder(None),
        "mistral": _decoder(False),
        "qwen2": _decoder(True),
        "qwen3": _decoder(None),
        "mixtral": _sparse("num_local_experts", "intermediate_size", "num_experts"),
        "olmoe": _sparse("num_experts", "intermediate_size", "num_local_experts"),
        "qwen2_moe": _qwen_moe(True),
        "qwen3_moe": _qwen_moe(False),
        "deepseek_v2": _deepseek,
        "deepseek_v3": _deepseek,
    }
)
"""Known families by ``model_type``."""

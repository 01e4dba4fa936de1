"""Quantized tensors of a model: those that are dequantized on the way, and those that are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from tensormoe._validation import brief
from tensormoe.checkpoint._safetensors import DTYPES, ArrayInfo, Placed, code_of
from tensormoe.compression._config_file import quantization
from tensormoe.compression._patterns import Pattern
from tensormoe.compression._shards import Model
from tensormoe.errors import CheckpointError

FP8, MXFP4 = "fp8", "mxfp4"
METHODS = (FP8, MXFP4)
"""Values of ``quant_method`` whose tensors are dequantized."""

_SCALE_INV, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_ACTIVATION_SCALE = "activation_scale"
_E4M3 = "F8_E4M3"
_E8M0 = ("F8_E8M0", "U8")
_FLOATS = ("F32", "BF16", "F16")
_BLOCK = (128, 128)
# values per scale, and per byte
_MX_BLOCK, _PAIR = 32, 2

# names of tensors that stand beside, or instead of, a quantized weight
_ENDINGS = {
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale_2": "NVFP4",
    ".weight_scale": "scaled 8-bit weights",
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".W_q": "HQQ",
    ".weight._data": "quanto",
}
REMEDY = (
    "Dequantize the model first: load it with transformers, call model.dequantize() where its "
    "format has that, and save_pretrained. Or compress the model that it was made from."
)


@dataclass(frozen=True)
class Quantized:
    """A tensor that is stored as small numbers, blocks of which have a scale.

    Its values are products of both, in float32, and bfloat16 in files.

    Args:
        name: key of the tensor in the same model with plain weights.
        method: ``"fp8"`` or ``"mxfp4"``.
        values: key of the small numbers.
        scales: key of the scales.
        scale_code: dtype of the scales, as the format of files writes it.
        extra: keys of what a plain model does not have besides.
        shape: of the plain tensor.
        block: rows and columns of a stored matrix (out, in) that share a scale.
    """

    name: str
    method: str
    values: str
    scales: str
    scale_code: str
    extra: tuple[str, ...]
    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all that is stored of it."""
        return (self.values, self.scales, *self.extra)

    @property
    def turned(self) -> bool:
        """Whether the plain matrices are (in, out), where the stored ones are (out, in)."""
        return self.method == MXFP4

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of a stored matrix."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.turned else (rows, columns)

    @property
    def count(self) -> int:
        """Number of matrices."""
        return prod(self.shape[:-2])

    @property
    def scale_dtype(self) -> str | None:
        """Dtype of the scales; None for bytes that are exponents."""
        return DTYPES[self.scale_code] if self.scale_code in _FLOATS else None

    @property
    def dtype(self) -> str:
        """Dtype of the plain tensor."""
        return "bfloat16"

    @property
    def placed(self) -> Placed:
        """The plain tensor, as if a file had it."""
        info = ArrayInfo(self.dtype, self.shape)
        return Placed(self.name, code_of(info.dtype), info, self.shape, 0, info.nbytes)


def find_quantized(model: Model, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Tensors of a model that are dequantized on the way, by their name in a plain one.

    They are FP8 matrices with inverse scales per block, as DeepSeek-V3 has them (``…weight``,
    ``…weight_scale_inv``), and MXFP4 stacks, as GPT-OSS has them (``…_blocks``, ``…_scales``).

    Args:
        model: its headers.
        config: of the model; empty if it has none.

    Raises:
        CheckpointError: scales that are missing, or do not fit.
    """
    settings = quantization(config)
    method = settings.get("quant_method")
    if method not in (None, *METHODS):
        return {}
    found = {}
    for key, (_, placed) in model.places.items():
        if method != MXFP4 and key.endswith(_SCALE_INV):
            each = _fp8(key, model, settings)
        elif method != FP8 and key.endswith(_BLOCKS) and placed.code == "U8":
            each = _mxfp4(key, model)
        else:
            continue
        found[each.name] = each
    if method == FP8:
        _check_scaled(model, found)
    return found


def _fp8(key: str, model: Model, settings: Mapping[str, Any]) -> Quantized:
    name = key.removesuffix(_SCALE_INV)
    if name not in model.places:
        raise CheckpointError(f"scales must have weights; {name!r} is missing. Complete the model.")
    (_, values), (_, scales) = model.places[name], model.places[key]
    if values.code != _E4M3 or scales.code not in (*_FLOATS, *_E8M0) or len(values.shape) < 2:
        raise CheckpointError(
            f"FP8 weights must be matrices of {_E4M3} with scales {', '.join(_FLOATS)} or "
            f"{_E8M0[0]}; {name!r} is {values.code} {values.shape} with {scales.code}. {REMEDY}"
        )
    *leading, rows, columns = values.shape
    block = settings.get("weight_block_size", _BLOCK)
    if prod(scales.shape) == 1:
        block = (max(rows, 1), max(columns, 1))
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(each) is int and each > 0 for each in block)
    ):
        raise CheckpointError(
            f"weight_block_size must be two positive integers; config.json has {brief(block)}."
        )
    grid = (*leading, -(-rows // block[0]), -(-columns // block[1]))
    if scales.shape != grid and not prod(grid) == prod(scales.shape) == 1:
        raise CheckpointError(
            f"there must be a scale per block of {block[0]} × {block[1]}, {grid} of them; {key!r} "
            f"has shape {scales.shape} for weights {values.shape}. Correct weight_block_size in "
            "config.json."
        )
    activation = f"{name.removesuffix('weight')}{_ACTIVATION_SCALE}"
    extra = (activation,) if activation in model.places else ()
    return Quantized(name, FP8, name, key, scales.code, extra, values.shape, (block[0], block[1]))


def _mxfp4(key: str, model: Model) -> Quantized:
    name = key.removesuffix(_BLOCKS)
    scales = f"{name}{_SCALES}"
    values = model.places[key][1]
    found = model.places.get(scales)
    shape, per_byte = values.shape, _MX_BLOCK // _PAIR
    if (
        found is None
        or len(shape) != 4
        or shape[-1] != per_byte
        or found[1].shape != shape[:-1]
        or found[1].code not in _E8M0
    ):
        has = "none" if found is None else f"{found[1].code} {found[1].shape}"
        raise CheckpointError(
            f"MXFP4 weights must be bytes (experts, out, blocks, {per_byte}) with a byte of scale "
            f"for each block in {scales!r}; {key!r} has shape {shape}, and the scales are {has}. "
            "Complete the model."
        )
    experts, rows, blocks, _ = shape
    plain = (experts, blocks * _MX_BLOCK, rows)
    return Quantized(name, MXFP4, key, scales, _E8M0[0], (), plain, (1, _MX_BLOCK))


def _check_scaled(model: Model, found: Mapping[str, Quantized]) -> None:
    for key, (_, placed) in model.places.items():
        if placed.code == _E4M3 and key not in found:
            raise CheckpointError(
                f"FP8 weights must have scales; {key!r} has none, {f'{key}{_SCALE_INV}'!r}. "
                f"{REMEDY}"
            )


def plain_tensors(model: Model, quantized: Mapping[str, Quantized]) -> dict[str, Placed]:
    """The tensors of the same model with plain weights, as if a file had them."""
    stored = stored_keys(quantized.values())
    found = {key: each for key, (_, each) in model.places.items() if key not in stored}
    return found | {name: each.placed for name, each in quantized.items()}


def stored_keys(quantized: Iterable[Quantized]) -> frozenset[str]:
    """Keys of all that is stored of some quantized tensors."""
    return frozenset(key for each in quantized for key in each.keys)


def check_formats(model: Model, config: Mapping[str, Any], texts: Iterable[str]) -> None:
    """Refuse experts in formats that are not dequantized.

    Args:
        model: its headers.
        config: of the model; empty if it has none.
        texts: patterns of the experts' keys.

    Raises:
        CheckpointError: there are some; the message names the format.
    """
    patterns = [Pattern(text) for text in dict.fromkeys(texts)]
    for key in model.places:
        ending = next((each for each in _ENDINGS if key.endswith(each)), None)
        if ending is None:
            continue
        stem = key.removesuffix(ending)
        if any(each.matches(stem) or each.number(stem) is not None for each in patterns):
            raise CheckpointError(
                "experts must be floating-point numbers, FP8 with weight_scale_inv, or MXFP4; "
                f"{key!r} is a part of {described(config, _ENDINGS[ending])}. {REMEDY}"
            )


def described(config: Mapping[str, Any], seen: str) -> str:
    """Name of a format, by a model's configuration and its keys."""
    method = quantization(config).get("quant_method")
    return seen if method is None else f"{seen} (quant_method {brief(method)} in config.json)"

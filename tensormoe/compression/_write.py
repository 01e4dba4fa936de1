"""The files of a compressed model, each written whole and a few megabytes at a time."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tensormoe._config import LayerConfig
from tensormoe.backend import get_backend
from tensormoe.checkpoint import read_checkpoint
from tensormoe.checkpoint._files import open_regular, write_whole
from tensormoe.checkpoint._format import CheckpointHeader, encode_header, file_order
from tensormoe.checkpoint._safetensors import ArrayInfo, Placed, encode_frame
from tensormoe.compression._groups import Group
from tensormoe.compression._quantized import Quantized, stored_keys
from tensormoe.compression._resume import MANIFEST
from tensormoe.compression._shards import (
    INDEX_SUFFIX,
    WEIGHTS_SUFFIX,
    Model,
    Shard,
    read_range,
)
from tensormoe.compression._values import dequantized, pieces
from tensormoe.functional import expert_weight

# weights in other formats, which would hold the experts a second time
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")

Report = Callable[[int], None]


def write_factors(
    path: str,
    config: LayerConfig,
    factors: Mapping[str, Any],
    dtype: str,
    prefix: str,
    bits: int | None = None,
) -> None:
    """A checkpoint of a layer, as every framework's layer loads it.

    Args:
        path: the file.
        config: of the layer.
        factors: NumPy arrays by canonical name, in the working dtype; of few bits codes and scales.
        dtype: that they are stored in, codes apart.
        prefix: of their names in a model.
        bits: 8 or 4 of codes.
    """
    infos = {
        name: ArrayInfo(array.dtype.name if array.dtype.kind in "iu" else dtype, array.shape)
        for name, array in factors.items()
    }
    header = CheckpointHeader("MuMoE", config.to_dict(), infos, prefix=prefix, bits=bits)
    head = encode_header(header)

    def parts() -> Iterator[bytes]:
        yield head
        for name in file_order(infos):
            yield from pieces(factors[name], infos[name].dtype)

    write_whole(path, parts())


@dataclass(frozen=True, eq=False)
class Plain:
    """A model with nothing quantized, as its shards are written.

    Args:
        model: as it is.
        quantized: tensors that are dequantized on the way.
    """

    model: Model
    quantized: Mapping[str, Quantized]

    @cached_property
    def _names(self) -> Mapping[str, str | None]:
        """Names of what is stored of quantized tensors; None for scales, which are not written."""
        stored = stored_keys(self.quantized.values())
        names = {each.values: each.name for each in self.quantized.values()}
        return {key: names.get(key) for key in stored}

    def entries(self, shard: Shard, dropped: Collection[str]) -> list[Placed]:
        """The tensors of a shard by the names that they are written under, without some."""
        found = []
        for key, placed in shard.entries.items():
            name = self._names.get(key, key)
            if name is not None and name not in dropped:
                found.append(self.quantized[name].placed if key in self._names else placed)
        return found

    def head(self, shard: Shard, entries: Sequence[Placed]) -> bytes:
        """The first part of a shard with these tensors; the one that it has if nothing changes."""
        if [each.name for each in entries] == list(shard.entries) and not any(
            each.name in self.quantized for each in entries
        ):
            return shard.head
        placed = ((each.name, each.code, each.shape, each.nbytes) for each in entries)
        return encode_frame(placed, shard.metadata)

    def parts(self, shard: Shard, each: Placed) -> Iterator[bytes]:
        """The bytes of a tensor of a shard."""
        if each.name in self.quantized:
            return dequantized(self.model, self.quantized[each.name])
        return read_range(shard, each.begin, each.end)


def write_rest(
    plain: Plain, shard: Shard, dropped: Collection[str], path: str, report: Report
) -> None:
    """A shard without the tensors of some keys; all others byte for byte, or dequantized."""
    kept = plain.entries(shard, dropped)

    def parts() -> Iterator[bytes]:
        yield plain.head(shard, kept)
        for each in kept:
            for data in plain.parts(shard, each):
                yield data
                report(len(data))

    write_whole(path, parts())


class Rebuilt:
    """Experts' matrices, rebuilt from factors that were written to files.

    Args:
        groups: by key, the files and groups that its tensor is made of: two where gate and up
            projection of a stack are apart.
        limit: bytes of factors that are held.
    """

    def __init__(self, groups: Mapping[str, Sequence[tuple[str, Group]]], limit: int) -> None:
        self._groups = groups
        self._limit = limit
        self._held: OrderedDict[str, tuple[LayerConfig, Mapping[str, Any]]] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._groups

    def parts(self, key: str) -> Iterator[bytes]:
        """The bytes of a key's tensor, in its dtype and layout."""
        _, first = self._groups[key][0]
        own = [first.keys.index(key) % first.experts]
        for number in range(first.experts) if first.stacked else own:
            matrix = self._matrix(key, number)
            yield from pieces(matrix.T if first.transposed else matrix, first.dtype)

    def _matrix(self, key: str, number: int) -> Any:
        """One expert's matrix (in, out) as the file has it."""
        import numpy as np

        backend, whole = get_backend("numpy"), None
        for path, group in self._groups[key]:
            config, factors = self._layer(path)
            matrix, _ = expert_weight(config, factors, (number,), backend)
            part = matrix[:, dict(group.sources(number))[key]]
            if group.pair is None or not group.stacked:
                return part
            if whole is None:
                whole = np.empty((group.in_features, group.width), part.dtype)
            whole[:, group.taken] = part
        return whole

    def _layer(self, path: str) -> tuple[LayerConfig, Mapping[str, Any]]:
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        saved = read_checkpoint(path, get_backend("numpy"))
        while self._held and self._bytes(saved.arrays) + self._bytes_held() > self._limit:
            self._held.popitem(last=False)
        self._held[path] = LayerConfig.from_dict(saved.config), saved.arrays
        return self._held[path]

    def _bytes_held(self) -> int:
        return sum(self._bytes(arrays) for _, arrays in self._held.values())

    @staticmethod
    def _bytes(arrays: Mapping[str, Any]) -> int:
        return sum(array.nbytes for array in arrays.values())


def write_dense(plain: Plain, shard: Shard, rebuilt: Rebuilt, path: str, report: Report) -> None:
    """A shard whose experts are the rebuilt ones; keys, dtypes, shapes and order stay.

    Only what was quantized has the name and the dtype of a plain model.
    """
    entries = plain.entries(shard, ())

    def parts() -> Iterator[bytes]:
        yield plain.head(shard, entries)
        for each in entries:
            found = rebuilt.parts(each.name) if each.name in rebuilt else plain.parts(shard, each)
            for data in found:
                yield data
                report(len(data))

    write_whole(path, parts())


def copy_index(model: Model, path: str) -> None:
    """The model's index, as it is."""
    assert model.folder is not None
    assert model.index is not None
    with open_regular(os.path.join(model.folder, model.index)) as (file, _):
        write_whole(path, (file.read(),))


def write_index(
    plain: Plain,
    dropped: Collection[str],
    added: Mapping[str, CheckpointHeader],
    path: str,
    named: Callable[[str], str],
) -> None:
    """An index of the tensors that are kept, and of those of new files.

    Args:
        plain: the model.
        dropped: keys that are not kept.
        added: headers of the new files, by their path from the index.
        path: of the index.
        named: names of files by those of shards.
    """
    kept = [
        (named(shard.name), each)
        for shard in plain.model.shards
        for each in plain.entries(shard, dropped)
    ]
    places = {each.name: file for file, each in kept}
    size = sum(each.nbytes for _, each in kept)
    for name, header in added.items():
        places |= {header.prefix + key: name for key in header.arrays}
        size += sum(each.nbytes for each in header.arrays.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_whole(path, (json.dumps(index, indent=2).encode() + b"\n",))


def kept_name(name: str) -> str:
    """The name of a shard without experts; loaders take ``model.safetensors`` for all of it."""
    return f"model-rest{WEIGHTS_SUFFIX}" if name == f"model{WEIGHTS_SUFFIX}" else name


def side_files(model: Model) -> list[str]:
    """Names of the files that belong to a model besides its weights: config, tokenizer, license."""
    if model.folder is None:
        return []
    weights = (WEIGHTS_SUFFIX, INDEX_SUFFIX, *_OTHER_WEIGHTS)
    return sorted(
        entry.name
        for entry in os.scandir(model.folder)
        if entry.is_file()
        and entry.name != MANIFEST
        and not entry.name.endswith(weights)
        and not entry.name.endswith(tuple(f"{each}.index.json" for each in _OTHER_WEIGHTS))
    )

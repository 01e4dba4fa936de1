"""The files of a compression: their names, and all of them but the factors."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tensormoe.checkpoint import peek_checkpoint
from tensormoe.checkpoint._files import write_whole
from tensormoe.compression._config_file import CONFIG
from tensormoe.compression._folder import (
    README,
    config_bytes,
    plain_config,
    readme,
    whole_model,
)
from tensormoe.compression._groups import Group
from tensormoe.compression._plan import CompressionPlan
from tensormoe.compression._progress import Teller
from tensormoe.compression._resume import Work
from tensormoe.compression._shards import INDEX_SUFFIX, Model, Shard
from tensormoe.compression._write import (
    Plain,
    Rebuilt,
    copy_index,
    kept_name,
    side_files,
    write_dense,
    write_index,
    write_rest,
)
from tensormoe.errors import CheckpointError

EXPERTS = "experts"
"""The folder of the factors."""


def factor_files(plan: CompressionPlan) -> dict[str, str]:
    """A file name for the factors of each group, whatever its key."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for index, each in enumerate(plan.tried):
        name = each.group.name.removesuffix(".weight").replace(".*", "")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:120].strip(".") or "experts"
        if name.lower() in taken:
            name = f"{name}-{index}"
        taken.add(name.lower())
        found[each.group.name] = f"{name}.safetensors"
    return found


def write_model(plan: CompressionPlan, work: Work, files: Mapping[str, str], tell: Teller) -> None:
    """Every shard that is not there yet, and what belongs to the model besides."""
    model, dense = plan.model, plan.settings.dense
    plain = Plain(model, plan.quantized)
    count = _Count(tell, plan.output_bytes if dense else plan.kept_bytes)
    rebuilt = _rebuilt(plan, work, files) if dense else None
    for shard in model.shards:
        path = work.path(shard.name if dense else kept_name(shard.name))
        _write_shard(plain, shard, path, plan.expert_keys, rebuilt, count)
    tell("files", "", count.total, count.total)
    # a model whose weights are plain now is not to be read as a quantized one
    config = plain_config(model) if dense else None
    if not dense:
        _describe(plan, plain, work, files)
    elif model.index is not None and plan.quantized:
        write_index(plain, (), {}, work.path(model.index), str)
    elif model.index is not None:
        copy_index(model, work.path(model.index))
    if config is not None:
        write_whole(work.path(CONFIG), (config_bytes(config),))
    written = () if dense and config is None else (CONFIG,) if dense else (CONFIG, README)
    copy_side_files(model, work, written)


@dataclass(eq=False)
class _Count:
    """Bytes of tensors that are written, told to the callback.

    Args:
        tell: the callback.
        total: how many there will be.
        done: how many there are.
        name: of the file.
    """

    tell: Teller
    total: int
    done: int = 0
    name: str = ""

    def __call__(self, count: int) -> None:
        """Add bytes."""
        self.done += count
        self.tell("files", self.name, self.done, self.total)


def _rebuilt(plan: CompressionPlan, work: Work, files: Mapping[str, str]) -> Rebuilt:
    """Matrices of all experts; factors are held as far as the tensor that they came from was."""
    groups: dict[str, list[tuple[str, Group]]] = {}
    for each in plan.groups:
        for key in each.group.keys:
            made = work.path(EXPERTS, files[each.group.name]), each.group
            groups.setdefault(key, []).append(made)
    entries = (sum(group.entries for _, group in made) for made in groups.values())
    return Rebuilt(groups, 4 * max(entries))


def _write_shard(
    plain: Plain,
    shard: Shard,
    path: str,
    experts: Collection[str],
    rebuilt: Rebuilt | None,
    count: _Count,
) -> None:
    """Write a shard with rebuilt experts, or without experts, unless it is there or empty."""
    dropped = experts if rebuilt is None else ()
    sizes = [each.nbytes for each in plain.entries(shard, dropped)]
    done = count.done + sum(sizes)
    # a shard has its name when it is whole
    if sizes and not os.path.isfile(path):
        count.name = shard.name
        count(0)
        if rebuilt is None:
            write_rest(plain, shard, experts, path, count)
        else:
            write_dense(plain, shard, rebuilt, path, count)
    count.done = done


def _describe(plan: CompressionPlan, plain: Plain, work: Work, files: Mapping[str, str]) -> None:
    """Write the files that describe a factorized model: index, config, README."""
    model = plan.model
    headers = {
        f"{EXPERTS}/{files[each.group.name]}": peek_checkpoint(
            work.path(EXPERTS, files[each.group.name])
        )
        for each in plan.groups
    }
    configs = [
        (each.group, header.config)
        for each, header in zip(plan.groups, headers.values(), strict=True)
    ]
    kept = [key for key in plan.plain if key not in plan.expert_keys]
    bits = {each.group.name: work.done[each.group.name]["bits"] for each in plan.groups}
    whole = whole_model(model, configs, kept, bits)
    added = {} if whole.config is None else headers
    index = model.index or f"model{INDEX_SUFFIX}"
    write_index(plain, plan.expert_keys, added, work.path(index), kept_name)
    if whole.config is not None:
        write_whole(work.path(CONFIG), (config_bytes(whole.config),))
    before = plan.dense_entries
    after = sum(work.done[each.group.name]["parameters"] for each in plan.groups)
    names = {work.done[each.group.name]["factorization"]: None for each in plan.groups}
    rounded = sorted({each for each in bits.values() if each is not None})
    few = f", in part rounded to {' and '.join(map(str, rounded))} bits" if rounded else ""
    if len(rounded) == 1 and None not in bits.values():
        few = f", rounded to {rounded[0]} bits"
    summary = (
        f"Its experts are stored as factors ({', '.join(names)}): {after:,} parameters in place of "
        f"{before:,}{few}."
    )
    write_whole(work.path(README), (readme(model, whole, summary).encode(),))


def copy_side_files(model: Model, work: Work, written: Collection[str]) -> None:
    """Copy the files beside a model's weights, but those that were written anew.

    Raises:
        CheckpointError: one can't be read, or the folder can't be written.
    """
    for name in side_files(model):
        assert model.folder is not None
        if name not in written:
            _copy(os.path.join(model.folder, name), work.path(name))


def _copy(source: str, target: str) -> None:
    try:
        with open(source, "rb") as file:
            write_whole(target, iter(lambda: file.read(2**23), b""))
    except OSError as error:
        raise CheckpointError(f"{source!r} can't be read: {error.strerror or error}.") from error

"""The state of a healing in a file: parameters, AdamW's moments, and what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tensormoe._validation import brief
from tensormoe.checkpoint._files import write_whole
from tensormoe.checkpoint._safetensors import encode_frame
from tensormoe.compression._shards import Shard, open_shard
from tensormoe.errors import CheckpointError
from tensormoe_torch._sharded import gathered, is_sharded
from tensormoe_torch.compression._evaluate import Evaluation
from tensormoe_torch.compression._healing._processes import first_process
from tensormoe_torch.compression._healing._settings import Healing
from tensormoe_torch.compression._healing._tensors import code_of, read_tensor, tensor_bytes
from tensormoe_torch.compression._healing._trained import Trained

_KEY = "healing"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class State:
    """Contents of a file.

    Args:
        shard: the file.
        losses: of the steps that were made.
        tokens: that were predicted in them.
        before: the comparison before the first one.
        moves: steps of each parameter that had gradients.
    """

    shard: Shard
    losses: Sequence[float]
    tokens: int
    before: Evaluation | None
    moves: Mapping[str, float]

    @torch.no_grad()
    def restore(self, trained: Trained) -> None:
        """Give the parameters and the optimizer what the file holds."""
        for name, copy in trained.copies.items():
            copy.copy_(self._read(f"parameter.{name}", copy))
            if name in self.moves:
                moments = {each: self._read(f"{each}.{name}", copy) for each in _MOMENTS}
                moves = torch.tensor(self.moves[name])
                trained.optimizer.state[copy] = {"step": moves, **moments}
        trained.round()

    def _read(self, key: str, like: Tensor) -> Tensor:
        """A tensor in the manner of another: its device, and its part of it where it is cut."""
        whole = read_tensor(self.shard, self.shard.entries[key])
        if not is_sharded(like):
            return whole.to(like.device)
        from torch.distributed.tensor import distribute_tensor

        cut: Any = like
        mesh = cut.device_mesh
        return distribute_tensor(whole.to(mesh.device_type), mesh, cut.placements)


def write_state(
    path: str,
    trained: Trained,
    settings: Healing,
    losses: Sequence[float],
    tokens: int,
    before: Evaluation | None,
) -> None:
    """Write the state, whole or not at all; every process calls this, and the first one writes.

    Raises:
        CheckpointError: it can't be written.
    """
    arrays = dict(_arrays(trained))
    if first_process():
        values = {
            "settings": settings.to_dict(),
            "losses": [*losses],
            "tokens": tokens,
            "before": None if before is None else before.to_dict(),
            "moves": _moves(trained),
        }
        entries = (
            (key, code_of(each), tuple(each.shape), each.nbytes) for key, each in arrays.items()
        )
        head = encode_frame(entries, {_KEY: json.dumps(values)})
        write_whole(path, chain((head,), map(tensor_bytes, arrays.values())))
    if any(is_sharded(each) for each in trained.copies.values()):
        torch.distributed.barrier()


def read_state(path: str, trained: Trained, settings: Healing) -> State | None:
    """The state in a file; None if there is no file.

    Raises:
        CheckpointError: it is something else, or of another healing.
    """
    if not os.path.lexists(path):
        return None
    shard = open_shard(path)
    try:
        values = json.loads(shard.metadata[_KEY])
        found = values["settings"]
        before = values["before"] and Evaluation.from_dict(values["before"])
        state = State(shard, values["losses"], values["tokens"], before, values["moves"])
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path!r} must be the state of a healing; it is another file. Name a file that does "
            "not exist, to begin anew."
        ) from error
    wanted = settings.to_dict()
    if found != wanted:
        differing = [
            f"{key} was {brief(found.get(key))} and is {brief(wanted.get(key))}"
            for key in {**found, **wanted}
            if found.get(key) != wanted.get(key)
        ]
        raise CheckpointError(
            f"{path!r} holds the state of another healing: {'; '.join(differing)}. Repeat that "
            "one, or remove the file."
        )
    _check_shapes(path, shard, trained)
    return state


def _check_shapes(path: str, shard: Shard, trained: Trained) -> None:
    """Refuse a state of other parameters.

    Raises:
        CheckpointError: it is.
    """
    prefix = "parameter."
    there = {
        key.removeprefix(prefix): (each.shape, each.code)
        for key, each in shard.entries.items()
        if key.startswith(prefix)
    }
    here = {name: (tuple(each.shape), code_of(each)) for name, each in trained.copies.items()}
    if there != here:
        first = sorted(name for name in there.keys() | here if there.get(name) != here.get(name))[0]
        raise CheckpointError(
            f"{path!r} must hold the state of this model's parameters; {first!r} is "
            f"{there.get(first, 'missing')} there and {here.get(first, 'missing')} in the model. "
            "Name another file."
        )


def _arrays(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    for name, copy in trained.copies.items():
        yield f"parameter.{name}", _on_host(copy)
        state = trained.optimizer.state.get(copy, {})
        for each in _MOMENTS:
            if each in state:
                yield f"{each}.{name}", _on_host(state[each])


def _on_host(array: Tensor) -> Tensor:
    return gathered(array.detach()).cpu().contiguous()


def _moves(trained: Trained) -> dict[str, float]:
    states = {name: trained.optimizer.state.get(each) for name, each in trained.copies.items()}
    return {name: float(each["step"]) for name, each in states.items() if each}

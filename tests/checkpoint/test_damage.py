"""Files damaged or forged at random: they load as the format's own reader would, or say why not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tensormoe.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError
from tensormoe_numpy import BACKEND
from tests._checkpoint_files import CONFIG, names, plain, raw_file, some_arrays


def valid_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        save_checkpoint(path, "MuMoE", CONFIG, some_arrays())
        return path.read_bytes()


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` with some bytes changed, dropped, doubled or cut off, mostly in its header."""
    header = 8 + int.from_bytes(content[:8], "little")
    places = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
    token = st.binary(min_size=1, max_size=3) | st.sampled_from(
        [b'"', b"{", b"}", b"[", b"]", b",", b"0", b"-", b"9", b"1e9", b"null", b"\\u", b"\xed\xa0"]
    )
    edit = st.tuples(st.sampled_from(["put", "insert", "drop", "cut", "double"]), places, token)

    def apply(edits: list[tuple[str, int, bytes]]) -> bytes:
        damaged = content
        for kind, place, new in edits:
            before, after = damaged[:place], damaged[place:]
            damaged = {
                "put": before + new + after[len(new) :],
                "insert": before + new + after,
                "drop": before + after[len(new) :],
                "cut": before,
                "double": before + after[: 8 * len(new)] + after,
            }[kind]
        return damaged

    def resize(damaged: bytes) -> bytes:
        # as an attacker would: the length fits the header again, so that the JSON is reached
        length = len(damaged) - (len(content) - header) - 8
        return max(length, 0).to_bytes(8, "little") + damaged[8:]

    edited = st.lists(edit, min_size=1, max_size=4).map(apply)
    return edited | edited.map(resize)


@st.composite
def forged_files(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with values of its header replaced, removed or added: always sound JSON."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    numbers = st.integers(-1, 20) | st.sampled_from([48, 56, 2**31, 2**53, 2**63, 2**64, 10**30])
    values = plain | numbers | st.lists(numbers, max_size=3) | st.sampled_from(["F16", "I8", "2"])
    for _ in range(draw(st.integers(1, 3))):
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or draw(st.booleans()):
                match draw(st.sampled_from(["replace", "remove", "add"])):
                    case "replace":
                        node[key] = draw(values)
                    case "remove":
                        del node[key]
                    case _ if isinstance(node, dict):
                        node[draw(names)] = draw(values)
                    case _:
                        node.append(draw(values))
                break
            node = node[key]
    return raw_file(json.dumps(header), content[start:])


@settings(max_examples=2000)
@given(content=st.deferred(lambda: damaged_bytes(valid_file()) | forged_files(valid_file())))
def test_damaged_files_load_or_say_why(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        path.write_bytes(content)
        loaded, message = None, ""
        try:
            loaded = read_checkpoint(path, BACKEND)
        except CheckpointError as error:
            message = str(error)
    event("loaded" if loaded else "refused: " + message.partition(": ")[2][:24])
    if loaded is None:
        assert str(path) in message
        message.encode()  # can be printed
        return
    assert isinstance(loaded, Checkpoint)
    # never laxer than the format's own reader, which must find the same arrays
    judged = dict(safetensors.deserialize(content))
    assert judged.keys() == loaded.arrays.keys()
    for name, array in loaded.arrays.items():
        assert tuple(judged[name]["shape"]) == array.shape
        assert bytes(judged[name]["data"]) == array.tobytes()

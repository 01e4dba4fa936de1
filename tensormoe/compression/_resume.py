"""A folder that is built beside its final name, and a journal of what is in it.

All work goes to ``OUT.tensormoe-partial``; the last step renames it to ``OUT``. The journal's first
line is the command, every other one a group that is done. A command that was killed is continued by
the same one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tensormoe._validation import brief
from tensormoe.checkpoint._files import PARTIAL_SUFFIX, checkpoint_path, sync_folder, write_whole
from tensormoe.checkpoint._safetensors import canonical_json
from tensormoe.errors import CheckpointError

MANIFEST = "tensormoe.json"
"""Name of the file that says what a compressed model consists of; it is written last."""

_JOURNAL = ".tensormoe-journal"
_LOCK = ".tensormoe-lock"


@dataclass(frozen=True, eq=False)
class Work:
    """A folder in the making.

    Args:
        target: its final name.
        folder: where it is built.
        done: what was recorded of each group, by name.
        manifest: what :data:`MANIFEST` holds if it was written; then nothing is left to do.
    """

    target: str
    folder: str
    done: dict[str, Mapping[str, Any]]
    manifest: Mapping[str, Any] | None

    def path(self, *parts: str) -> str:
        """A path in the folder, whose own folder exists."""
        found = os.path.join(self.folder, *parts)
        _make(os.path.dirname(found))
        return found

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Note that a group is done; its files must have reached the disk.

        Raises:
            CheckpointError: the disk is full.
        """
        line = canonical_json({"group": name, "report": dict(values)})
        path = os.path.join(self.folder, _JOURNAL)
        try:
            with open(path, "ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(_unwritable(path, error)) from error
        self.done[name] = values

    def finish(self, manifest: Mapping[str, Any], temporary: str | None) -> None:
        """Write the manifest, drop what was only needed on the way, and give the final name.

        Args:
            manifest: plain values; not written again if it is there.
            temporary: a folder to drop, if any.

        Raises:
            CheckpointError: the folder can't be written.
        """
        if self.manifest is None:
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            write_whole(self.path(MANIFEST), (text.encode(),))
        if self.folder == self.target:
            return
        try:
            if temporary is not None and os.path.isdir(os.path.join(self.folder, temporary)):
                shutil.rmtree(os.path.join(self.folder, temporary))
            for name in (_JOURNAL, _LOCK):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.folder, name))
            with suppress(FileNotFoundError):
                os.rmdir(self.target)
            os.rename(self.folder, self.target)
        except OSError as error:
            raise CheckpointError(_unwritable(self.target, error)) from error
        sync_folder(os.path.dirname(self.target))


@contextmanager
def open_work(output: str | os.PathLike[str], command: Mapping[str, Any]) -> Iterator[Work]:
    """The folder of a command: a new one, one that was left unfinished, or one that is whole.

    Args:
        output: the folder's final name; nothing, an empty folder, or what this command made.
        command: plain values that decide what is in it.

    Raises:
        TypeError: ``output`` is neither a string nor a path.
        CheckpointError: something else is there, or another process is at work on it.
    """
    target = os.path.abspath(checkpoint_path(output))
    folder = target + PARTIAL_SUFFIX
    plain = json.loads(canonical_json(dict(command)))
    manifest = _manifest(target)
    if manifest is not None:
        _check_same(target, manifest.get("command"), plain)
        yield Work(target, target, {}, manifest)
        return
    if os.path.lexists(target) and not _empty(target):
        raise CheckpointError(
            f"the output must be a new folder; {target!r} exists. Choose another name or remove it."
        )
    _make(folder)
    with _locked(folder):
        _remove_leftovers(folder)
        done = _journal(folder, plain)
        try:
            yield Work(target, folder, done, _manifest(folder))
        except (Exception, KeyboardInterrupt):
            # what failed before anything was done leaves nothing that a corrected command meets
            if not done and not _files(folder) - {_JOURNAL, _LOCK}:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _manifest(folder: str) -> Mapping[str, Any] | None:
    """Contents of a folder's manifest, if it has one of ours."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "command" in found else None


def _journal(folder: str, command: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The groups that are done; starts the journal of a new folder."""
    path = os.path.join(folder, _JOURNAL)
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        manifest = _manifest(folder)
        if manifest is not None:
            _check_same(folder, manifest["command"], command)
            return {}
        if _files(folder) - {_LOCK}:
            raise CheckpointError(
                f"{folder!r} must be what a compression left; it has no journal. Remove it."
            ) from None
        write_whole(path, (canonical_json({"command": command}).encode() + b"\n",))
        return {}
    except OSError as error:
        raise CheckpointError(f"{path!r} can't be read: {error.strerror or error}.") from error
    try:
        # the last line is empty, or was cut by a kill
        first, *rest = [json.loads(line) for line in lines[:-1]]
        done = {each["group"]: each["report"] for each in rest}
        started = first["command"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path!r} is damaged: {brief(lines[0])}. Remove the folder to start anew."
        ) from None
    _check_same(folder, started, command)
    if lines[-1]:
        with open(path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
    return done


def _check_same(folder: str, started: Any, command: Mapping[str, Any]) -> None:
    """Refuse a folder of another command.

    Raises:
        CheckpointError: it is of another one; the message says what differs.
    """
    before = started if isinstance(started, dict) else {}
    differing = [
        f"{key} was {brief(before.get(key))} and is {brief(command.get(key))}"
        for key in {**before, **command}
        if before.get(key) != command.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{folder!r} holds another command's output: {'; '.join(differing)}. Repeat that "
            "command, choose another output, or remove the folder."
        )


def _files(folder: str) -> set[str]:
    """Names of all files in a folder and those in it."""
    return {name for _, _, names in os.walk(folder) for name in names}


def _remove_leftovers(folder: str) -> None:
    """Remove files that were not written to their end, and folders for them."""
    for place, folders, names in os.walk(folder):
        for name in folders:
            if name.endswith(PARTIAL_SUFFIX):
                shutil.rmtree(os.path.join(place, name), ignore_errors=True)
        for name in names:
            if name.endswith(PARTIAL_SUFFIX):
                with suppress(OSError):
                    os.unlink(os.path.join(place, name))


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keep other processes out; a killed one lets go by itself."""
    path = os.path.join(folder, _LOCK)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise CheckpointError(_unwritable(path, error)) from error
    try:
        try:
            import fcntl
        except ImportError:
            # Windows has no such locks: there it is up to the user
            pass
        else:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(
                    f"another process is at work in {folder!r}. Wait for it to end."
                ) from None
        yield
    finally:
        os.close(handle)


def _make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise CheckpointError(_unwritable(folder, error)) from error


def _empty(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)


def _unwritable(path: str, error: OSError) -> str:
    return (
        f"{path!r} could not be written: {error.strerror or error}. Free some space or choose "
        "another path; the same command continues from here."
    )

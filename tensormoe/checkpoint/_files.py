"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tensormoe.errors import CheckpointError

PARTIAL_SUFFIX = ".tensormoe-partial"
"""End of a file's name while it is being written."""


def checkpoint_path(path: str | os.PathLike[str]) -> str:
    """``path`` as a string.

    Raises:
        TypeError: neither a string nor a path.
        CheckpointError: a name that no checkpoint has.
    """
    try:
        name = os.fspath(path)
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise TypeError(f"path must be a str or an os.PathLike of str; got {path!r}.")
    if "\0" in name:
        raise CheckpointError(f"path must not hold a null character; got {name!r}.")
    try:
        os.fsencode(name)
    except UnicodeError:
        raise CheckpointError(
            f"path must be text that file names can have; got {name!r}."
        ) from None
    if name.endswith(PARTIAL_SUFFIX):
        raise CheckpointError(
            f"path must not end in {PARTIAL_SUFFIX!r}; got {name!r}. Such files are what a save "
            "that was killed leaves behind: the next save of the same path removes them, or "
            "delete them when no save is running."
        )
    return name


@contextmanager
def open_regular(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """The file, open for reading, and its size in bytes.

    Raises:
        CheckpointError: not a regular file, or one that can't be read; also for what the operating
            system reports while the file is open.
    """
    try:
        # looked at before it is opened: opening a named pipe would wait for ever
        _check_regular(path, os.stat(path))
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(
            f"path must name an existing checkpoint; there is none at {path!r}."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path!r} can't be read: {error.strerror or error}.") from error


def write_whole(path: str, parts: Iterable[bytes]) -> None:
    """Write ``parts`` one after the other so that ``path`` is the old file or all of the new one.

    The bytes go to a file of another name in the same folder, reach the disk, and take the name
    over in one step. A link is followed: the file that it points to is replaced. Files that killed
    saves of ``path`` left behind are removed.

    Raises:
        CheckpointError: the folder or the file can't be written; the old file is as it was.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    try:
        if not os.path.isdir(folder):
            raise CheckpointError(
                f"the folder of a checkpoint must exist; {folder!r} does not. Create it first."
            )
        with suppress(FileNotFoundError):
            _check_regular(path, os.stat(target))
        _remove_partials(folder, name)
        with _new_partial(folder, name) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            # there is no old file, or the file system knows no permissions
            with suppress(OSError):
                os.chmod(file.name, stat.S_IMODE(os.stat(target).st_mode))
            if os.name != "posix":
                # elsewhere files that are open keep their names
                file.close()
            os.replace(file.name, target)
    except OSError as error:
        raise CheckpointError(
            f"{path!r} could not be written: {error.strerror or error}. What was there before is "
            "unchanged. Free some space or choose another path."
        ) from error
    sync_folder(folder)


@contextmanager
def _new_partial(folder: str, name: str) -> Iterator[IO[bytes]]:
    """A file that nobody else writes to, locked while it is open; removed if the block fails."""
    while True:
        partial = os.path.join(folder, _partial_stem(name) + os.urandom(8).hex() + PARTIAL_SUFFIX)
        file = open(partial, "xb")  # noqa: SIM115
        # until it was locked, it looked like one whose writer is dead
        if _lock(file) is not False and os.fstat(file.fileno()).st_nlink:
            break
        file.close()
        with suppress(OSError):
            os.unlink(partial)
    try:
        with file:
            yield file
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def _remove_partials(folder: str, name: str) -> None:
    """Remove partial files of saves of ``name`` whose process is dead."""
    stem = _partial_stem(name)
    pattern = re.compile(f"{re.escape(stem)}[0-9a-f]{{16}}{re.escape(PARTIAL_SUFFIX)}")
    for entry in filter(pattern.fullmatch, os.listdir(folder)):
        path = os.path.join(folder, entry)
        # gone by now, or somebody else's
        with suppress(OSError):
            if os.name != "posix":
                # the system removes no file that is open
                os.unlink(path)
                continue
            with open(path, "rb") as file:
                if _lock(file):
                    os.unlink(path)


def _partial_stem(name: str) -> str:
    # cut to a length that fits wherever the name itself does
    return f".{name[:40]}."


def _lock(file: IO[bytes]) -> bool | None:
    """Lock a file until it is closed or its process dies.

    Returns:
        False if another process has it, None where locks are unknown.
    """
    if os.name != "posix":
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # a file system without locks
        return None
    return True


def _check_regular(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise CheckpointError(f"path must name a file; {path!r} is {kind}.")


def sync_folder(folder: str) -> None:
    """Make the new name survive a power cut, where the system can."""
    # some file systems and Windows can't; the file is whole under either name all the same
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

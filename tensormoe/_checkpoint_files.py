"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from tensormoe.errors import CheckpointError

__all__ = ["PARTIAL_SUFFIX", "checkpoint_path", "open_regular", "sync_folder", "write_whole"]

PARTIAL_SUFFIX = ".tensormoe-partial"


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
    if name.endswith(PARTIAL_SUFFIX):
        raise CheckpointError(
            f"path must not end in {PARTIAL_SUFFIX!r}; got {name!r}. Such files are what a save "
            "that was killed leaves behind: delete them when no save is running."
        )
    return name


@contextmanager
def open_regular(path: str) -> Iterator[tuple[IO[bytes], int]]:
    """The file, open for reading, and its size in bytes.

    Raises:
        CheckpointError: no regular file, or one that can't be read; also for what the operating
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
    over in one step. A link is followed: the file that it points to is replaced.

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
        # cut to a length that fits wherever the name itself does; never shared by two saves
        partial = os.path.join(folder, f".{name[:40]}.{os.urandom(8).hex()}{PARTIAL_SUFFIX}")
        try:
            with open(partial, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            # there is no old file, or the file system knows no permissions
            with suppress(OSError):
                os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))
            os.replace(partial, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{path!r} could not be written: {error.strerror or error}. What was there before is "
            "unchanged. Make room or choose another path."
        ) from error
    sync_folder(folder)


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

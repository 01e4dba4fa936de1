"""Pictures and other small files: checked before the work, whole or not at all after it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tensormoe.errors import SpecError

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The path of a picture, checked before anything is computed for it.

    Args:
        path: of the picture.
        name: what errors call it.

    Raises:
        SpecError: an extension that no picture is written in, or a folder that can't be written.
    """
    target = Path(path)
    if "\0" in str(path):
        raise SpecError(f"{name} must not hold a null character; got {str(path)!r}.")
    if target.suffix.lower() not in PICTURE_SUFFIXES:
        listed = ", ".join(PICTURE_SUFFIXES)
        raise SpecError(f"{name} must end in one of {listed}; got {str(path)!r}. Rename the file.")
    if not os.path.isdir(target.parent):
        raise SpecError(
            f"the folder of {name} must exist; {str(target.parent)!r} does not. Create it first."
        )
    if os.path.isdir(target) or not os.access(target.parent, os.W_OK):
        raise SpecError(f"{name} must be a file that can be written; {str(path)!r} is not.")
    return target


def make_folder(name: str | Path) -> Path:
    """A folder to write to, made if it is missing.

    Raises:
        SpecError: it can't be made or written.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(
            f"{str(path)!r} can't be made a folder: {error.strerror}. Choose another one."
        ) from None
    if not os.access(path, os.W_OK):
        raise SpecError(f"{str(path)!r} can't be written. Choose another folder.")
    return path


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is the old one or all of the new one.

    Raises:
        SpecError: it can't be written; what was there before is unchanged.
    """
    partial = path.with_name(f".{path.name[:40]}.{os.urandom(8).hex()}.partial")
    try:
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise SpecError(
            f"{str(path)!r} could not be written: {error.strerror}. Choose another path."
        ) from None

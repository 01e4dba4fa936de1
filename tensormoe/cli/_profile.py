"""The device that times are predicted for: a published profile, or this machine as measured."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from tensormoe._extras import require
from tensormoe._files import make_folder, write_file
from tensormoe.errors import PlanError, SpecError
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline

THIS_MACHINE = "this machine"
DEVICES = ("this", *PUBLISHED_ROOFLINES)
_DEFAULT = "cpu"


def profile_path() -> Path:
    """Path of the measured profile, in the user's config folder."""
    require("a measured profile", ("platformdirs",), "cli")
    from platformdirs import user_config_path

    return user_config_path("tensormoe", appauthor=False) / "roofline.json"


def save_profile(roofline: Roofline) -> Path:
    """Keep a profile for later commands; a crash leaves the old one.

    Raises:
        SpecError: the config folder can't be written.
    """
    path = profile_path()
    make_folder(path.parent)
    write_file(path, (json.dumps(roofline.to_dict(), indent=2) + "\n").encode())
    return path


def resolve_device(name: str | None) -> Roofline:
    """A published profile by name, ``this`` machine's, or by default the best that there is.

    Raises:
        SpecError: an unknown name, or a measured profile that is missing or can't be read.
    """
    if name is not None and name not in DEVICES:
        raise SpecError(f"--device must be one of {', '.join(DEVICES)}; got {name!r}.")
    if name not in (None, "this"):
        return PUBLISHED_ROOFLINES[name]
    if name is None and find_spec("platformdirs") is None:
        # --json works with the core alone
        return PUBLISHED_ROOFLINES[_DEFAULT]
    path = profile_path()
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        if name is None:
            return PUBLISHED_ROOFLINES[_DEFAULT]
        raise SpecError(
            "--device this must have been measured, and has not been. Run: tensormoe calibrate"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(_unreadable(path, str(error))) from None
    try:
        return Roofline.from_dict(json.loads(text))
    except (json.JSONDecodeError, PlanError) as error:
        raise SpecError(_unreadable(path, str(error))) from None


def _unreadable(path: Path, reason: str) -> str:
    return (
        f"the profile at {str(path)!r} can't be used: {reason} Run tensormoe calibrate again, or "
        "pass --device cpu."
    )

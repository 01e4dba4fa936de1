"""The device that times are predicted for: a published profile, or this machine as measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensormoe._extras import require
from tensormoe._files import make_folder, write_file
from tensormoe.cli._benches import BENCHES, threads_now
from tensormoe.errors import PlanError, SpecError
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline

THIS_MACHINE = "this machine"
THIS = "this"
MEASURED = (THIS, *(f"{THIS}-{library}" for library in BENCHES))
"""Names of this machine: ``this-torch`` is it with one of its libraries."""
DEVICES = (*MEASURED, *PUBLISHED_ROOFLINES)
"""Names of devices."""
_DEFAULT = "cpu"
_PROFILES = "profiles"
# a file of the form that had one profile does not say of which library
_UNNAMED = "unnamed"


def profile_path() -> Path:
    """Path of the measured profiles, in the user's config folder."""
    require("a measured profile", ("platformdirs",), "cli")
    from platformdirs import user_config_path

    return user_config_path("tensormoe", appauthor=False) / "roofline.json"


def save_profile(library: str, roofline: Roofline) -> Path:
    """Keep a library's profile beside those of others; a crash leaves the old file.

    A file that can't be read, or is of the form without libraries, is replaced.

    Raises:
        SpecError: the config folder can't be written.
    """
    path = profile_path()
    try:
        known = _read(path)
    except (OSError, ValueError, PlanError):
        known = {}
    kept = {name: each for name, each in known.items() if name in BENCHES}
    kept[library] = roofline
    values = {_PROFILES: {name: kept[name].to_dict() for name in BENCHES if name in kept}}
    make_folder(path.parent)
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())
    return path


def resolve_device(name: str | None) -> Roofline:
    """A published profile by name, this machine's, or by default the best that there is.

    Args:
        name: of a published profile; ``this`` for the only measured one; ``this-torch`` for that of
            a library. None for a measured one that fits the environment, NumPy's before others',
            or else ``cpu``.

    Raises:
        SpecError: an unknown name, or a measured profile that is missing, can't be read, is one of
            several, or was measured with another number of threads.
    """
    if name is not None and name not in DEVICES:
        raise SpecError(f"--device must be one of {', '.join(DEVICES)}; got {name!r}.")
    if name is not None and name in PUBLISHED_ROOFLINES:
        return PUBLISHED_ROOFLINES[name]
    if name is None and find_spec("platformdirs") is None:
        # --json works with the core alone
        return PUBLISHED_ROOFLINES[_DEFAULT]
    known = _measured()
    if name is None:
        fit = [each for library, each in known.items() if _other_threads(library, each) is None]
        return fit[0] if fit else PUBLISHED_ROOFLINES[_DEFAULT]
    return _one(name, known)


def measured_devices() -> tuple[str, ...]:
    """Names of this machine's profiles that can be used now, NumPy's first."""
    if find_spec("platformdirs") is None:
        return ()
    try:
        known = _measured()
    except SpecError:
        return ()
    fit = [library for library, each in known.items() if _other_threads(library, each) is None]
    return (THIS,) if len(known) == 1 and fit else tuple(f"{THIS}-{each}" for each in fit)


def _one(name: str, known: Mapping[str, Roofline]) -> Roofline:
    """The measured profile of a name."""
    if not known:
        raise SpecError(
            f"--device {name} must have been measured, and has not been. Run: tensormoe calibrate"
        )
    library = name.removeprefix(f"{THIS}-")
    if name == THIS:
        if len(known) > 1:
            named = " or ".join(f"{THIS}-{each}" for each in known)
            raise SpecError(
                f"--device {THIS} must be one profile; got those of {', '.join(known)}. "
                f"Pass --device {named}."
            )
        (library,) = known
    if library not in known:
        raise SpecError(
            f"--device {name} must have been measured; got profiles of {', '.join(known)} alone. "
            f"Run: tensormoe calibrate --backend {library}"
        )
    now = _other_threads(library, known[library])
    if now is not None:
        raise SpecError(
            f"--device {name} must have been measured with as many threads as {library} now has, "
            f"{now}; got a profile of {known[library].threads}. Run tensormoe calibrate --backend "
            f"{library} again, or set OMP_NUM_THREADS."
        )
    return known[library]


def _other_threads(library: str, roofline: Roofline) -> int | None:
    """The number of threads that a library now has, if a profile was measured with another."""
    if roofline.threads is None or library not in BENCHES:
        return None
    now = threads_now(library)
    return None if now == roofline.threads else now


def _measured() -> dict[str, Roofline]:
    """This machine's profiles by library; none without a file."""
    path = profile_path()
    try:
        return _read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, PlanError) as error:
        raise SpecError(
            f"the profile at {str(path)!r} can't be used: {error} Run tensormoe calibrate again, "
            "or pass --device cpu."
        ) from None


def _read(path: Path) -> dict[str, Roofline]:
    """The profiles of a file, NumPy's first."""
    values: Any = json.loads(path.read_text("utf-8"))
    if not isinstance(values, Mapping) or _PROFILES not in values:
        return {_UNNAMED: Roofline.from_dict(values)}
    listed = values[_PROFILES]
    if not isinstance(listed, Mapping) or not set(listed) <= set(BENCHES):
        raise ValueError(f"profiles must be those of {', '.join(BENCHES)}.")
    return {name: Roofline.from_dict(listed[name]) for name in BENCHES if name in listed}

"""Call functions with invalid arguments, one number per line; report what is wrong with each."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax

from tensormoe.errors import TensormoeError
from tests.fuzz._doors import at

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("tensormoe", "backends"))
SECONDS = 5


class _TooLongError(BaseException):
    """A call exceeds the time limit; the library does not catch it."""


def _stop(*_: Any) -> None:
    raise _TooLongError


def judge(index: int) -> str | None:
    """Make the call of a number; return what is wrong, or None."""
    door, name, value = at(index)
    arguments = door.arguments()
    arguments[name] = value
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        door.call(**arguments)
    except _TooLongError:
        return f"took more than {SECONDS} s"
    except TensormoeError as error:
        return None if str(error).strip() else f"{type(error).__name__} without a message"
    except (MemoryError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return None if _is_ours(error) else _shown(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _is_ours(error: Exception) -> bool:
    """Whether a TypeError or ValueError says something that was meant for the caller."""
    if isinstance(error, jax.errors.JAXTypeError):
        # what JAX says of arrays that are still traced is about them, wherever it comes up
        return True
    if type(error) not in (TypeError, ValueError) or not str(error).strip():
        return False
    # what is raised by our own code, or by Python where names or numbers of arguments are wrong
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if last.filename.endswith("_junk.py"):
        # a value that fails by itself
        return True
    explicit = last.filename.startswith(OURS) and (last.line or "").lstrip().startswith("raise ")
    # functions that users give may not take what they get
    signature = type(error) is TypeError and "argument" in str(error)
    return explicit or (signature and (len(frames) <= 3 or last.filename.startswith(OURS)))


def _shown(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGALRM, _stop)
    # what asks for more than there is fails, and takes nothing from others
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for line in sys.stdin:
            try:
                wrong = judge(int(line))
            except BaseException as error:
                wrong = f"the call ended with {type(error).__name__}: {error}"
            answers.write(json.dumps(wrong) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()

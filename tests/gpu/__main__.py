"""Run the tests of every library on the GPU, each in its own process, and print a table.

Usage: python tests/gpu [torch] [jax] [cupy]; ``TENSORMOE_TEST_DEVICE=cpu`` tries the tests
themselves without a GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from _driver import devices
from _table import Results, read, table

TESTS = Path(__file__).resolve().parents[1]
FILES = {
    "torch": ("gpu/on_torch.py",),
    "jax": ("gpu/on_jax.py",),
    "cupy": (
        "gpu/on_cupy.py",
        "cupy/test_backend.py",
        "cupy/test_layers.py",
        "cupy/test_one_layer.py",
        "cupy/test_training.py",
        "cupy/test_bad_input.py",
    ),
}

# a library that cannot use the GPU must fail, and not fall back to the CPU; nothing rounds products
SETTINGS = {
    "CUPY_TF32": "0",
    "HYPOTHESIS_PROFILE": "ci",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_ENABLE_X64": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}

SECONDS_TO_REPORT = 8.0
"""A call into a library goes on when pytest is interrupted."""


def main(arguments: list[str]) -> int:
    """0 if all passed, 1 if not, 2 where there is no GPU."""
    unknown = set(arguments) - set(FILES)
    if unknown:
        print(f"libraries must be of {', '.join(FILES)}; got {', '.join(sorted(unknown))}.")
        return 1
    device = os.environ.setdefault("TENSORMOE_TEST_DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        print(f"TENSORMOE_TEST_DEVICE must be cuda or cpu; got {device!r}.")
        return 1
    if device == "cuda":
        found, instead = devices()
        if not found:
            print(f"no NVIDIA GPU: {instead}. Nothing was tested.", file=sys.stderr)
            return 2
    results = {}
    for library in arguments or FILES:
        print(f"== {library} on {device}", flush=True)
        results[library] = run(library, device)
    print(table(results))
    return 0 if all(each.fine for each in results.values()) else 1


def run(library: str, device: str, seconds: float | None = None) -> Results:
    """Run one library's tests; their output goes where ours goes.

    Args:
        library: its name.
        device: "cuda" or "cpu".
        seconds: until pytest is interrupted, which then reports the tests that have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # other people's warnings say nothing about the device; ours are errors in the usual tests
        command += ["-W", "default", f"--confcutdir={TESTS}", f"--junitxml={report}"]
        command += [str(TESTS / name) for name in FILES[library]]
        # choosing the fastest kernel of each product takes longer than all of them
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        settings = SETTINGS | {"JAX_PLATFORMS": device, "XLA_FLAGS": flags.strip()}
        started = subprocess.Popen(
            command,
            env=os.environ | settings,
            cwd=TESTS.parent,
            # a shell's background jobs ignore interrupts, and so do their children unless told
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        with started as tests:
            unfinished = not _ended(tests, seconds)
            if unfinished:
                tests.send_signal(signal.SIGINT)
                if not _ended(tests, SECONDS_TO_REPORT):
                    tests.kill()
            code = tests.wait()
        if not report.exists():
            return Results(code, unfinished=unfinished)
        return read(report, code, unfinished)


def _ended(tests: subprocess.Popen[bytes], seconds: float | None) -> bool:
    try:
        tests.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

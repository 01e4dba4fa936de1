"""Contract suites and speed on an NVIDIA GPU, in eight minutes and one Markdown file.

Every part runs in a process of its own with a deadline. One that fails or takes too long is
reported as such, and the rest goes on. `make gpu-report` makes the environment first;
`--tiny --device cpu` tries the report itself on a machine without a GPU.

    python benchmarks/gpu_report.py --out out/gpu-report.md
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import monotonic

from _gpu_markdown import failures, report
from _gpu_parts import SCHEDULE, Part, run_all

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "gpu"))

from _driver import devices  # noqa: E402

SECONDS = 465.0
PACKAGES = (
    "tensormoe",
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numpy",
    "opt_einsum",
    "entmax",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
# others that may change times are in the report
NAMED = ("XLA_FLAGS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS")
# of each property: XLA compiles every operation of every example anew
JAX_EXAMPLES = 6
# one test of each group, for a trial
A_FEW = "device or the_adapter or routing or explicit or (blocks and relu-float32)"
# of nvidia-smi, and what stands before each value
ASKED = {
    "name": "",
    "driver_version": "driver",
    "power.limit": "power limit",
    "clocks.max.sm": "clock up to",
    "memory.used": "in use before",
    "utilization.gpu": "busy before",
}
# a setting of the caller's must not change what the rows say
REMOVED = (
    "CUPY_TF32",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_COMPILATION_CACHE_DIR",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUDA_LAUNCH_BLOCKING",
)


def main(
    arguments: Sequence[str] | None = None, schedule: Sequence[Sequence[Part]] = SCHEDULE
) -> int:
    """0 if nothing failed, 1 if something did, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the report itself")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-report.md")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu tries the report itself; it needs --tiny.")
    names: list[str] = []
    if options.device == "cuda":
        names, instead = devices()
        if not names:
            print(f"no NVIDIA GPU: {instead}. Nothing was run.", file=sys.stderr)
            return 2
    begin = monotonic()
    out = options.out.resolve()
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rooflines.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        environment = _environment(options.device, options.tiny, cache)
        facts = _facts(options.device, names, environment)
        outcomes = run_all(
            schedule,
            options.seconds,
            folder,
            [f"--device={options.device}", *(["--tiny"] if options.tiny else [])],
            environment,
            lambda line: print(line, flush=True),
        )
    title = "tensormoe on a GPU" if options.device == "cuda" else "a trial run, not on a GPU"
    out.write_text(report(title, facts, outcomes, monotonic() - begin), encoding="utf-8")
    failed = list(failures(outcomes))
    for what, why in failed:
        print(f"failed: {what}: {why}", file=sys.stderr)
    print(f"{out}; logs are in {folder}")
    return 1 if failed else 0


def _environment(device: str, tiny: bool, cache: str) -> dict[str, str]:
    """Variables of every part: one GPU, no rounding that a row does not name, empty caches."""
    found = {name: value for name, value in os.environ.items() if name not in REMOVED}
    path = [str(ROOT), str(ROOT / "backends"), *filter(None, [found.get("PYTHONPATH")])]
    found |= {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TENSORMOE_TEST_DEVICE": device,
        "JAX_PLATFORMS": device,
        # other parts, and programs of others, need memory too
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TRITON_CACHE_DIR": str(Path(cache, "triton")),
        "KINETO_LOG_LEVEL": "9",
    }
    if device == "cuda":
        # with several, JAX runs the loops of a gate differently
        found["CUDA_VISIBLE_DEVICES"] = found.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    found["TENSORMOE_TEST_JAX_EXAMPLES"] = "1" if tiny else str(JAX_EXAMPLES)
    if tiny:
        found["PYTEST_ADDOPTS"] = f"-k '{A_FEW}'"
    return found


def _facts(device: str, names: Sequence[str], environment: Mapping[str, str]) -> dict[str, object]:
    """Date, versions and machine."""
    found: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        "commit": next(iter(_said("git", "-C", str(ROOT), "describe", "--always", "--dirty")), "?"),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "examples per property, JAX": environment["TENSORMOE_TEST_JAX_EXAMPLES"],
    }
    if device == "cuda":
        found["GPUs of this machine"] = ", ".join(names)
        found["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"]
        query = f"--query-gpu={','.join(ASKED)}"
        # in the order of the bus, which is not CUDA's
        lines = _said("nvidia-smi", query, "--format=csv,noheader")
        for place, line in enumerate(lines):
            values = zip(ASKED.values(), line.split(","), strict=False)
            found[f"nvidia-smi, {place}"] = ", ".join(f"{name}{value}" for name, value in values)
        if not lines:
            found["nvidia-smi"] = "gave no answer: the driver's version is not known"
    found |= {name: environment[name] for name in NAMED if name in environment}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _said(*command: str) -> list[str]:
    """The lines that a program prints; none if it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else done.stdout.strip().splitlines()


if __name__ == "__main__":
    # what is running ends too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

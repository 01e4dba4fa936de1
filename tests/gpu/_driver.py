"""Which GPUs NVIDIA's driver has, asked without any array library: before one is installed."""

from __future__ import annotations

import ctypes
import sys


def devices() -> tuple[list[str], str]:
    """Names of the GPUs, and what was found instead if there are none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return [], f"no driver: {name} was not found"
    code = driver.cuInit(0)
    if code:
        return [], f"a driver that does not start: cuInit gave error {code}"
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for place in range(count.value):
        device, text = ctypes.c_int(0), ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), place)
        driver.cuDeviceGetName(text, len(text), device)
        found.append(text.value.decode())
    return found, "" if found else "a driver without a device"


def main() -> int:
    """Print the devices; 2 where there is none."""
    found, instead = devices()
    if not found:
        print(
            "make test-gpu and make gpu-report need a machine with an NVIDIA GPU and its driver; "
            f"got {instead}. Nothing was installed or run.",
            file=sys.stderr,
        )
        return 2
    print(f"found {', '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""This machine and what runs on it: processor, memory, versions, the checkout's commit."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx


def provenance() -> dict[str, Any]:
    """Return what every result carries: the commit, the machine and the versions."""
    return {"commit": commit(), "machine": description(), "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("mlx-distill", "mlx", "mlx-lm", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def description() -> dict[str, Any]:
    """Return what a result has to say about its machine; memory in bytes."""
    device = mx.default_device()
    info = mx.device_info() if device == mx.Device(mx.gpu) else {}
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": info.get("device_name") or _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "device": str(device.type).rpartition(".")[2],
    }


def commit() -> str | None:
    """Return the commit of the checkout that runs, None if it is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some repository around us
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_resident_bytes() -> int:
    """Return the most memory this process has held; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""This machine and what runs on it: processor, memory, versions, the checkout's commit."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

# What pmset calls the setting that slows a Mac down, or lets it be loud.
POWER_MODES = ("lowpowermode", "powermode", "highpowermode")


def provenance() -> dict[str, Any]:
    """Return what every result carries: the commit, the machine and the versions."""
    state = {"os": operating_system(), "power": power()}
    return {"commit": commit(), "machine": description() | state, "versions": versions()}


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("mlx-distill", "mlx", "mlx-lm", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    """Return a package's version; a checkout that is only on the path has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


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


def operating_system() -> str:
    """Return the system's name and version, as its users know them."""
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else platform.platform(terse=True)


def power() -> str | None:
    """Return what a Mac draws its power from, and its power mode; None elsewhere."""
    if sys.platform != "darwin":
        return None
    try:
        source = _output("pmset", "-g", "batt").splitlines()[:1]
        settings = [line.split()[:2] for line in _output("pmset", "-g").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return None
    modes = [" ".join(words) for words in settings if words and words[0] in POWER_MODES]
    named = [line.rpartition("from ")[2].strip("'") for line in source]
    return ", ".join([*named, *modes]) or None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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

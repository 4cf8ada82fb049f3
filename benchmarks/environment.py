"""Which machine a number is from: device, driver and versions."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

UNKNOWN = "unknown"
PACKAGE = Path(__file__).resolve().parents[1] / "resu_compile"


@functools.cache
def environment() -> dict[str, str]:
    """Device, driver and versions of this process, each a string; "" where there is none."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{cpu_name()}, 1 thread",
        "driver": _driver() if cuda else "",
        "cuda": (torch.version.cuda or "") if cuda else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "resu_compile": _sources(),
    }


def describe(found: Mapping[str, str]) -> str:
    """An environment in one line, as it stands above a table."""
    parts = [found["device"]]
    for key, label in (
        ("driver", "driver"),
        ("cuda", "CUDA"),
        ("torch", "torch"),
        ("triton", "Triton"),
        ("resu_compile", "resu_compile"),
    ):
        if found.get(key, "") not in ("", UNKNOWN):
            parts.append(f"{label} {found[key]}")
    return ", ".join(parts)


def slug(device: str) -> str:
    """Name of a device as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def cpu_name() -> str:
    """The processor as the system calls it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return name
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, name)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(query) or UNKNOWN


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _sources() -> str:
    """Version of the package and eight digits of its sources: the code that was measured."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.relative_to(PACKAGE).as_posix().encode())
            digest.update(path.read_bytes())
    return f"{_version('resu-compile') or 'source'} {digest.hexdigest()[:8]}"


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""

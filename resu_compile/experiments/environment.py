"""What a result was made with: versions, machine, and a hash of the package's own source."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("resu-compile", "torch", "triton", "numpy", "scikit-learn")
SUFFIXES = (".py", ".cu", ".cuh")


@functools.cache
def source_hash() -> str:
    """sha256 over the names and contents of the package's source files, 16 hex digits."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """Plain data for a record.

    Args:
        device: where the run was.
    """
    versions = {name: _version(name) for name in PACKAGES}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: value for name, value in versions.items() if value is not None},
        "source": source_hash(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

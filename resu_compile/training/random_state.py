"""The states of all global random generators, as plain data and tensors."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """States of torch (CPU, and CUDA if it is in use), Python, and NumPy if it is imported."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "python": [version, list(internal), gauss],
        "numpy": None,
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [name, keys.tolist(), int(position), int(has_gauss), float(cached)]
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what ``random_state`` gave. GPUs that are not there any more are left out."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for index, found in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(found.cpu(), index)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if state["numpy"] is not None:
        import numpy as np

        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))

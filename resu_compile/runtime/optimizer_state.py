"""Optimizer state that has a weight's shape: momentum, EMAs and their like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resu_compile.kernels.mask_bits import zero_where_


def same_shaped_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[Tensor]:
    """The tensors of ``optimizer.state[parameter]`` that have one entry for each weight."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield value


def zero_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, bits: Tensor, keep: bool
) -> None:
    """Zero the state of ``parameter`` in place wherever the mask bit differs from ``keep``."""
    with torch.no_grad():
        for value in same_shaped_state(optimizer, parameter):
            zero_where_(value, bits.to(value.device), keep)

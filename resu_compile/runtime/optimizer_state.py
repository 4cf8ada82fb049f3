"""Optimizer state that has a weight's shape: momentum, EMAs and their like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resu_compile.kernels.mask_bits import zero_where_


def same_shaped_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of ``optimizer.state[parameter]`` with one number for each weight.

    Integer tensors are left out: in the state of an 8-bit optimizer the code 0 is not the number 0.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if (
            isinstance(value, Tensor)
            and value.shape == parameter.shape
            and value.is_floating_point()
        ):
            yield key, value


def zero_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, bits: Tensor, keep: bool
) -> None:
    """Zero the state of ``parameter`` in place wherever the mask bit differs from ``keep``."""
    with torch.no_grad():
        for _, value in same_shaped_state(optimizer, parameter):
            zero_where_(value, bits.to(value.device), keep)


def is_packed(value: Tensor, parameter: Tensor) -> bool:
    """Whether ``value`` is a vector of the active places instead of a tensor like ``parameter``."""
    return value.dim() == 1 and value.shape != parameter.shape

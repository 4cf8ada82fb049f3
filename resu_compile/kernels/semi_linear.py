"""``x @ weight.T`` by a 2:4 weight, on the sparse tensor cores.

y = activation(x W^T + bias)          W keeps at most 2 of each 4 consecutive inputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.semi_weight import (
    SemiWeight,
    is_semi_structured,
    pack_semi,
    unpack_semi,
)

__all__ = [
    "SemiWeight",
    "is_semi_structured",
    "is_supported",
    "pack_semi",
    "semi_linear",
    "semi_linear_reference",
    "unpack_semi",
]

DTYPES = (torch.float16, torch.bfloat16)  # of the sparse tensor cores; float32 is unpacked


def is_supported(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """True if the sparse tensor cores take this weight: 2-byte floats, inputs in eights."""
    return dtype in DTYPES and out_features > 0 and in_features > 0 and in_features % 8 == 0


# -- reference -------------------------------------------------------------------------------
def semi_linear_reference(
    x: Tensor, packed: SemiWeight, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning: the dense product in float32, rounded once, at the end."""
    weight = unpack_semi(packed).to(x.dtype)
    wide = None if bias is None else bias.float()
    y = F.linear(x.float(), weight.float(), wide)
    return apply_activation(y, activation).to(x.dtype)


# -- dispatch --------------------------------------------------------------------------------
def semi_linear(
    x: Tensor, packed: SemiWeight, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(x W^T + bias)`` without unpacking where the device has sparse tensor cores.

    Args:
        x: (M, K), float32, float16 or bfloat16, any strides.
        packed: the weight (N, K); its values are rounded to the dtype of ``x``.
        bias: (N,) or None.
        activation: one of ``ACTIVATIONS``, applied before the result is rounded.

    Returns:
        (M, N), contiguous, dtype of ``x``.

    Raises:
        ArgumentError: a shape, a dtype or the activation does not fit.
    """
    _check(x, packed, bias, activation)
    weight = unpack_semi(packed).to(x.dtype)
    own_bias = None if bias is None else bias.to(x.dtype)
    return apply_activation(F.linear(x, weight, own_bias), activation)


def _check(x: Tensor, packed: SemiWeight, bias: Tensor | None, activation: str) -> None:
    n, k = packed.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ArgumentError(
            f"x: expected shape (M, {k}) for a weight of shape {packed.shape}, got {tuple(x.shape)}"
        )
    if x.dtype not in (torch.float32, *DTYPES):
        raise ArgumentError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.device != packed.values.device:
        raise ArgumentError(f"x: expected it on {packed.values.device}, got {x.device}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ArgumentError(f"bias: expected shape ({n},) or None, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")

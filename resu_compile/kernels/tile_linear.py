"""Linear layer on a packed weight, decoded straight into tensor-core fragments.

y[m, n] = act(sum_k weight[n, k] * x[m, k] + bias[n])
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels.plan import apply_activation
from resu_compile.kernels.tile_weight import TileWeight, unpack_tiles


# -- reference -------------------------------------------------------------------------------
def tile_linear_reference(
    x: Tensor, packed: TileWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning: the dense product, rounded once after bias and activation."""
    weight = unpack_tiles(packed).to(x.dtype).float()
    y = F.linear(x.float(), weight, None if bias is None else bias.to(x.dtype).float())
    return apply_activation(y, activation).to(x.dtype)


def tile_linear(
    x: Tensor, packed: TileWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """``act(x @ weight.T + bias)``, summed in fp32 and rounded once.

    Args:
        x: fp32, fp16 or bf16, ``(M, K)``, any strides.
        packed: weight ``(N, K)``; its values are rounded to the dtype of ``x``.
        bias: ``[N]`` or None; rounded to the dtype of ``x``.
        activation: one of ``kernels.plan.ACTIVATIONS``.

    Returns:
        ``(M, N)``, contiguous, dtype of ``x``.
    """
    check_x(x, packed)
    return tile_linear_reference(x, packed, bias, activation)


def check_x(x: Tensor, packed: TileWeight) -> None:
    """Raise unless ``x`` is a matrix with the columns of the weight, on its device."""
    if x.dim() != 2 or x.shape[1] != packed.shape[1] or not x.is_floating_point():
        raise ArgumentError(
            f"x: expected a floating point matrix (M, {packed.shape[1]}), "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if x.device != packed.val.device:
        raise ArgumentError(f"x: expected device {packed.val.device}, got {x.device}")

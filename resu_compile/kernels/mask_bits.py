"""Packed masks: one bit a weight, and the in-place zeroing that reads them.

    bits[j] = sum_i mask.flatten()[8 j + i] << i        (i in 0..7; 1 = active, 0 = pruned)

``zero_where_(x, bits, keep)`` writes 0 where the bit differs from ``keep``:
``keep=True`` keeps the active set, ``keep=False`` keeps the pruned set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl

BLOCK = 1024  # elements per program: at 4 warps and 4 bytes, two 128-bit accesses per thread


# -- reference -------------------------------------------------------------------------------
def pack_mask(mask: Tensor) -> Tensor:
    """Bits of ``mask`` in row-major order.

    Args:
        mask: bool, any shape.

    Returns:
        uint8, shape ``[ceil(mask.numel() / 8)]``; unused high bits of the last byte are 0.
    """
    if mask.dtype != torch.bool:
        raise ArgumentError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    flat = mask.reshape(-1).to(torch.uint8)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)  # (bytes, 8)
    packed = torch.zeros(groups.shape[0], dtype=torch.uint8, device=mask.device)
    for i in range(8):  # eight streaming passes over bytes; no int64 temporaries
        packed |= groups[:, i] << i
    return packed


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of ``shape`` whose ``pack_mask`` is ``bits``."""
    numel = math.prod(shape)
    check_bits(bits, numel)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    spread = (bits[:, None] >> shifts) & 1  # (bytes, 8)
    return spread.view(-1)[:numel].view(tuple(shape)).to(torch.bool)


def zero_where_reference(x: Tensor, bits: Tensor, keep: bool) -> Tensor:
    """Plain meaning of ``zero_where_``, out of place."""
    mask = unpack_mask(bits, x.shape)
    return torch.where(mask if keep else ~mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def check_bits(bits: Tensor, numel: int) -> None:
    """Raise unless ``bits`` is the packed mask of ``numel`` elements."""
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.shape[0] != cdiv(numel, 8):
        raise ArgumentError(
            f"bits: expected uint8 of shape ({cdiv(numel, 8)},) for {numel} elements, "
            f"got {bits.dtype} of shape {tuple(bits.shape)}"
        )


# -- Triton ----------------------------------------------------------------------------------
@jit
def _zero_where_kernel(x_ptr, bits_ptr, numel, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    # int64: stacked expert weights pass 2**31 elements
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    byte = tl.load(bits_ptr + (offs >> 3), mask=inside, other=0).to(tl.int32)
    bit = (byte >> (offs & 7).to(tl.int32)) & 1
    drop = (bit == 0) if KEEP else (bit != 0)
    tl.store(x_ptr + offs, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=inside & drop)


def zero_where_triton(x: Tensor, bits: Tensor, keep: bool) -> None:
    """Launch the kernel on a contiguous ``x``; a write-only pass over the dropped elements."""
    grid = (cdiv(x.numel(), BLOCK),)
    _zero_where_kernel[grid](x, bits, x.numel(), KEEP=keep, BLOCK=BLOCK)


# -- operator --------------------------------------------------------------------------------
@torch.library.custom_op("resu_compile::zero_where_", mutates_args=("x",))
def zero_where_(x: Tensor, bits: Tensor, keep: bool) -> None:
    """Write 0 into ``x`` in place wherever the mask bit differs from ``keep``.

    Args:
        x: floating point, any shape and strides; changed in place.
        bits: uint8, packed mask of ``x.numel()`` elements in row-major order.
        keep: True keeps the active set (mask 1), False keeps the pruned set (mask 0).
    """
    check_bits(bits, x.numel())
    if x.numel() == 0:
        return
    if x.is_cuda and HAS_TRITON and x.is_contiguous():
        zero_where_triton(x, bits, keep)
        return
    mask = unpack_mask(bits, x.shape)
    x.masked_fill_(~mask if keep else mask, 0)


@zero_where_.register_fake
def _zero_where_fake(x: Tensor, bits: Tensor, keep: bool) -> None:
    check_bits(bits, x.numel())

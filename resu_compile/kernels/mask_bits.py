"""Packed masks: one bit a weight, and what writes tensors in place by them.

    bits[j] = sum_i mask.flatten()[8 j + i] << i        (i in 0..7; 1 = active, 0 = pruned)

``zero_where_(x, bits, keep)`` writes 0 where the bit differs from ``keep``:
``keep=True`` keeps the active set, ``keep=False`` keeps the pruned set.
``take_pruned_(x, bits, out)`` moves the pruned entries of x over to out, in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl
from resu_compile.kernels.row_fill import INTEGERS

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
    if bits.device.type == "cpu":  # eight entries at a time
        spread = torch.index_select(_EIGHT_ENTRIES, 0, bits.to(torch.int32)).view(torch.bool)
    else:
        spread = _spread(bits).view(-1).to(torch.bool)
    return spread[:numel].view(tuple(shape))


def _spread(bits: Tensor) -> Tensor:
    """Each bit of ``bits`` as a byte, shape ``[bytes, 8]``."""
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1


# a byte of bits -> its eight entries as one number
_EIGHT_ENTRIES = _spread(torch.arange(256, dtype=torch.uint8, device="cpu")).view(torch.int64)[:, 0]


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


def take_pruned_reference(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Plain meaning of ``take_pruned_``, out of place: what is left in ``x``, and ``out``."""
    return zero_where_reference(x, bits, True), zero_where_reference(x, bits, False)


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


@jit
def _take_pruned_kernel(x_ptr, bits_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    byte = tl.load(bits_ptr + (offs >> 3), mask=inside, other=0).to(tl.int32)
    pruned = inside & (((byte >> (offs & 7).to(tl.int32)) & 1) == 0)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=pruned, other=0), mask=inside)
    tl.store(x_ptr + offs, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=pruned)


def take_pruned_triton(x: Tensor, bits: Tensor, out: Tensor) -> None:
    """Launch the kernel on contiguous ``x`` and ``out``; active entries of ``x`` are not read."""
    grid = (cdiv(x.numel(), BLOCK),)
    _take_pruned_kernel[grid](x, bits, out, x.numel(), BLOCK=BLOCK)


# -- without Triton --------------------------------------------------------------------------
def _as_integers(x: Tensor) -> Tensor:
    """The same memory as integers, of which none times 0 is NaN.

    Their product with a mask has no branches: on a CPU it takes less time than ``masked_fill_``.
    """
    return x.view(INTEGERS[x.element_size()])


# -- operators -------------------------------------------------------------------------------
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
    _as_integers(x).mul_(mask if keep else ~mask)


@zero_where_.register_fake
def _zero_where_fake(x: Tensor, bits: Tensor, keep: bool) -> None:
    check_bits(bits, x.numel())


@torch.library.custom_op("resu_compile::take_pruned_", mutates_args=("x", "out"))
def take_pruned_(x: Tensor, bits: Tensor, out: Tensor) -> None:
    """Move the pruned entries of ``x`` to ``out``: 0 is left there, and ``out`` is 0 elsewhere.

    Args:
        x: floating point, any shape and strides; changed in place.
        bits: uint8, packed mask of ``x.numel()`` elements in row-major order.
        out: shape, dtype and device of ``x``; all of it is written.
    """
    _check_taking(x, bits, out)
    if x.numel() == 0:
        return
    if x.is_cuda and HAS_TRITON and x.is_contiguous() and out.is_contiguous():
        take_pruned_triton(x, bits, out)
        return
    mask = unpack_mask(bits, x.shape)
    entries = _as_integers(x)
    torch.mul(entries, ~mask, out=_as_integers(out))
    entries.mul_(mask)


@take_pruned_.register_fake
def _take_pruned_fake(x: Tensor, bits: Tensor, out: Tensor) -> None:
    _check_taking(x, bits, out)


def _check_taking(x: Tensor, bits: Tensor, out: Tensor) -> None:
    check_bits(bits, x.numel())
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ArgumentError(
            f"out: expected {x.dtype} of shape {tuple(x.shape)} on {x.device}, as x has it, got "
            f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )

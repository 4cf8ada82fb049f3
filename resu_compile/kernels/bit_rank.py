"""Phi and its inverse: entries of one side of a mask as a vector, and back, by bit rank.

    gather:   values[rank(i)] = x.flatten()[i]      at the places i where the mask bit is ``keep``
    scatter:  x.flatten()[i] = values[rank(i)]

``rank(i)`` is the number of such places before i in row-major order. With ``keep=False`` the vector
is theta: scatter is Phi, gather its inverse. With ``keep=True`` it holds what belongs to the active
set. Ranks are counted from the bits, block by block; no list of indices is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl
from resu_compile.kernels.mask_bits import check_bits, unpack_mask

BLOCK = 1024  # elements a program, of which one rank is stored: 4 bytes for 128 bytes of bits


# -- ranks -----------------------------------------------------------------------------------
def block_ranks(bits: Tensor, numel: int, keep: bool) -> Tensor:
    """Rank of the first element of each block of ``BLOCK``.

    Args:
        bits: uint8, packed mask of ``numel`` elements.
        numel: number of elements.
        keep: count the set bits, or the clear ones.

    Returns:
        int32 (int64 from 2**31 elements on), shape ``[ceil(numel / BLOCK) + 1]``; the last entry is
        the number of all such places.
    """
    check_bits(bits, numel)
    blocks = cdiv(numel, BLOCK)
    dtype = torch.int32 if numel < 2**31 else torch.int64
    pairs = bits - ((bits >> 1) & 0x55)  # bits set in a byte, by halving: no table to look up in
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = (nibbles + (nibbles >> 4)) & 0x0F
    counts = torch.nn.functional.pad(counts, (0, blocks * (BLOCK // 8) - counts.numel()))
    per_block = counts.view(blocks, BLOCK // 8).sum(1, dtype=dtype)
    if not keep:
        sizes = torch.full_like(per_block, BLOCK)
        if numel % BLOCK:
            sizes[-1] = numel % BLOCK
        per_block = sizes - per_block
    ranks = torch.zeros(blocks + 1, dtype=dtype, device=bits.device)
    torch.cumsum(per_block, 0, out=ranks[1:])
    return ranks


# -- reference -------------------------------------------------------------------------------
def gather_by_rank_reference(x: Tensor, bits: Tensor, keep: bool) -> Tensor:
    """Plain meaning of ``gather_by_rank``."""
    mask = unpack_mask(bits, x.shape)
    return torch.masked_select(x, mask if keep else ~mask)


def scatter_by_rank_reference(x: Tensor, values: Tensor, bits: Tensor, keep: bool) -> Tensor:
    """Plain meaning of ``scatter_by_rank_``, out of place."""
    mask = unpack_mask(bits, x.shape)
    return x.masked_scatter(mask if keep else ~mask, values.to(x.dtype))


# -- Triton ----------------------------------------------------------------------------------
@jit
def _places(bits_ptr, ranks_ptr, numel, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a block, which of them are on the side, and their places in the vector."""
    pid = tl.program_id(0)
    # int64: stacked expert weights pass 2**31 elements
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    byte = tl.load(bits_ptr + (offs >> 3), mask=inside, other=0).to(tl.int32)
    bit = (byte >> (offs & 7).to(tl.int32)) & 1
    chosen = inside & ((bit == 1) if KEEP else (bit == 0))
    place = tl.load(ranks_ptr + pid) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    return offs, chosen, place


@jit
def _gather_kernel(
    x_ptr, bits_ptr, ranks_ptr, out_ptr, numel, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    offs, chosen, place = _places(bits_ptr, ranks_ptr, numel, KEEP, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + offs, mask=chosen), mask=chosen)


@jit
def _scatter_kernel(
    x_ptr, values_ptr, bits_ptr, ranks_ptr, numel, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    offs, chosen, place = _places(bits_ptr, ranks_ptr, numel, KEEP, BLOCK)
    value = tl.load(values_ptr + place, mask=chosen)
    tl.store(x_ptr + offs, value.to(x_ptr.dtype.element_ty), mask=chosen)


def gather_by_rank_triton(
    x: Tensor, bits: Tensor, keep: bool, out: Tensor, ranks: Tensor | None = None
) -> None:
    """Launch the kernel on a contiguous ``x``; writes all of ``out``."""
    ranks = block_ranks(bits, x.numel(), keep) if ranks is None else ranks
    grid = (cdiv(x.numel(), BLOCK),)
    _gather_kernel[grid](x, bits, ranks, out, x.numel(), KEEP=keep, BLOCK=BLOCK)


def scatter_by_rank_triton(
    x: Tensor, values: Tensor, bits: Tensor, keep: bool, ranks: Tensor | None = None
) -> None:
    """Launch the kernel on contiguous ``x`` and ``values``."""
    ranks = block_ranks(bits, x.numel(), keep) if ranks is None else ranks
    grid = (cdiv(x.numel(), BLOCK),)
    _scatter_kernel[grid](x, values, bits, ranks, x.numel(), KEEP=keep, BLOCK=BLOCK)


# -- operators -------------------------------------------------------------------------------
@torch.library.custom_op("resu_compile::gather_by_rank", mutates_args=())
def gather_by_rank(
    x: Tensor, bits: Tensor, keep: bool, count: int, ranks: Tensor | None = None
) -> Tensor:
    """The entries of ``x`` on one side of the mask, in row-major order.

    Args:
        x: any dtype, shape and strides.
        bits: uint8, packed mask of ``x.numel()`` elements in row-major order.
        keep: True takes the active set, False the pruned set (Phi inverse).
        count: how many there are; on CUDA, counting would stall the device.
        ranks: ``block_ranks(bits, x.numel(), keep)`` if known; saves a dozen launches on CUDA.

    Returns:
        Tensor of shape ``[count]``, dtype of ``x``.

    Raises:
        ArgumentError: bits of another size, or (on the CPU) another count.
    """
    check_bits(bits, x.numel())
    if x.is_cuda and HAS_TRITON and x.is_contiguous() and x.numel():
        out = torch.empty(count, dtype=x.dtype, device=x.device)
        gather_by_rank_triton(x, bits, keep, out, ranks)
        return out
    values = gather_by_rank_reference(x, bits, keep)
    if values.numel() != count:
        raise ArgumentError(
            f"count: expected {values.numel()}, the places where the mask is {keep}, got {count}"
        )
    return values


@gather_by_rank.register_fake
def _gather_by_rank_fake(
    x: Tensor, bits: Tensor, keep: bool, count: int, ranks: Tensor | None = None
) -> Tensor:
    check_bits(bits, x.numel())
    return x.new_empty(count)


@torch.library.custom_op("resu_compile::scatter_by_rank_", mutates_args=("x",))
def scatter_by_rank_(
    x: Tensor, values: Tensor, bits: Tensor, keep: bool, ranks: Tensor | None = None
) -> None:
    """Write ``values`` in place into one side of the mask; the other side is not touched.

    Args:
        x: floating point, any shape and strides; changed in place.
        values: ``[count]``, one entry a place of that side; rounded to the dtype of ``x``.
        bits: uint8, packed mask of ``x.numel()`` elements in row-major order.
        keep: True writes the active set, False the pruned set (Phi).
        ranks: ``block_ranks(bits, x.numel(), keep)`` if known.

    Raises:
        ArgumentError: bits of another size, or (on the CPU) another number of values.
    """
    check_bits(bits, x.numel())
    if x.is_cuda and HAS_TRITON and x.is_contiguous() and x.numel():
        scatter_by_rank_triton(x, values.contiguous(), bits, keep, ranks)
        return
    mask = unpack_mask(bits, x.shape)
    side = mask if keep else ~mask
    places = int(side.sum())
    if values.dim() != 1 or values.numel() != places:
        raise ArgumentError(
            f"values: expected shape ({places},), one for each place where the mask is {keep}, "
            f"got {tuple(values.shape)}"
        )
    x.masked_scatter_(side, values.to(x.dtype))


@scatter_by_rank_.register_fake
def _scatter_by_rank_fake(
    x: Tensor, values: Tensor, bits: Tensor, keep: bool, ranks: Tensor | None = None
) -> None:
    check_bits(bits, x.numel())

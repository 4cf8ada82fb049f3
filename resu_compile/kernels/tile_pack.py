"""Packing and unpacking of tiles on a GPU, by Triton: one program for a segment of a strip.

The format is that of ``tile_weight``, whose plain PyTorch functions mean the same. A tile of 16
rows is brought into the order of the streams by a permutation of its axes in registers, so that
the dense side is read and written in whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.kernels._triton import cdiv, jit, tl

STRIP, ROW, STEP = 16, 64, 64  # as in tile_weight
NUM_WARPS = 4


# -- Triton ----------------------------------------------------------------------------------
@jit
def _load_streams(ptr, pid, segments, N, K, stride_n, stride_k, SEGMENT: tl.constexpr):
    """``(64, SEGMENT / 4)``: a segment of a strip as its streams, 0 outside of the matrix."""
    steps: tl.constexpr = SEGMENT // 64
    # int64: large weights pass 2**31 elements
    row = (pid // segments).to(tl.int64) * 16 + tl.arange(0, 16)
    column = (pid % segments).to(tl.int64) * SEGMENT + tl.arange(0, SEGMENT)
    inside = (row < N)[:, None] & (column < K)[None, :]
    place = row[:, None] * stride_n + column[None, :] * stride_k
    tile = tl.load(ptr + place, mask=inside, other=0)
    split = tl.reshape(tile, (2, 8, steps, 4, 2, 4, 2))
    return tl.reshape(tl.permute(split, (1, 5, 6, 2, 3, 4, 0)), (64, SEGMENT // 4))


@jit
def _flagged(kept, SEGMENT: tl.constexpr, UNIT: tl.constexpr):
    """What a flag marks, as 0 or 1 for each place of each stream: ``kept``, or its pairs."""
    if UNIT == 1:
        return kept
    pairs = tl.max(tl.reshape(kept, (32, 2, SEGMENT // 4)), 1)
    both = tl.broadcast_to(pairs[:, None, :], (32, 2, SEGMENT // 4))
    return tl.reshape(both, (64, SEGMENT // 4))


@jit
def _count_kernel(
    mask_ptr,
    flags_ptr,
    rows_ptr,
    N,
    K,
    segments,
    stride_n,
    stride_k,
    SEGMENT: tl.constexpr,
    UNIT: tl.constexpr,
):
    pid = tl.program_id(0)
    places: tl.constexpr = SEGMENT // 4
    words: tl.constexpr = SEGMENT // 64 // UNIT
    kept = _load_streams(mask_ptr, pid, segments, N, K, stride_n, stride_k, SEGMENT).to(tl.int32)
    flagged = _flagged(kept, SEGMENT, UNIT)
    tl.store(rows_ptr + pid, tl.max(tl.sum(flagged, 1), 0))
    stream = tl.arange(0, 64)[:, None]
    place = tl.arange(0, places)[None, :]
    if UNIT == 1:
        bits = flagged << ((2 * place + (stream & 1)) & 31)
        word = tl.sum(tl.sum(tl.reshape(bits, (32, 2, words, 16)), 3), 1)  # (32, words)
    else:
        bits = tl.where((stream & 1) == 0, flagged << (place & 31), 0)
        word = tl.sum(tl.sum(tl.reshape(bits, (32, 2, words, 32)), 3), 1)
    lane = tl.arange(0, 32)[:, None]
    number = tl.arange(0, words)[None, :]
    tl.store(flags_ptr + (pid.to(tl.int64) * words + number) * 32 + lane, word)


@jit
def _fill_kernel(
    weight_ptr,
    mask_ptr,
    offset_ptr,
    val_ptr,
    N,
    K,
    segments,
    weight_stride_n,
    weight_stride_k,
    mask_stride_n,
    mask_stride_k,
    SEGMENT: tl.constexpr,
    UNIT: tl.constexpr,
):
    pid = tl.program_id(0)
    kept = _load_streams(mask_ptr, pid, segments, N, K, mask_stride_n, mask_stride_k, SEGMENT)
    value = _load_streams(
        weight_ptr, pid, segments, N, K, weight_stride_n, weight_stride_k, SEGMENT
    )
    kept = kept.to(tl.int32)
    value = tl.where(kept != 0, value, 0)
    flagged = _flagged(kept, SEGMENT, UNIT)
    row = tl.load(offset_ptr + pid).to(tl.int64) + tl.cumsum(flagged, 1) - flagged
    stream = tl.arange(0, 64)[:, None]
    tl.store(val_ptr + row * 64 + stream, value, mask=flagged != 0)


@jit
def _unpack_kernel(
    flags_ptr,
    offset_ptr,
    val_ptr,
    out_ptr,
    N,
    K,
    segments,
    SEGMENT: tl.constexpr,
    UNIT: tl.constexpr,
):
    pid = tl.program_id(0)
    words: tl.constexpr = SEGMENT // 64 // UNIT
    steps: tl.constexpr = SEGMENT // 64
    stream = tl.arange(0, 64)[:, None]
    place = tl.arange(0, SEGMENT // 4)[None, :]
    bit = 2 * place + (stream & 1) if UNIT == 1 else place + 0 * stream
    word = tl.load(flags_ptr + (pid.to(tl.int64) * words + (bit >> 5)) * 32 + (stream >> 1))
    flagged = (word >> (bit & 31)) & 1
    row = tl.load(offset_ptr + pid).to(tl.int64) + tl.cumsum(flagged, 1) - flagged
    value = tl.load(val_ptr + row * 64 + stream, mask=flagged != 0, other=0)
    split = tl.reshape(value, (8, 4, 2, steps, 4, 2, 2))
    tile = tl.reshape(tl.permute(split, (6, 0, 3, 4, 5, 1, 2)), (16, SEGMENT))
    n = (pid // segments).to(tl.int64) * 16 + tl.arange(0, 16)
    k = (pid % segments) * SEGMENT + tl.arange(0, SEGMENT)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + n[:, None] * K + k[None, :], tile, mask=inside)


# -- launches --------------------------------------------------------------------------------
def count_triton(mask: Tensor, unit: int, segment: int) -> tuple[Tensor, Tensor]:
    """Flag words of a mask, and the rows of values that each segment takes.

    Args:
        mask: bool, ``(N, K)``, any strides.
        unit: 1 or 2.
        segment: columns of a segment.

    Returns:
        int32 ``(strips, segments, segment / 64 / unit, 32)`` and int32 ``(strips * segments,)``.
    """
    (out_features, in_features), bits = mask.shape, mask.view(torch.uint8)
    strips, segments = cdiv(out_features, STRIP), cdiv(in_features, segment)
    shape = (strips, segments, segment // STEP // unit, 32)
    flags = torch.empty(shape, dtype=torch.int32, device=mask.device)
    rows = torch.empty(strips * segments, dtype=torch.int32, device=mask.device)
    _count_kernel[(strips * segments,)](
        bits,
        flags,
        rows,
        out_features,
        in_features,
        segments,
        *bits.stride(),
        SEGMENT=segment,
        UNIT=unit,
        num_warps=NUM_WARPS,
    )
    return flags, rows


def fill_triton(
    bits: Tensor, mask: Tensor, offset: Tensor, val: Tensor, unit: int, segment: int
) -> None:
    """Write the kept entries of ``bits`` to their places in ``val``.

    Args:
        bits: integers, ``(N, K)``, any strides: the bit patterns of the weight.
        mask: bool, ``(N, K)``, any strides.
        offset: int32, ``[strips * segments + 1]``.
        val: zeros, ``[rows, 64]``, dtype of ``bits``; written in place.
        unit: 1 or 2.
        segment: columns of a segment.
    """
    kept, segments = mask.view(torch.uint8), cdiv(mask.shape[1], segment)
    _fill_kernel[(offset.shape[0] - 1,)](
        bits,
        kept,
        offset,
        val,
        *mask.shape,
        segments,
        *bits.stride(),
        *kept.stride(),
        SEGMENT=segment,
        UNIT=unit,
        num_warps=NUM_WARPS,
    )


def unpack_triton(
    flags: Tensor, offset: Tensor, val: Tensor, shape: tuple[int, int], unit: int, segment: int
) -> Tensor:
    """The dense ``(N, K)`` matrix of integers, 0 where nothing was kept.

    Args:
        flags: int32, see ``tile_weight``.
        offset: int32, see ``tile_weight``.
        val: integers, ``[rows, 64]``.
        shape: ``(N, K)``.
        unit: 1 or 2.
        segment: columns of a segment.
    """
    dense = val.new_empty(shape)
    _unpack_kernel[(offset.shape[0] - 1,)](
        flags,
        offset,
        val,
        dense,
        *shape,
        cdiv(shape[1], segment),
        SEGMENT=segment,
        UNIT=unit,
        num_warps=NUM_WARPS,
    )
    return dense

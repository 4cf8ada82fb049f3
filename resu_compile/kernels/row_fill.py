"""Entries of a weight packed by rows, written to their places: plain PyTorch and Triton.

The layout is told in ``row_weight``. Entries come as ``place``, their numbers in the flat weight,
ascending; those of row n end before ``stop[n]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.kernels._triton import HAS_TRITON, jit, tl
from resu_compile.kernels.row_order import GROUP, spread_groups, value_slot, with_fillers

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 512  # entries of a step: 4096 columns at 90 % sparsity keep 410
NUM_WARPS = 4


@dataclass(frozen=True)
class Places:
    """Where the entries of a weight stand.

    Attributes:
        place: int64, ``[entries]``: ``row * in_features + column``.
        stop: int64, ``[N]``: entries up to the end of each row.
        groups: int64, ``[N]``: groups of each row, fillers counted.
        start: int64, ``[N]``: where the groups of each row begin among those that are stored.
        total: groups that there is room for.
        in_features: K.
    """

    place: Tensor
    stop: Tensor
    groups: Tensor
    start: Tensor
    total: int
    in_features: int


# -- reference -------------------------------------------------------------------------------
def _entries(place: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row (int64), column and gap (int32) of each entry; the gap of a row's first is 0."""
    row = place // in_features
    col = (place % in_features).to(torch.int32)
    gap = torch.zeros_like(col)
    gap[1:] = torch.where(row[1:] == row[:-1], col[1:] - col[:-1], gap[1:])
    return row, col, gap


def count_fillers_reference(place: Tensor, stop: Tensor, in_features: int, widest: int) -> Tensor:
    """Fillers of each row, int64, ``[N]``, if a gap can be up to ``widest``."""
    gap = _entries(place, in_features)[2]
    filled = F.pad(((gap - 1).clamp_(min=0) // widest).cumsum(0), (1, 0))
    return filled[F.pad(stop, (1, 0))].diff()


def fill_reference(
    flat: Tensor, places: Places, widest: int, val: Tensor, gap: Tensor, base: Tensor
) -> None:
    """Plain PyTorch meaning of ``fill_triton``."""
    row, col, wide_gap = _entries(places.place, places.in_features)
    fillers = (wide_gap - 1).clamp_(min=0) // widest
    filled = fillers.cumsum(0, dtype=torch.int32)
    number = torch.arange(col.numel(), dtype=torch.int32, device=col.device) + filled
    entries = number, row, col, wide_gap - fillers * widest, flat[places.place]
    number, row, col, last_gap, value = with_fillers(*entries, fillers, widest)

    # the number in the stream of entries and fillers, to group and place within
    stream_stop = places.stop + F.pad(filled, (1, 0))[places.stop]
    group_stop = places.groups.cumsum(0)
    group_start = group_stop - places.groups
    slot = number + (group_start * GROUP - F.pad(stream_stop, (1, 0))[:-1])[row]
    order = spread_groups(places.groups, group_start, int(group_stop[-1]))
    group = order[slot >> 4] + (places.start - group_start)[row]
    natural = group * GROUP + (slot & (GROUP - 1))
    leads = slot & (GROUP - 1) == 0
    base[group[leads]] = col[leads].to(base.dtype)
    gap[natural] = last_gap.masked_fill_(leads, 0).to(torch.uint8)
    val[value_slot(natural, val.element_size())] = value


# -- Triton ----------------------------------------------------------------------------------
@jit
def _load_gaps(place_ptr, entry, begin, end, row_start):
    """Place, column and gap of entries of a row."""
    inside = entry < end
    place = tl.load(place_ptr + entry, mask=inside, other=0)
    follows = inside & (entry > begin)
    before = tl.load(place_ptr + entry - 1, mask=follows, other=0)
    gap = tl.where(follows, place - before, 0).to(tl.int32)
    return place, (place - row_start).to(tl.int32), gap


@jit
def _count_kernel(place_ptr, stop_ptr, fillers_ptr, K, WIDEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    begin = tl.load(stop_ptr + row - 1, mask=row > 0, other=0).to(tl.int32)
    end = tl.load(stop_ptr + row).to(tl.int32)
    row_start = row.to(tl.int64) * K
    count = tl.zeros((BLOCK,), tl.int32)
    for at in range(begin, end, BLOCK):
        entry = at + tl.arange(0, BLOCK)
        _, _, gap = _load_gaps(place_ptr, entry, begin, end, row_start)
        count += tl.maximum(gap - 1, 0) // WIDEST
    tl.store(fillers_ptr + row, tl.sum(count, 0).to(tl.int64))


@jit
def _put(
    gap_ptr,
    base_ptr,
    slot,
    col,
    gap,
    inside,
    groups,
    start,
    VECTOR: tl.constexpr,
    PASS_BITS: tl.constexpr,
):
    """Gap and base column of entries with these numbers in their row; where their values go."""
    # the place of the group as spread_groups has it: which passes come before its own
    passes = tl.maximum((groups + 7) // 8, 1)
    least, longer = groups // passes, groups % passes  # groups of a pass; passes with one more
    number = slot >> 4
    own = number % passes
    before = tl.zeros_like(number)
    longer_before = tl.zeros_like(number)
    for bit in tl.static_range(PASS_BITS):
        # with the same lower bits and no such bit: reversed, they are smaller
        lower = own & ((1 << bit) - 1)
        has = (own >> bit) & 1
        before += has * ((passes - lower + (2 << bit) - 1) >> (bit + 1))
        longer_before += has * (tl.maximum(longer - lower + (2 << bit) - 1, 0) >> (bit + 1))
    group = start + least * before + longer_before + number // passes
    j = slot & 15
    tl.store(gap_ptr + group * 16 + j, tl.where(j == 0, 0, gap).to(tl.uint8), mask=inside)
    tl.store(base_ptr + group, col.to(base_ptr.dtype.element_ty), mask=inside & (j == 0))
    within = j // VECTOR * (32 * VECTOR) + group % 32 * VECTOR + j % VECTOR
    return group // 32 * 512 + within


@jit
def _fill_kernel(
    flat_ptr,
    place_ptr,
    stop_ptr,
    groups_ptr,
    start_ptr,
    val_ptr,
    gap_ptr,
    base_ptr,
    K,
    WIDEST: tl.constexpr,
    VECTOR: tl.constexpr,
    PASS_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(stop_ptr + row - 1, mask=row > 0, other=0).to(tl.int32)
    end = tl.load(stop_ptr + row).to(tl.int32)
    groups = tl.load(groups_ptr + row).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    row_start = row.to(tl.int64) * K
    done = tl.zeros((1,), tl.int32)  # entries and fillers of the steps before
    for at in range(begin, end, BLOCK):
        entry = at + tl.arange(0, BLOCK)
        inside = entry < end
        place, col, gap = _load_gaps(place_ptr, entry, begin, end, row_start)
        fillers = tl.maximum(gap - 1, 0) // WIDEST
        steps = tl.where(inside, fillers + 1, 0)
        slot = done + tl.cumsum(steps, 0) - 1
        done += tl.sum(steps, 0)
        gap -= fillers * WIDEST
        value = tl.load(flat_ptr + place, mask=inside, other=0)
        to = _put(gap_ptr, base_ptr, slot, col, gap, inside, groups, start, VECTOR, PASS_BITS)
        tl.store(val_ptr + to, value, mask=inside)
        filler_col = col - gap
        for back in range(1, tl.max(fillers, 0) + 1):
            there = fillers >= back
            at_back = slot - back
            _put(
                gap_ptr,
                base_ptr,
                at_back,
                filler_col,
                WIDEST,
                there,
                groups,
                start,
                VECTOR,
                PASS_BITS,
            )
            filler_col -= WIDEST


def count_fillers_triton(place: Tensor, stop: Tensor, in_features: int, widest: int) -> Tensor:
    """``count_fillers_reference`` by a program a row."""
    fillers = torch.empty_like(stop)
    _count_kernel[(stop.numel(),)](
        place, stop, fillers, in_features, WIDEST=widest, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return fillers


def fill_triton(
    flat: Tensor, places: Places, widest: int, val: Tensor, gap: Tensor, base: Tensor
) -> None:
    """Write the entries and their fillers to zeros; a program a row.

    Args:
        flat: integers, ``[N * K]``: the bit patterns of the weight.
        places: where they go.
        widest: gap, 15 or 255.
        val: ``[total * 16]``, dtype of ``flat``.
        gap: uint8, ``[total * 16]``, one a byte.
        base: int16 or int32, ``[total]``.
    """
    passes = -(-places.in_features // (8 * GROUP))  # at most: a filler stands in a column too
    _fill_kernel[(places.stop.numel(),)](
        flat,
        places.place,
        places.stop,
        places.groups,
        places.start,
        val,
        gap,
        base,
        places.in_features,
        WIDEST=widest,
        VECTOR=16 // val.element_size(),
        PASS_BITS=(passes - 1).bit_length(),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


# -- the choice ------------------------------------------------------------------------------
def count_fillers(place: Tensor, stop: Tensor, in_features: int, gap_bits: int) -> Tensor:
    """Fillers that each row needs with gaps of ``gap_bits``, int64, ``[N]``."""
    count = count_fillers_triton if place.is_cuda and HAS_TRITON else count_fillers_reference
    with torch.cuda.device_of(place):
        return count(place, stop, in_features, (1 << gap_bits) - 1)


def fill_rows(
    weight: Tensor, places: Places, gap_bits: int, base_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``val``, ``gap`` and ``base`` of ``RowWeight`` for the entries of a matrix."""
    integer = INTEGERS[weight.element_size()]
    flat = weight.contiguous().view(-1).view(integer)
    val = flat.new_zeros(places.total * GROUP)
    gap = flat.new_zeros(places.total * GROUP, dtype=torch.uint8)
    base = flat.new_zeros(places.total, dtype=base_dtype)
    fill = fill_triton if flat.is_cuda and HAS_TRITON else fill_reference
    with torch.cuda.device_of(flat):
        fill(flat, places, (1 << gap_bits) - 1, val, gap, base)
    if gap_bits == 4:
        halves = gap.view(-1, 2, 2, 4)  # (group, 8 entries, upper half, 4)
        gap = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1)
    return val.view(weight.dtype), gap, base

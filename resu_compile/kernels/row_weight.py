"""Packed weight by rows: groups of 16 kept entries, each a base column and the gaps between them.

Layout, version 1. The entries of a row, columns ascending, are cut into groups of 16; a group is
one base column (that of its first entry), 16 gaps and 16 values. Entry ``j`` of a group lies in
column ``base + gap[1] + ... + gap[j]``; ``gap[0]`` is 0. Where two entries are further apart than a
gap can say, fillers of value 0 stand between them, and the last group of a row is filled up with
gaps of 0 and values of 0. Gaps take 8 bits (1 to 255), or 4 bits (1 to 15) where that is smaller:
with 2-byte values 3.125 or 2.625 bytes an entry.

The rows are divided into ``blocks`` runs of about as many groups, one for each thread block of the
product. Each run has room for ``capacity`` groups (a multiple of 32), so that a block knows where
its groups are before it has read anything. ``ends[b, k]`` counts the groups of the first ``k + 1``
rows of run ``b``; behind its last row the count stays.

Groups of 32 are stored as the lanes of a warp read them, 16 bytes at a time: with ``V`` values in
16 bytes, element ``j`` of group ``32 c + l`` is ``val[c, j // V, l, j % V]``. Gaps of 8 bits are
``gap[c, l, j]``; of 4 bits, byte ``gap[c, l, 4 (j // 8) + j % 4]``, its upper half for ``j & 4``.

The groups of a row are not stored in the order of their columns but so that any 8, 16 or 32 in
sequence spread evenly over the row: with the columns of x laid out by ``column // (K / banks)`` in
shared memory, the lanes of a warp then mostly find different banks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels._triton import cdiv
from resu_compile.kernels.row_fill import Places, count_fillers, fill_rows
from resu_compile.kernels.row_order import CHUNK, GROUP, divide_rows, value_slot

NARROW_COLUMNS = 1 << 16  # up to here a base column fits 16 bits
MAX_ENTRIES = 2**31 - 1  # entry numbers are int32, fillers and room included
GAP_BITS = (4, 8)
BLOCKS = 132  # runs where no device says how many: the multiprocessors of an H100 or H200
# Rows of a run at most, on average: the product keeps 32 partial sums a row in shared memory,
# 110 KB for 8 rows of x
MAX_MEAN_ROWS = 110


@dataclass(frozen=True)
class RowWeight:
    """Kept entries of an ``(N, K)`` weight by rows; see the module for the layout.

    Attributes:
        val: ``[blocks * capacity * 16]``, dtype of the weight.
        gap: uint8, ``[blocks * capacity * 16 * gap_bits / 8]``.
        base: ``[blocks * capacity]``; int16 holding the bits of a uint16 where ``K <= 65536``,
            else int32.
        ends: int32, ``[blocks, room]``: groups up to the end of each row of a run.
        first: int32, ``[blocks + 1]``: first row of each run, then N.
        lead: int32, ``[blocks, capacity / 32]``: row of the run, counted from its first, that the
            first of each 32 groups belongs to; behind the last group, ``room``.
        shape: ``(N, K)``.
        gap_bits: 4 or 8.
        capacity: groups that a run has room for, a multiple of 32.
    """

    val: Tensor
    gap: Tensor
    base: Tensor
    ends: Tensor
    first: Tensor
    lead: Tensor
    shape: tuple[int, int]
    gap_bits: int
    capacity: int

    def __post_init__(self) -> None:
        """Check what a product would read out of bounds by."""
        if self.gap_bits not in GAP_BITS:
            raise ArgumentError(f"gap_bits: expected one of {GAP_BITS}, got {self.gap_bits}")
        if self.capacity < CHUNK or self.capacity % CHUNK:
            raise ArgumentError(
                f"capacity: expected a positive multiple of {CHUNK}, got {self.capacity}"
            )
        blocks = self.first.shape[0] - 1
        groups = blocks * self.capacity
        narrow = self.shape[1] <= NARROW_COLUMNS
        wanted = {
            "val": (self.val.dtype, groups * GROUP),
            "gap": (torch.uint8, groups * GROUP * self.gap_bits // 8),
            "base": (torch.int16 if narrow else torch.int32, groups),
            "ends": (torch.int32, blocks * self.ends.shape[-1]),
            "first": (torch.int32, blocks + 1),
            "lead": (torch.int32, groups // CHUNK),
        }
        for name, (dtype, numel) in wanted.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.numel() != numel:
                raise ArgumentError(
                    f"{name}: expected {dtype} of {numel} elements for capacity {self.capacity} "
                    f"and {blocks} blocks, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )

    @property
    def blocks(self) -> int:
        """Runs of rows."""
        return int(self.first.shape[0]) - 1

    @property
    def room(self) -> int:
        """Rows that a run has room for."""
        return int(self.ends.shape[1])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What is stored, in the order of ``from_tensors``."""
        return self.val, self.gap, self.base, self.ends, self.first, self.lead

    @property
    def layout(self) -> tuple[int, int]:
        """The numbers of ``from_tensors``, known without asking the device."""
        return self.gap_bits, self.capacity

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], layout: Sequence[int], shape: tuple[int, int]
    ) -> RowWeight:
        """The weight again from ``tensors()``, ``layout`` and ``shape``."""
        val, gap, base, ends, first, lead = tensors
        gap_bits, capacity = layout
        return cls(val, gap, base, ends, first, lead, (shape[0], shape[1]), gap_bits, capacity)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors together."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


# -- packing ---------------------------------------------------------------------------------
def pack_rows(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    blocks: int | None = None,
    gap_bits: int | None = None,
    like: RowWeight | None = None,
    spare: float = 0.0,
) -> RowWeight:
    """Exact storage of the kept entries of ``weight``.

    Args:
        weight: floating point, ``(N, K)``, any strides.
        mask: bool, ``(N, K)``, True = kept; None keeps what is not 0.
        blocks: runs of rows; None takes the multiprocessors of the device, or a multiple of them.
        gap_bits: 4 or 8; None takes the smaller result.
        like: a packed weight of the same shape whose sizes are taken over where the entries fit.
        spare: share of further room in each run, so that other masks of as many entries fit.

    Raises:
        WeightError: ``weight`` is no floating point matrix, or is empty or too large.
        ArgumentError: ``mask``, ``blocks`` or ``gap_bits`` does not fit.
    """
    _check(weight, mask)
    out_features, in_features = weight.shape
    if like is not None and blocks is None:
        blocks = like.blocks
    if blocks is None:
        blocks = default_blocks(weight.device, out_features)
    if not 1 <= blocks <= out_features:
        raise ArgumentError(f"blocks: expected 1 to N = {out_features}, got {blocks}")
    if gap_bits is None and like is not None:
        gap_bits = like.gap_bits
    if gap_bits not in (None, *GAP_BITS):
        raise ArgumentError(f"gap_bits: expected one of {GAP_BITS} or None, got {gap_bits}")

    weight = weight.detach()
    kept = weight != 0 if mask is None else mask
    place = kept.reshape(-1).nonzero().view(-1)  # (nnz,), int64
    if place.numel() > MAX_ENTRIES // 2:
        raise WeightError(
            f"weight: expected at most {MAX_ENTRIES // 2} entries to keep, got {place.numel()}; "
            "leave this weight dense or split it"
        )
    counts = kept.sum(1)  # (N,), int64
    stop = counts.cumsum(0)
    candidates = GAP_BITS if gap_bits is None else (gap_bits,)
    fillers = {bits: count_fillers(place, stop, in_features, bits) for bits in candidates}
    if gap_bits is None:
        gap_bits = _smaller_bits(place.numel(), fillers, weight.element_size())
    groups = (counts + fillers[gap_bits] + (GROUP - 1)) // GROUP  # (N,), int64
    group_stop = groups.cumsum(0)

    first, room, capacity = divide_rows(groups, group_stop, blocks)
    if like is not None and like.capacity >= capacity and like.room >= room:
        room, capacity = like.room, like.capacity
    elif spare:
        room += math.ceil(room * spare)
        capacity = cdiv(int(capacity * (1.0 + spare)), CHUNK) * CHUNK
    total = blocks * capacity
    if total * GROUP > MAX_ENTRIES:
        raise WeightError(
            f"weight: expected at most {MAX_ENTRIES} stored entries, got {total * GROUP}; "
            "leave this weight dense or split it"
        )
    rows = torch.arange(out_features, device=weight.device)
    block = torch.bucketize(rows, first[1:], right=True)  # (N,)
    block_start = F.pad(group_stop, (1, 0))[first]  # (blocks + 1,)
    start = group_stop - groups - block_start[block] + block * capacity  # (N,)
    places = Places(place, stop, groups, start, total, in_features)
    narrow = in_features <= NARROW_COLUMNS
    val, gap, base = fill_rows(weight, places, gap_bits, torch.int16 if narrow else torch.int32)

    row = first[:-1, None] + torch.arange(room, device=first.device)  # (blocks, room)
    row = row.clamp_(max=first[1:, None] - 1).clamp_(min=0)
    ends = group_stop[row] - block_start[:-1, None]
    ends = ends.clamp_(min=0).to(torch.int32)  # below 0: of a run without rows
    chunks = torch.arange(0, capacity, CHUNK, dtype=torch.int32, device=ends.device)
    lead = torch.searchsorted(ends, chunks.repeat(blocks, 1), right=True, out_int32=True)
    shape = (out_features, in_features)
    return RowWeight(val, gap, base, ends, first.to(torch.int32), lead, shape, gap_bits, capacity)


def unpack_rows(packed: RowWeight) -> Tensor:
    """The dense ``(N, K)`` weight, bit for bit, +0 where nothing was kept: plain PyTorch."""
    dense = packed.val.new_zeros(packed.shape)
    flat = dense.view(-1)
    row = row_of_group(packed)  # (groups,), -1: room
    natural = torch.arange(packed.val.numel(), device=row.device)
    value = packed.val[value_slot(natural, packed.val.element_size())].view(-1, GROUP)
    gap = gaps(packed)  # (groups, 16), int32
    col = wide_base(packed)[:, None] + gap.cumsum(1)
    stored = gap > 0
    stored[:, 0] = True
    stored &= row[:, None] >= 0
    place = row[:, None] * packed.shape[1] + col
    flat[place[stored]] = value[stored]  # fillers write 0 where nothing is kept
    return dense


def gaps(packed: RowWeight) -> Tensor:
    """Gaps in the order of the entries, int32, ``(blocks * capacity, 16)``."""
    if packed.gap_bits == 8:
        return packed.gap.view(-1, GROUP).to(torch.int32)
    halves = packed.gap.view(-1, 2, 1, 4)
    return torch.cat([halves & 15, halves >> 4], 2).view(-1, GROUP).to(torch.int32)


def wide_base(packed: RowWeight) -> Tensor:
    """Base column of each group, int64, ``(blocks * capacity,)``."""
    base = packed.base.to(torch.int64)
    return base & (NARROW_COLUMNS - 1) if packed.base.dtype == torch.int16 else base


def row_of_group(packed: RowWeight) -> Tensor:
    """Row of each stored group, int64, ``(blocks * capacity,)``; -1 where there is only room."""
    blocks, capacity = packed.blocks, packed.capacity
    number = torch.arange(capacity, dtype=torch.int32, device=packed.ends.device)
    number = number.expand(blocks, capacity).contiguous()
    row = torch.searchsorted(packed.ends, number, right=True) + packed.first[:-1, None]
    return row.masked_fill_(number >= packed.ends[:, -1:], -1).view(-1)


def default_blocks(device: torch.device, out_features: int) -> int:
    """Runs of rows for a device: as many as it has multiprocessors, or a multiple of that."""
    blocks = BLOCKS
    if device.type == "cuda":
        blocks = torch.cuda.get_device_properties(device).multi_processor_count
    return min(blocks * cdiv(out_features, blocks * MAX_MEAN_ROWS), out_features)


def _check(weight: Tensor, mask: Tensor | None) -> None:
    """Raise unless ``weight`` can be packed and ``mask`` belongs to it."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise WeightError(
            f"weight: expected a floating point matrix (N, K) with N, K >= 1, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise ArgumentError(
            f"mask: expected torch.bool of shape {tuple(weight.shape)} like weight, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _smaller_bits(entries: int, fillers: Mapping[int, Tensor], itemsize: int) -> int:
    """Bits of a gap that take fewer bytes altogether; 8 where that is within 2 %."""
    many = dict(
        zip(fillers, torch.stack([f.sum() for f in fillers.values()]).tolist(), strict=True)
    )
    sizes = {bits: (entries + n) * (itemsize + bits / 8 + 2 / GROUP) for bits, n in many.items()}
    return 4 if sizes[4] < 0.98 * sizes[8] else 8

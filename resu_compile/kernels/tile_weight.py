"""Packed weight for tensor cores: flag bits and streams of kept values in the order of fragments.

Layout, version 1. An ``(N, K)`` weight is padded to strips of 16 rows and segments of ``segment``
columns (a power of two, at least 128). Within a strip, lane ``l = 4 g + t`` of a warp owns what the
``m16n8k16`` and ``wgmma`` instructions want from it as the left operand: for register ``i`` of the
64-column step ``s`` and half ``h``

    row    = 16 strip + g + 8 (i & 1)
    column = segment j + 64 s + 16 (i >> 2) + 8 (i >> 1 & 1) + 2 t + h       (i < 16, h < 2)

The places of a lane in one segment are read in the order of ``16 s + i``, each half for itself.

- ``unit`` 1: one flag bit a place; each half has a stream of its own with the kept values alone.
- ``unit`` 2: one flag bit a pair (both halves of a register); a pair with a kept value stores both,
  the pruned one as 0, at the same rank of both streams.

A row of ``val`` holds one value for each of the 64 streams: element
``64 (offset + rank) + 2 l + h`` is value number ``rank`` of lane ``l``, half ``h``. So a lane stays
in its own four bytes of each
row (2-byte values), whatever the ranks of the others: a shared memory bank of its own. A segment
of a strip takes as many rows as its longest stream; the rest is 0. ``flags[strip, j, w, l]`` holds
32 bits of lane ``l``, in the order of ``2 (16 s + i) + h`` for unit 1 and of ``16 s + i`` for unit
2, lowest first. Source of the fragment: PTX ISA, "Matrix fragments for mma.m16n8k16",
https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels._triton import HAS_TRITON, cdiv
from resu_compile.kernels.tile_pack import count_triton, fill_triton, unpack_triton

STRIP = 16  # rows of a weight that one warp decodes
STEP = 64  # columns whose flags of unit 1 are one word of a lane
SEGMENT = 256  # columns after which all streams of a strip start anew
ROW = 64  # values of a row of ``val``: 32 lanes, 2 halves
# From here on ``pack_tiles`` takes pairs: half the work a place, more bytes. Of 14336x4096 with 8
# rows of x, H200, bf16: 25.8 us against 24.7 us at 70 %, about 20 us against 23 us at 90 %.
PAIR_SPARSITY = 0.75
MAX_ROWS = 2**31 - 1  # row numbers are int32
CHUNK = 1 << 26  # positions packed or unpacked at once, to bound the temporaries

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TileWeight:
    """Kept entries of an ``(N, K)`` weight in the order in which tensor cores want them.

    Attributes:
        flags: int32, ``[strips, segments, segment / 64 / unit, 32]``.
        offset: int32, ``[strips * segments + 1]``: first row of ``val`` of each segment.
        val: ``[rows, 64]``, dtype of the weight.
        shape: ``(N, K)``.
        unit: 1 = a flag for each place, 2 = a flag for each pair.
        segment: columns of a segment.
        segment_rows: rows of ``val`` of the longest segment.
    """

    flags: Tensor
    offset: Tensor
    val: Tensor
    shape: tuple[int, int]
    unit: int
    segment: int
    segment_rows: int

    def __post_init__(self) -> None:
        check_layout(self.unit, self.segment)
        strips, segments = counts_of(self.shape, self.segment)
        wanted = (strips, segments, self.segment // STEP // self.unit, 32)
        if self.flags.dtype != torch.int32 or self.flags.shape != wanted:
            raise ArgumentError(
                f"flags: expected int32 of shape {wanted}, "
                f"got {self.flags.dtype} of shape {tuple(self.flags.shape)}"
            )
        entries = (strips * segments + 1,)
        if self.offset.dtype != torch.int32 or self.offset.shape != entries:
            raise ArgumentError(
                f"offset: expected int32 of shape {entries}, "
                f"got {self.offset.dtype} of shape {tuple(self.offset.shape)}"
            )
        if self.val.dim() != 2 or self.val.shape[1] != ROW:
            raise ArgumentError(f"val: expected shape (rows, {ROW}), got {tuple(self.val.shape)}")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored, in the order of ``from_tensors``."""
        return self.flags, self.offset, self.val

    @property
    def layout(self) -> tuple[int, int, int]:
        """The numbers of ``from_tensors``, known without asking the device."""
        return self.unit, self.segment, self.segment_rows

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], layout: Sequence[int], shape: tuple[int, int]
    ) -> TileWeight:
        """The weight again from ``tensors()``, ``layout`` and ``shape``."""
        flags, offset, val = tensors
        unit, segment, segment_rows = layout
        return cls(flags, offset, val, (shape[0], shape[1]), unit, segment, segment_rows)

    @property
    def size_bytes(self) -> int:
        """Bytes of the three tensors together."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def counts_of(shape: tuple[int, int], segment: int) -> tuple[int, int]:
    """Strips and segments of a weight of ``shape``."""
    return cdiv(shape[0], STRIP), cdiv(shape[1], segment)


# -- packing ---------------------------------------------------------------------------------
def pack_tiles(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    unit: int | None = None,
    segment: int = SEGMENT,
) -> TileWeight:
    """Exact storage of the kept entries of ``weight``.

    Args:
        weight: floating point, ``(N, K)``, any strides.
        mask: bool, ``(N, K)``, True = kept; None keeps what is not 0.
        unit: 1 or 2, see the module; None chooses by the share of pruned places.
        segment: columns of a segment, a power of two >= 128.

    Raises:
        WeightError: ``weight`` is no floating point matrix, or is empty or too large.
        ArgumentError: ``mask``, ``unit`` or ``segment`` does not fit.
    """
    check_matrix(weight, mask)
    check_layout(1 if unit is None else unit, segment)
    weight = weight.detach()
    out_features, in_features = weight.shape
    by_triton = HAS_TRITON and weight.is_cuda
    if unit is None:
        entries = int(torch.count_nonzero(weight if mask is None else mask))
        unit = 2 if 1 - entries / weight.numel() >= PAIR_SPARSITY else 1
    shape = (out_features, in_features)
    bits = _integers(weight)
    # NaN != 0 is True, -0.0 != 0 is False: a comparison of numbers, not of bits
    kept = weight != 0 if mask is None else mask
    flags, rows = (count_triton if by_triton else _count)(kept, unit, segment)
    ends = rows.cumsum(0)  # int64
    total, longest = torch.stack((ends[-1], rows.max())).tolist()
    if total > MAX_ROWS:
        raise WeightError(
            f"weight: expected at most {MAX_ROWS} rows of {ROW} values, got {total}; split it"
        )
    offset = F.pad(ends, (1, 0)).to(torch.int32)  # (strips * segments + 1,)
    val = bits.new_zeros(total, ROW)
    (fill_triton if by_triton else _fill)(bits, kept, offset, val, unit, segment)
    return TileWeight(flags, offset, val.view(weight.dtype), shape, unit, segment, longest)


def unpack_tiles(packed: TileWeight) -> Tensor:
    """The dense ``(N, K)`` weight, contiguous, bit for bit, +0 where nothing was kept."""
    flags, offset, val = packed.flags, packed.offset, _integers(packed.val)
    expand = unpack_triton if HAS_TRITON and val.is_cuda else _unpack
    dense = expand(flags, offset, val, packed.shape, packed.unit, packed.segment)
    return dense.view(packed.val.dtype)


def check_layout(unit: int, segment: int) -> None:
    """Raise unless ``unit`` and ``segment`` are of the format."""
    if unit not in (1, 2):
        raise ArgumentError(f"unit: expected 1 or 2, got {unit}")
    if segment < 2 * STEP or segment & (segment - 1):
        raise ArgumentError(f"segment: expected a power of two >= {2 * STEP}, got {segment}")


def check_matrix(weight: Tensor, mask: Tensor | None) -> None:
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


# -- the order of places ---------------------------------------------------------------------
def _to_streams(matrix: Tensor, segment: int) -> Tensor:
    """``(rows, K)`` -> ``(strips, segments, 32, 2, segment / 4)``: lane, half, order of reading."""
    rows, columns = matrix.shape
    matrix = F.pad(matrix, (0, -columns % segment, 0, -rows % STRIP))
    # rows are strip, i & 1, g; columns are segment, s, i >> 2, i >> 1 & 1, t, h
    split = matrix.reshape(-1, 2, 8, matrix.shape[1] // segment, segment // STEP, 4, 2, 4, 2)
    ordered = split.permute(0, 3, 2, 7, 8, 4, 5, 6, 1)  # strip, segment, g, t, h, s, i
    return ordered.reshape(*ordered.shape[:2], 32, 2, segment // 4)


def _from_streams(streams: Tensor, segment: int) -> Tensor:
    """``(strips, segments, 32, 2, segment / 4)`` -> ``(16 strips, segments * segment)``."""
    strips, segments = streams.shape[:2]
    split = streams.reshape(strips, segments, 8, 4, 2, segment // STEP, 4, 2, 2)
    ordered = split.permute(0, 8, 2, 1, 5, 6, 7, 3, 4)
    return ordered.reshape(strips * STRIP, segments * segment)


def _streams(device: torch.device) -> Tensor:
    """Number of each stream in a row of values, ``(32, 2, 1)``."""
    return torch.arange(ROW, device=device).view(32, 2, 1)


# -- plain PyTorch ---------------------------------------------------------------------------
def _chunks(strips: int, segments: int, segment: int) -> Iterator[slice]:
    """Strips that are worked on at once."""
    step = max(1, CHUNK // (STRIP * segments * segment))
    yield from (slice(begin, min(begin + step, strips)) for begin in range(0, strips, step))


def _count(mask: Tensor, unit: int, segment: int) -> tuple[Tensor, Tensor]:
    """Flag words of a mask, and the rows of values that each segment takes."""
    words, rows = [], []
    for chunk in _chunks(*counts_of((mask.shape[0], mask.shape[1]), segment), segment):
        flagged = _flagged(_strips_of(mask, chunk), unit, segment)
        rows.append(flagged.sum(-1, dtype=torch.int32).amax((2, 3)).view(-1))
        strips, segments, lanes, _, _ = flagged.shape
        # (.., lane, half, place) -> (.., word, lane, 32 bits)
        ordered = flagged.transpose(3, 4).reshape(strips, segments, lanes, -1, 32)
        words.append(_pack_words(ordered.transpose(2, 3)))
    return torch.cat(words), torch.cat(rows)


def _fill(bits: Tensor, mask: Tensor, offset: Tensor, val: Tensor, unit: int, segment: int) -> None:
    """Write the kept entries of ``bits`` to their places in ``val``."""
    strips, segments = counts_of((mask.shape[0], mask.shape[1]), segment)
    first = offset[:-1].view(strips, segments, 1, 1, 1).long()
    for chunk in _chunks(strips, segments, segment):
        kept = _to_streams(_strips_of(mask, chunk), segment)
        flagged = _flagged(_strips_of(mask, chunk), unit, segment).expand_as(kept)
        rank = flagged.cumsum(-1, dtype=torch.int32) - 1
        place = (first[chunk] + rank) * ROW + _streams(bits.device)
        source = _to_streams(_strips_of(bits, chunk), segment)
        source = torch.where(kept, source, torch.zeros_like(source))  # the other of a kept pair
        val.view(-1)[place[flagged]] = source[flagged]


def _unpack(
    flags: Tensor, offset: Tensor, val: Tensor, shape: tuple[int, int], unit: int, segment: int
) -> Tensor:
    """The dense matrix of integers, 0 where nothing was kept."""
    strips, segments = counts_of(shape, segment)
    out_features, in_features = shape
    if not val.numel():
        return val.new_zeros(shape)
    dense = val.new_empty(shape)
    first = offset[:-1].view(strips, segments, 1, 1, 1).long()
    for chunk in _chunks(strips, segments, segment):
        kept = _kept_of(flags[chunk], unit, segment)  # (strips, segments, 32, 2, places)
        rank = kept.cumsum(-1, dtype=torch.int32) - 1
        place = (first[chunk] + rank) * ROW + _streams(val.device)
        found = val.view(-1)[place.clamp_(0, val.numel() - 1)]
        rows = _from_streams(torch.where(kept, found, torch.zeros_like(found)), segment)
        begin, end = chunk.start * STRIP, min(out_features, chunk.stop * STRIP)
        dense[begin:end] = rows[: end - begin, :in_features]
    return dense


def _strips_of(matrix: Tensor, chunk: slice) -> Tensor:
    """The rows of these strips."""
    return matrix[chunk.start * STRIP : chunk.stop * STRIP]


def _flagged(kept: Tensor, unit: int, segment: int) -> Tensor:
    """What a flag marks: ``(strips, segments, 32, 2, places)``, or 1 for 2 where pairs are."""
    streams = _to_streams(kept, segment)
    return streams if unit == 1 else streams.any(3, keepdim=True)


def _kept_of(flags: Tensor, unit: int, segment: int) -> Tensor:
    """Flag words ``(strips, segments, words, 32)`` -> ``(strips, segments, 32, 2, places)``."""
    strips, segments, words, lanes = flags.shape
    shifts = torch.arange(32, dtype=torch.int32, device=flags.device)
    bits = (flags.transpose(2, 3)[..., None] >> shifts & 1).to(torch.bool)  # .., lane, word, bit
    halves = bits.reshape(strips, segments, lanes, segment // 4, -1)  # 2 bits a place, or 1
    return halves.transpose(3, 4).expand(strips, segments, lanes, 2, segment // 4)


def _pack_words(bits: Tensor) -> Tensor:
    """Flags ``(..., 32)`` -> int32 ``(...)``, lowest bit first."""
    grouped = bits.reshape(*bits.shape[:-1], 4, 8).to(torch.uint8)
    octets = torch.zeros(grouped.shape[:-1], dtype=torch.uint8, device=bits.device)
    for i in range(8):  # eight passes over bytes; no int64 temporaries
        octets |= grouped[..., i] << i
    return octets.view(torch.int32).squeeze(-1)


def _integers(x: Tensor) -> Tensor:
    """The bit patterns of ``x`` as integers of its size."""
    return x.view(_INTEGERS[x.dtype.itemsize])

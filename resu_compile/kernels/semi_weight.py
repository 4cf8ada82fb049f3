"""2:4 weights: two of each four consecutive inputs, in the order of the sparse tensor cores.

    values  (N/16, K/64, step 2, lane 32, register 4, half 2)     dtype of the weight
    places  (N/16, K/256, lane 32, block 4)                       int32

Layout, version 1. Rows are padded to 16 and columns to 256 with zeros. A block is 16 rows by 64
columns, two steps of ``mma.sp.m16n8k32``. Lane ``4 g + t`` of a warp holds, of each step, the two
kept values of group ``t`` of row ``g`` (register 0) and of row ``g + 8`` (1), then of group
``t + 4`` of the same rows (2, 3); a group is four columns. Its word of ``places`` belongs to step
``t // 2``: four bits a group, position of the first kept value and, times 4, of the second, for the
groups ``4 (t % 2)`` and the three after, row ``g`` in the low half and row ``g + 8`` in the high
one. Places are strictly ascending; a group that keeps fewer than two has a pruned place filled in,
whose value is +0. Stored size: ``9/16`` of the dense weight for 2-byte values.

Source: PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16/.bf16 types",
https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-for-sparse-mma
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._triton import cdiv

SEMI_WEIGHT_VERSION = 1  # of the layout above; a file names the version that it was written in
ROWS = 16  # rows of a block
COLUMNS = 256  # columns that the places of one 16-byte load cover: four blocks
GROUP = 4
KEPT = 2
UNPACK_WARPS = 4  # of a block, as in semi_unpack.cu

# Values move as integers: exact for NaN payloads and signed zeros.
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class SemiWeight:
    """A weight that keeps at most two of each four consecutive inputs.

    Attributes:
        values: ``(N/16, K/64, 2, 32, 4, 2)``, dtype of the weight.
        places: ``(N/16, K/256, 32, 4)``, int32.
        shape: (out_features N, in_features K) before padding.
    """

    values: Tensor
    places: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Check shapes and dtypes; the contents are not read."""
        rows, columns = _padded(self.shape)
        for name, expected in (
            ("values", (rows // ROWS, columns // 64, 2, 32, 4, 2)),
            ("places", (rows // ROWS, columns // COLUMNS, 32, 4)),
        ):
            found = tuple(getattr(self, name).shape)
            if found != expected:
                raise ArgumentError(
                    f"{name}: expected shape {expected} for a 2:4 weight of shape {self.shape}, "
                    f"got {found}; make it with pack_semi"
                )
        if self.places.dtype != torch.int32:
            raise ArgumentError(f"places: expected int32, got {self.places.dtype}")

    def tensors(self) -> tuple[Tensor, ...]:
        """The two tensors: values, places."""
        return (self.values, self.places)

    @property
    def layout(self) -> tuple[int, ...]:
        """The version of the layout."""
        return (SEMI_WEIGHT_VERSION,)

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], layout: Sequence[int], shape: Sequence[int]
    ) -> SemiWeight:
        """The weight whose ``tensors()`` and ``layout`` these are.

        Raises:
            ArgumentError: another number of tensors, their shapes do not fit, or the layout is of
                another version.
        """
        if len(tensors) != 2 or tuple(layout) != (SEMI_WEIGHT_VERSION,):
            raise ArgumentError(
                f"SemiWeight: expected 2 tensors of layout version {SEMI_WEIGHT_VERSION}, got "
                f"{len(tensors)} and {tuple(layout)}; pack the weight again with pack_semi"
            )
        rows, columns = shape
        return cls(tensors[0], tensors[1], (int(rows), int(columns)))

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensors, padding included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def is_semi_structured(mask: Tensor) -> bool:
    """True if ``mask`` (N, K) keeps at most two of each four consecutive entries of a row.

    Reads the mask (on CUDA: waits for the device). A last group may be shorter.
    """
    return bool((_groups(mask).sum(-1) <= KEPT).all())


def is_semi_pattern(keep: int, group: int) -> bool:
    """True if every mask that keeps ``keep`` of each ``group`` inputs is a 2:4 mask too.

    ``"2:4"``, ``"1:4"``, ``"1:2"`` and ``"2:8"`` are, ``"2:3"`` and ``"4:8"`` are not.
    """
    return all(
        # entries that the groups reaching into four inputs from ``start`` on may keep of them
        sum(
            min(keep, min(start + GROUP, (i + 1) * group) - max(start, i * group))
            for i in range(start // group, cdiv(start + GROUP, group))
        )
        <= KEPT
        for start in range(0, GROUP * group, GROUP)
    )


def pack_semi(weight: Tensor, mask: Tensor | None = None) -> SemiWeight:
    """The 2:4 form of a weight.

    Args:
        weight: (N, K), any strides, any dtype of 1 to 8 bytes; what it holds at pruned places is
            dropped.
        mask: bool, (N, K), True = active, at most two of each four consecutive ones of a row; None
            takes the places whose bits are not all zero.

    Returns:
        New contiguous tensors on the weight's device; kept values keep every bit.

    Raises:
        ArgumentError: not a matrix, a mask of another shape or dtype, or more than two of four.
    """
    if weight.dim() != 2:
        raise ArgumentError(
            f"weight: expected two dimensions (out, in), got shape {tuple(weight.shape)}"
        )
    bits = _as_integers(weight.detach())
    if mask is None:
        mask = bits != 0
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ArgumentError(
            f"mask: expected bool of shape {tuple(weight.shape)} like the weight, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    kept = _groups(mask)  # (rows, columns / 4, 4)
    if bool((kept.sum(-1) > KEPT).any()):
        n_over = int((kept.sum(-1) > KEPT).sum())
        raise ArgumentError(
            f"mask: expected at most 2 of each 4 consecutive inputs, but {n_over} of "
            f"{kept[..., 0].numel()} groups keep more; prune with pattern='2:4'"
        )
    first, second = _slots(kept)  # (rows, columns / 4) each
    active = _groups(torch.where(mask, bits, 0))
    pairs = torch.stack(
        [active.gather(-1, slot.long().unsqueeze(-1)).squeeze(-1) for slot in (first, second)], -1
    )
    rows, columns = _padded(weight.shape)
    values = (
        # row of a block: 8 high + g; group of a step: 4 far + t
        pairs.reshape(rows // ROWS, 2, 8, columns // 64, 2, 2, 4, 2)
        .permute(0, 3, 4, 2, 6, 5, 1, 7)  # block, block, step, g, t, far, high, half
        .reshape(rows // ROWS, columns // 64, 2, 32, 4, 2)
        .contiguous()
    )
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    return SemiWeight(values.view(weight.dtype), _pack_places(first | second << 2), shape)


def unpack_semi(packed: SemiWeight) -> Tensor:
    """The dense weight (N, K), contiguous: kept values to the bit, +0 elsewhere."""
    if packed.values.is_cuda and packed.values.dtype.itemsize == 2:
        index = packed.values.device.index
        with torch.cuda.device(index):
            module = load_module(("semi_unpack.cu",), (), 32 * UNPACK_WARPS, index)
            if module is not None:
                return _unpack_cuda(packed, module)
    return unpack_semi_reference(packed)


class _UnpackArgs(ctypes.Structure):
    """What the kernel takes, as in semi_unpack.cu."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("row_blocks", ctypes.c_int),
        ("chunks", ctypes.c_int),
    ]


def _unpack_cuda(packed: SemiWeight, module: CudaModule) -> Tensor:
    n, k = packed.shape
    dense = packed.values.new_empty(n, k)
    row_blocks, chunks = packed.places.shape[:2]
    args = _UnpackArgs(
        packed.values.data_ptr(),
        packed.places.data_ptr(),
        dense.data_ptr(),
        n,
        k,
        row_blocks,
        chunks,
    )
    if dense.numel():
        module.launch("semi_unpack", cdiv(row_blocks * chunks, UNPACK_WARPS), args)
    return dense


def unpack_semi_reference(packed: SemiWeight) -> Tensor:
    """Plain PyTorch meaning of ``unpack_semi``, on every device."""
    rows, columns = _padded(packed.shape)
    values = _as_integers(packed.values)
    pairs = (
        values.view(rows // ROWS, columns // 64, 2, 8, 4, 2, 2, 2)
        .permute(0, 6, 3, 1, 2, 5, 4, 7)  # block, high, g, block, step, far, t, half
        .reshape(rows, columns // GROUP, KEPT)
    )
    codes = _unpack_places(packed.places, rows, columns)
    slots = torch.stack([codes & 3, codes >> 2], -1).long()  # (rows, columns / 4, 2)
    dense = pairs.new_zeros(rows, columns // GROUP, GROUP).scatter_(-1, slots, pairs)
    n, k = packed.shape
    return dense.view(rows, columns)[:n, :k].contiguous().view(packed.values.dtype)


def _pack_places(codes: Tensor) -> Tensor:
    """(rows, columns / 4) of 4-bit codes -> int32 (rows / 16, columns / 256, 32, 4)."""
    rows, groups = codes.shape
    # row: 16 block + 8 high + g; group: 64 load + 16 block + 8 step + 4 pair + position
    fields = codes.long().reshape(rows // ROWS, 2, 8, groups // 64, 4, 2, 2, 4)
    shifts = torch.arange(0, 16, 4, device=codes.device)
    halves = (fields << shifts).sum(-1)  # (row block, high, g, load, block, step, pair)
    words = halves[:, 0] | halves[:, 1] << 16  # (row block, g, load, block, step, pair)
    words = words.permute(0, 2, 1, 4, 5, 3)  # row block, load, g, step, pair, block
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.reshape(rows // ROWS, groups // 64, 32, 4).to(torch.int32).contiguous()


def _unpack_places(places: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``_pack_places``: 4-bit codes (rows, columns / 4), uint8."""
    words = places.view(rows // ROWS, columns // COLUMNS, 8, 2, 2, 4)  # see _pack_places
    shifts = torch.arange(0, 32, 4, device=places.device, dtype=torch.int32)
    fields = (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8)  # (..., high 2 x position 4)
    fields = fields.view(*words.shape, 2, 4)  # row block, load, g, step, pair, block, high, pos
    return fields.permute(0, 6, 2, 1, 5, 3, 4, 7).reshape(rows, columns // GROUP)


def _slots(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Two ascending places of each group that hold all its kept ones; uint8, (..., groups)."""
    order = torch.tensor([_pair(code) for code in range(16)], dtype=torch.uint8)
    weights = torch.tensor([1, 2, 4, 8], device=kept.device, dtype=torch.uint8)
    code = (kept.to(torch.uint8) * weights).sum(-1, dtype=torch.int32)
    first, second = order.to(kept.device).unbind(1)
    return first[code], second[code]


def _pair(code: int) -> tuple[int, int]:
    """The set bits of a 4-bit number, filled up to two with the lowest others, ascending."""
    places = [i for i in range(GROUP) if code >> i & 1]
    places += [i for i in range(GROUP) if not code >> i & 1]
    first, second = sorted(places[:KEPT])
    return first, second


def _groups(matrix: Tensor) -> Tensor:
    """(N, K) -> (N padded, K padded / 4, 4), zero padded."""
    rows, columns = _padded(matrix.shape)
    right, below = columns - matrix.shape[1], rows - matrix.shape[0]
    if right or below:
        matrix = F.pad(matrix, (0, right, 0, below))
    return matrix.reshape(rows, columns // GROUP, GROUP)


def _padded(shape: Sequence[int]) -> tuple[int, int]:
    rows, columns = shape
    return cdiv(int(rows), ROWS) * ROWS, cdiv(int(columns), COLUMNS) * COLUMNS


def _as_integers(x: Tensor) -> Tensor:
    integer = _INTEGER_OF_SIZE.get(x.dtype.itemsize)
    if integer is None:
        raise ArgumentError(f"2:4 weight: expected a dtype of 1 to 8 bytes, got {x.dtype}")
    return x.view(integer)

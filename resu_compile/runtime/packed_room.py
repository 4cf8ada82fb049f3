"""Room in packed weights: other masks of as many entries fit into the tensors that are there.

The padding of a format depends on the mask. A little room for it from the start, and a commit that
keeps counts changes contents alone: no compiled graph and no CUDA graph is made again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor

from resu_compile.kernels.packed_linear import Packed, format_of
from resu_compile.kernels.plan import Kernel

if TYPE_CHECKING:
    from resu_compile.kernels.row_weight import RowWeight
    from resu_compile.kernels.tile_weight import TileWeight

# Share of further room. Six random masks of 1024x1024 with as many entries, at 50, 70, 90 and 95 %:
# the values of TILES take 0.5 to 2.4 % more rows for one than for another, the longest segment is 8
# to 16 % longer, and the runs of ROWS differ by one step of 32 groups at most.
SPARE = 1 / 32
SPARE_LONGEST = 1 / 4  # a bound, no memory


def pack_with_room(
    kernel: Kernel, value: Tensor, mask: Tensor, old: Packed | None, *, fixed: bool
) -> Packed:
    """``value`` in the format of ``kernel``; in the tensors of ``old`` where it fits.

    Args:
        kernel: one with storage of its own.
        value: ``(N, K)``.
        mask: bool, ``(N, K)``, True = kept.
        old: what was packed before, of the same matrix.
        fixed: whether the contents will never change, so that no room is needed.
    """
    fresh = _pack(kernel, value, mask, old, 0.0 if fixed else SPARE)
    if old is None or not _fits(kernel, fresh, old):
        return fresh if fixed or kernel is not Kernel.TILES else _with_room(fresh)
    for ours, theirs in zip(old.tensors(), fresh.tensors(), strict=True):
        (ours if ours.shape == theirs.shape else ours[: theirs.shape[0]]).copy_(theirs)
    return old


def _pack(kernel: Kernel, value: Tensor, mask: Tensor, old: Packed | None, spare: float) -> Packed:
    if kernel is Kernel.ROWS:
        from resu_compile.kernels.row_weight import pack_rows

        return pack_rows(value, mask, like=cast("RowWeight | None", old), spare=spare)
    packed: Packed = format_of(kernel).pack(value, mask)
    return packed


def _with_room(packed: Packed) -> Packed:
    tiles = cast("TileWeight", packed)
    rows = int(tiles.val.shape[0] * SPARE) + 1
    longest = tiles.segment_rows + int(tiles.segment_rows * SPARE_LONGEST) + 4
    return replace(tiles, val=F.pad(tiles.val, (0, 0, 0, rows)), segment_rows=longest)


def _fits(kernel: Kernel, fresh: Packed, old: Packed) -> bool:
    """Whether the contents of ``fresh`` can stand in the tensors of ``old``."""
    pairs = list(zip(fresh.tensors(), old.tensors(), strict=True))
    if any(a.dtype != b.dtype or a.device != b.device for a, b in pairs):
        return False
    if kernel is Kernel.TILES:  # rows behind the last one, and a bound that is too large, are fine
        *layout, longest = fresh.layout
        *old_layout, room = old.layout
        return (
            layout == old_layout
            and longest <= room
            and all(a.shape[1:] == b.shape[1:] and a.shape[0] <= b.shape[0] for a, b in pairs)
        )
    return fresh.layout == old.layout and all(a.shape == b.shape for a, b in pairs)

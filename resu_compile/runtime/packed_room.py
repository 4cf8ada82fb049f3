"""Room in packed weights: other masks of as many entries fit into the tensors that are there.

The padding of a format depends on the mask. With a little room for it from the start, a commit that
keeps counts changes contents alone: no compiled graph and no CUDA graph is made again. Where room
would slow the kernel down there is none until a commit needs it, and that one makes graphs again.
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
    from resu_compile.kernels.tile_linear import TileConfig, TileShape
    from resu_compile.kernels.tile_weight import TileWeight

# Share of further room. Six random masks of 1024x1024 with as many entries, at 50, 70, 90 and 95 %:
# the values of TILES take 0.5 to 2.4 % more rows for one than for another, the longest segment is 8
# to 16 % longer, and the runs of ROWS differ by one step of 32 groups at most.
SPARE = 1 / 32
# Of the bound on a segment, by which the kernel sizes its buffers: as far as it cuts its work as it
# would without. A bound that was too small once gets the last of these in any case.
SPARE_LONGEST = (1 / 4, 1 / 8, 1 / 16)


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
    if old is not None and any(t.device != value.device for t in old.tensors()):
        old = None  # the model was moved
    fresh = _pack(kernel, value, mask, old, 0.0 if fixed else SPARE)
    if old is None or not _fits(kernel, fresh, old):
        if fixed or kernel is not Kernel.TILES:
            return fresh
        return _with_room(cast("TileWeight", fresh), again=old is not None)
    for ours, theirs in zip(old.tensors(), fresh.tensors(), strict=True):
        (ours if ours.shape == theirs.shape else ours[: theirs.shape[0]]).copy_(theirs)
    return old


def _pack(kernel: Kernel, value: Tensor, mask: Tensor, old: Packed | None, spare: float) -> Packed:
    if kernel is Kernel.ROWS:
        from resu_compile.kernels.row_weight import pack_rows

        return pack_rows(value, mask, like=cast("RowWeight | None", old), spare=spare)
    packed: Packed = format_of(kernel).pack(value, mask)
    return packed


def _with_room(tiles: TileWeight, *, again: bool) -> TileWeight:
    """``tiles`` with further rows; ``again``: the bound on a segment was too small once."""
    rows = int(tiles.val.shape[0] * SPARE) + 1
    bounds = [tiles.segment_rows + int(tiles.segment_rows * share) + 2 for share in SPARE_LONGEST]
    longest = bounds[-1] if again else next((b for b in bounds if _is_free(tiles, b)), 0)
    longest = max(longest, tiles.segment_rows)
    return replace(tiles, val=F.pad(tiles.val, (0, 0, 0, rows)), segment_rows=longest)


def _is_free(tiles: TileWeight, longest: int) -> bool:
    """Whether the kernel cuts its work for segments of up to ``longest`` rows as it would now."""
    from resu_compile.kernels.tile_linear import TILE_ROWS, TileShape, tile_config

    now = TileShape.of(tiles)
    then = replace(now, segment_rows=longest)
    for tile_m in TILE_ROWS:
        config = tile_config(tile_m, now)
        if config != tile_config(tile_m, then):
            return False
        if config is not None and _holds_x(config, now) != _holds_x(config, then):
            return False
    return True


def _holds_x(config: TileConfig, shape: TileShape) -> bool:
    return config.held_segments(shape) == config.own_segments(shape)


def _fits(kernel: Kernel, fresh: Packed, old: Packed) -> bool:
    """Whether the contents of ``fresh`` can stand in the tensors of ``old``."""
    pairs = list(zip(fresh.tensors(), old.tensors(), strict=True))
    if any(a.dtype != b.dtype for a, b in pairs):
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

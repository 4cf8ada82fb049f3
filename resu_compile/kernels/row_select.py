"""The lowest, or the highest, scores of each row, by selection: no row is sorted.

    key(x)   unsigned, ordered as x:   x < y  <=>  key(x) < key(y),  key(-0) = key(+0)
    T        the count-th lowest key of the row, found bit by bit:
             the largest T with  #{key < T} < count
    taken    key < T, or key = T and among the first (count - #{key < T}) of these

A row stays in registers, so scores are read once. To take the highest, the keys are inverted; ties
fall to the lower index either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl

MAX_COLUMNS = 1 << 15  # 32 keys a thread of 32 warps; longer rows take the reference
TILE = 4096  # entries of a program, if a row is not longer
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# -- reference -------------------------------------------------------------------------------
def row_select_reference(
    score: Tensor, count: int, *, highest: bool, first: Tensor | None = None
) -> Tensor:
    """Plain meaning of ``row_select``: a stable sort, in which equal scores stay in order."""
    order = torch.argsort(score, dim=-1, descending=highest, stable=True)
    if first is not None:
        late = ~first.gather(-1, order)
        order = order.gather(-1, torch.argsort(late.to(torch.uint8), dim=-1, stable=True))
    taken = torch.zeros_like(score, dtype=torch.bool)
    return taken.scatter_(-1, order[..., :count], True)


def row_select_by_rank(score: Tensor, count: int, *, highest: bool) -> Tensor:
    """``row_select`` by the ``count``-th value of each row; ``1 <= count``."""
    rank = score.shape[-1] - count + 1 if highest else count
    limit = torch.kthvalue(score, rank, dim=-1, keepdim=True).values  # (..., 1)
    sure = score > limit if highest else score < limit
    ties = score == limit
    missing = count - sure.sum(-1, keepdim=True)
    return sure | (ties & (ties.cumsum(-1) <= missing))


# -- Triton ----------------------------------------------------------------------------------
@jit
def _row_select_kernel(
    score_ptr,
    first_ptr,
    taken_ptr,
    rows,
    columns,
    count,
    HIGHEST: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]  # (ROWS, COLUMNS)
    place = row[:, None] * columns + column[None, :]
    x = tl.load(score_ptr + place, mask=inside, other=0.0).to(tl.float32)
    u = x.to(tl.uint32, bitcast=True)
    top = tl.full(u.shape, 0x80000000, tl.uint32)
    u = tl.where(u == top, tl.zeros_like(u), u)  # -0 ties with +0
    key = tl.where((u & top) != 0, u ^ 0xFFFFFFFF, u | top)
    if HIGHEST:
        key = key ^ 0xFFFFFFFF
    limit = tl.zeros((ROWS,), tl.uint32)
    if HAS_FIRST:  # one digit above the others
        late = tl.load(first_ptr + place, mask=inside, other=0).to(tl.int32) == 0
        n_first = tl.sum((inside & (late == 0)).to(tl.int32), 1)
        # rows where the places that come first are enough look among these, others among the rest
        enough = n_first >= count
        open_ = inside & (late != enough[:, None])
        wanted = tl.where(enough, count, count - n_first)
        sure = inside & (late == 0) & (enough == 0)[:, None]
    else:
        open_ = inside
        wanted = tl.zeros((ROWS,), tl.int32) + count
        sure = inside & False
    bit = tl.full((ROWS,), 0x80000000, tl.uint32)
    for _ in range(32):  # not unrolled: that takes seconds to compile
        candidate = limit | bit
        below = tl.sum((open_ & (key < candidate[:, None])).to(tl.int32), 1)
        limit = tl.where(below < wanted, candidate, limit)
        bit = bit >> 1
    lower = open_ & (key < limit[:, None])
    ties = open_ & (key == limit[:, None])
    missing = wanted - tl.sum(lower.to(tl.int32), 1)
    taken = sure | lower | (ties & (tl.cumsum(ties.to(tl.int32), 1) <= missing[:, None]))
    tl.store(taken_ptr + place, taken, mask=inside)


def row_select_triton(
    score: Tensor, count: int, taken: Tensor, *, highest: bool, first: Tensor | None = None
) -> None:
    """Write what ``row_select`` gives for contiguous matrices; at most ``MAX_COLUMNS`` columns."""
    rows, columns = score.shape
    width = 1 << max(columns - 1, 1).bit_length()
    tile = max(TILE // width, 1)
    _row_select_kernel[(cdiv(rows, tile),)](
        score,
        taken if first is None else first,
        taken,
        rows,
        columns,
        count,
        HIGHEST=highest,
        HAS_FIRST=first is not None,
        ROWS=tile,
        COLUMNS=width,
        num_warps=min(max(tile * width // 1024, 4), 32),
    )


# -- the choice ------------------------------------------------------------------------------
def row_select(score: Tensor, count: int, *, highest: bool, first: Tensor | None = None) -> Tensor:
    """True at the ``count`` lowest, or highest, scores of each row; ties: the lower index.

    Args:
        score: floating point, ``(..., columns)``, free of NaN.
        count: entries to take in each row, in [0, columns].
        highest: take the highest instead of the lowest.
        first: bool, shape and device of ``score``; these places are taken before all others,
            whatever they score.

    Returns:
        bool, contiguous, shape of ``score``.

    Raises:
        ArgumentError: ``count`` is out of range.
    """
    columns = score.shape[-1]
    if not 0 <= count <= columns:
        raise ArgumentError(f"count: expected an integer in [0, {columns}], got {count}")
    if count in (0, columns) or score.numel() == 0:
        return torch.full(score.shape, count > 0, dtype=torch.bool, device=score.device)
    score = score.detach().contiguous()
    if score.is_cuda and HAS_TRITON and score.dtype in DTYPES and columns <= MAX_COLUMNS:
        rows = score.view(-1, columns)
        taken = torch.empty(rows.shape, dtype=torch.bool, device=score.device)
        places = None if first is None else first.reshape(rows.shape).contiguous()
        with torch.cuda.device(score.device):
            row_select_triton(rows, count, taken, highest=highest, first=places)
        return taken.view(score.shape)
    if first is None:
        return row_select_by_rank(score, count, highest=highest)
    return row_select_reference(score, count, highest=highest, first=first)

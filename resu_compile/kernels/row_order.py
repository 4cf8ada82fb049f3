"""Where the entries of a weight packed by rows stand: runs of rows, order of groups and of values.

The layout is told in ``row_weight``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.kernels._triton import cdiv

GROUP = 16  # entries
CHUNK = 32  # groups: a warp


def divide_rows(groups: Tensor, group_stop: Tensor, blocks: int) -> tuple[Tensor, int, int]:
    """Runs of rows of equal cost: first row of each (int64, then N), most rows, room for groups.

    A row costs its groups and a quarter of the average row, which bounds the rows of a run where
    most rows are empty.
    """
    rows, total = groups.numel(), int(group_stop[-1])
    cost = group_stop.double()
    cost += torch.arange(1, rows + 1, device=groups.device) * max(1.0, total / rows / 4)
    targets = torch.arange(1, blocks, device=groups.device, dtype=torch.float64)
    targets *= cost[-1] / blocks
    # the row boundary nearest to each target
    after = torch.searchsorted(cost, targets).clamp_(max=rows - 1)
    before_cost = F.pad(cost, (1, 0))[after]
    inner = after + (cost[after] - targets < targets - before_cost)
    first = F.pad(F.pad(inner, (1, 0)), (0, 1), value=rows)
    counts = F.pad(group_stop, (1, 0))[first].diff()
    most_rows, most_groups = torch.stack([first.diff().max(), counts.max()]).tolist()
    return first, int(most_rows), cdiv(max(int(most_groups), 1), CHUNK) * CHUNK


def spread_groups(groups: Tensor, group_start: Tensor, total: int) -> Tensor:
    """Place of each group among all: within a row, 8 in sequence spread over its columns.

    A row of G groups makes ``ceil(G / 8)`` passes, pass p over the groups p, p + passes, ...; the
    passes follow one another in bit-reversed order, so that those in sequence interleave.
    """
    row = torch.arange(groups.numel(), device=groups.device)
    row = row.repeat_interleave(groups, output_size=total)
    number = torch.arange(total, device=groups.device) - group_start[row]
    passes = (groups[row] + 7) // 8
    key = _reverse_16(number % passes) * 8 + number // passes
    order = (row * (8 << 16) + key).argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(total, device=groups.device)
    return place


def _reverse_16(x: Tensor) -> Tensor:
    """Reversed order of the low 16 bits."""
    for shift, mask in ((1, 0x5555), (2, 0x3333), (4, 0x0F0F), (8, 0x00FF)):
        x = (x >> shift & mask) | (x & mask) << shift
    return x


def with_fillers(
    number: Tensor,
    row: Tensor,
    col: Tensor,
    gap: Tensor,
    val: Tensor,
    fillers: Tensor,
    widest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The entries and behind them the fillers: number, row, column, gap and value of each."""
    owner = fillers.nonzero().view(-1)
    owner = owner.repeat_interleave(fillers[owner])
    run = torch.arange(owner.numel(), device=owner.device)
    # 1 for the filler next to its entry, counting backwards
    starts = torch.searchsorted(owner, owner)
    back = (fillers[owner] - (run - starts)).to(torch.int32)
    return (
        torch.cat([number, number[owner] - back]),
        torch.cat([row, row[owner]]),
        torch.cat([col, col[owner] - gap[owner] - (back - 1) * widest]),
        torch.cat([gap, torch.full_like(back, widest)]),
        torch.cat([val, val.new_zeros(owner.numel())]),
    )


def value_slot(natural: Tensor, itemsize: int) -> Tensor:
    """Element of ``val`` for ``16 group + j``."""
    vector = 16 // itemsize  # values in 16 bytes
    group, j = natural >> 4, natural & (GROUP - 1)
    within = (j // vector) * (CHUNK * vector) + (group & (CHUNK - 1)) * vector + j % vector
    return (group >> 5) * (CHUNK * GROUP) + within

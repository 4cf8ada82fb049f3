"""Tournaments between active and resurrected places, with exact counts; ramps of their terms.

    quota     the n_res best of the pruned and the n_keep - n_res best of the active
    ceiling   the largest j <= n_res so that the j-th best of the pruned scores more than
              (1 + margin) times the j-th weakest of the active; those j change places

A quota is paid whatever the resurrected score; a ceiling lets through what has earned its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.sparsity import only_at, topk_mask


# -- masks -------------------------------------------------------------------------------------
def amnesty_mask(score: Tensor, mask: Tensor, n_keep: int, n_resurrected: int) -> Tensor:
    """The tournament with a quota: active compete with active, resurrected with resurrected.

    The best ``n_keep - n_resurrected`` of the active and the best ``n_resurrected`` of the pruned
    places win. Places that one group cannot fill go to the other group's best.

    Args:
        score: floating point, any shape, free of NaN; higher wins, ties fall to the lower index.
        mask: bool, shape of ``score``, True = active before the commit.
        n_keep: places that are active afterwards, in [0, score.numel()].
        n_resurrected: of these, the places reserved for the resurrected.

    Returns:
        bool mask with exactly ``n_keep`` True entries.

    Source: RESU, n_res = int(r n_keep); leftovers go first to the other group's best.
    """
    n_active = int(mask.sum())
    n_pruned = mask.numel() - n_active
    from_pruned = min(n_resurrected, n_pruned, n_keep)
    from_active = min(n_keep - from_pruned, n_active)
    from_pruned = n_keep - from_active  # leftovers of the active group
    winners_active = topk_mask(only_at(score, mask), from_active)
    winners_pruned = topk_mask(only_at(score, ~mask), from_pruned)
    return winners_active | winners_pruned


def ceiling_mask(
    score: Tensor, mask: Tensor, n_keep: int, n_resurrected: int, margin: float = 0.0
) -> Tensor:
    """The tournament with a ceiling: a resurrected place displaces only a clearly weaker one.

    The best ``n_keep`` of the active hold the places. Places that they cannot fill go to the best
    of the pruned without a contest and count against ``n_resurrected``. For the rest of it, the
    next best of the pruned displace the weakest holders, as long as each scores more than
    ``(1 + margin)`` times the one it displaces. With ``margin=0`` and nothing to limit it, this is
    the plain choice of the ``n_keep`` highest scores, with ties for the active.

    Args:
        score: floating point, any shape, free of NaN, >= 0 where ``margin`` > 0; higher wins, ties
            fall to the lower index.
        mask: bool, shape of ``score``, True = active before the commit.
        n_keep: places that are active afterwards, in [0, score.numel()].
        n_resurrected: the most that may come back, unless more places would stay empty.
        margin: by how much a displacing score has to be higher, relative to the other, >= 0.

    Returns:
        bool mask with exactly ``n_keep`` True entries.
    """
    n_active = int(mask.sum())
    holders = min(n_keep, n_active)
    vacant = n_keep - holders
    most = min(n_resurrected - vacant, mask.numel() - n_active - vacant, holders)
    displaced = 0
    if most > 0:
        challengers = torch.topk(score[~mask], vacant + most).values[vacant:]  # best first
        weakest_first = torch.topk(score[mask], n_active - holders + most, largest=False).values
        beaten = challengers > weakest_first[n_active - holders :] * (1.0 + margin)
        # challengers fall and holders rise, so that True comes before False
        displaced = int(beaten.sum())
    winners_active = topk_mask(only_at(score, mask), holders - displaced)
    winners_pruned = topk_mask(only_at(score, ~mask), vacant + displaced)
    return winners_active | winners_pruned


# -- their terms over the cycles -----------------------------------------------------------------
def linear_ramp(cycle: int, cycles: int, start: float, end: float) -> float:
    """``start - (start - end) * cycle / (cycles - 1)``: ``start`` first, ``end`` last.

    Args:
        cycle: number of the cycle, in [0, cycles).
        cycles: number of cycles, >= 1; an only cycle is the last one and gets ``end``.
        start: value in the first cycle.
        end: value in the last cycle.

    Raises:
        ArgumentError: ``cycle`` or ``cycles`` is out of range.
    """
    if cycles < 1:
        raise ArgumentError(f"cycles: expected at least 1, got {cycles!r}")
    if not 0 <= cycle < cycles:
        raise ArgumentError(f"cycle: expected a number in [0, {cycles}), got {cycle!r}")
    if cycle == cycles - 1:
        return end  # to the bit
    return start - (start - end) * cycle / (cycles - 1)


def linear_budget(cycle: int, cycles: int, start: float = 0.10, end: float = 0.02) -> float:
    """Budget of a cycle: ``start`` in the first, ``end`` in the last; see ``linear_ramp``.

    Source: RESU, r(c) = r_start - (r_start - r_end) c / C, with C - 1 for C, so that the last
    cycle reaches r_end.
    """
    return linear_ramp(cycle, cycles, start, end)


def linear_margin(cycle: int, cycles: int, start: float, end: float = 0.0) -> float:
    """Margin of a cycle's ceiling: ``start`` in the first, ``end`` in the last."""
    return linear_ramp(cycle, cycles, start, end)

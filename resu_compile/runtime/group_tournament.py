"""The tournament under an N:M pattern: exchanges inside groups, so that each keeps exactly N.

    exchange j of a group   the j-th best of its pruned places takes the place of the j-th weakest
                            of its active ones; its gain is the difference of their scores
    quota                   the n_res exchanges of the highest gain, whatever it is
    ceiling                 of those whose resurrected score is over (1 + margin) times the other

Of all masks that keep the pattern and bring back as many, the one that is found has the highest
sum of scores. With one group, it is the tournament of ``runtime/tournament.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.comparison import Pattern, RowLayout
from resu_compile.sparsity import only_at, topk_mask


def pattern_tournament(
    score: Tensor,
    mask: Tensor,
    layout: RowLayout,
    pattern: Pattern,
    n_resurrected: int,
    *,
    ceiling: bool = False,
    margin: float = 0.0,
) -> Tensor:
    """Mask of a commit that keeps N of each M consecutive inputs.

    Args:
        score: floating point, shape of the weight, finite, >= 0 where ``margin`` > 0.
        mask: bool, shape of ``score``, True = active before the commit.
        layout: which dimensions run along the input; M divides ``layout.group_length``.
        pattern: N:M.
        n_resurrected: places of the whole weight for the resurrected; see ``group_tournament``.
        ceiling: let a resurrected place through only if it beats the active one by ``margin``.
        margin: of the ceiling, relative, >= 0.

    Returns:
        bool mask of the shape of ``score`` with exactly N True entries in each group.
    """

    def grouped(tensor: Tensor) -> Tensor:
        return layout.to_rows(tensor, channels_last=True).reshape(-1, pattern.group)

    kept = group_tournament(
        grouped(score),
        grouped(mask),
        pattern.keep,
        n_resurrected,
        ceiling=ceiling,
        margin=margin,
    )
    return layout.from_rows(kept.reshape(-1, layout.in_features), channels_last=True)


def group_tournament(
    score: Tensor,
    mask: Tensor,
    keep: int,
    n_resurrected: int,
    *,
    ceiling: bool = False,
    margin: float = 0.0,
) -> Tensor:
    """The tournament with an exact count in each row.

    The best ``keep`` of a group's active hold its places. Places that they cannot fill go to the
    best of its pruned without a contest and count against ``n_resurrected``. The rest of it goes to
    the exchanges of the highest gain over all groups; ties fall to the lower group, and inside a
    group the lower index counts as the better of equal ones.

    Args:
        score: floating point, (groups, M), finite, >= 0 where ``margin`` > 0; higher wins.
        mask: bool, (groups, M), True = active before the commit.
        keep: N, active places of each group afterwards, in [0, M].
        n_resurrected: places for the resurrected in all groups together, as far as there are
            exchanges.
        ceiling: let a resurrected place through only if its score is over ``(1 + margin)`` times
            that of the active one it displaces.
        margin: of the ceiling, >= 0.

    Returns:
        bool mask (groups, M) with exactly ``keep`` True entries in each row.
    """
    size = score.shape[-1]
    n_active = mask.sum(-1, keepdim=True)  # (groups, 1)
    holders = n_active.clamp(max=keep)
    vacant = keep - holders
    active_rank, active_score = _ranked(score, mask)
    pruned_rank, pruned_score = _ranked(score, ~mask)

    steps = torch.arange(min(keep, size - keep), device=score.device)  # exchanges of one group
    possible = (steps < holders) & (steps < size - n_active - vacant)  # (groups, steps)
    weakest = active_score.gather(-1, (holders - 1 - steps).clamp(min=0))
    challenger = pruned_score.gather(-1, (vacant + steps).clamp(max=size - 1))
    if ceiling:
        possible = possible & (challenger > weakest * (1.0 + margin))
    most = max(n_resurrected - int(vacant.sum()), 0)
    # gains fall along a group: its exchanges are taken in order
    gain = only_at(challenger - weakest, possible)
    taken = topk_mask(gain, min(most, int(possible.sum())))
    exchanged = taken.sum(-1, keepdim=True)
    return (active_rank < holders - exchanged) | (pruned_rank < vacant + exchanged)


def _ranked(score: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each entry of a row, ``places`` first and the best of them 0; scores by rank."""
    inside = only_at(score, places)
    order = torch.argsort(inside, dim=-1, descending=True, stable=True)
    ranked = score.gather(-1, order)
    small = torch.int16 if score.shape[-1] <= torch.iinfo(torch.int16).max else torch.int64
    return torch.argsort(order, dim=-1).to(small), ranked  # four ranks of a weight are held at once

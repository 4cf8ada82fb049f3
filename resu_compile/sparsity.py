"""Masks from scores, with exact counts.

    n_keep = int((1 - s) N);  ties fall to the lower index

The k-th largest score is found by selection, not by sorting index lists; everything above it is
kept, and of the scores equal to it as many as are still missing, in index order. The same scores
therefore give the same mask on every device and in every run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError


def keep_count(numel: int, sparsity: float) -> int:
    """How many of ``numel`` weights stay active: ``int((1 - sparsity) * numel)``, to the letter."""
    return int((1.0 - sparsity) * numel)


def topk_mask(score: Tensor, k: int) -> Tensor:
    """True at the ``k`` highest scores; ties fall to the lower row-major index.

    Args:
        score: floating point, any shape, free of NaN. ``-inf`` marks places that come last.
        k: number of True entries, in [0, score.numel()].

    Returns:
        bool mask of the shape of ``score`` with exactly ``k`` True entries.

    Raises:
        ArgumentError: if ``k`` is out of range.
    """
    numel = score.numel()
    if not 0 <= k <= numel:
        raise ArgumentError(f"k: expected an integer in [0, {numel}], got {k}")
    if k == numel:
        return torch.ones_like(score, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.detach().reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()  # exact, and selection is implemented for float32 on every device
    threshold = torch.kthvalue(flat, numel - k + 1).values
    above = flat > threshold
    ties = flat == threshold
    missing = k - above.sum()  # stays on the device: no synchronisation
    mask = above | (ties & (ties.cumsum(0) <= missing))
    return mask.view(score.shape)


def global_topk_masks(
    scores: Mapping[str, Tensor], keep: int, floors: Mapping[str, int]
) -> dict[str, Tensor]:
    """One threshold over all ``scores``, while no weight falls under its floor.

    Each weight's ``floors[name]`` best entries are kept first; the rest of ``keep`` goes to the
    best of all remaining entries. Ties fall to the earlier weight, then to the lower index.

    Args:
        scores: name -> score tensor, any shapes; all on one device.
        keep: total number of entries to keep over all weights.
        floors: name -> least number of entries that weight keeps.

    Returns:
        name -> bool mask; the masks hold ``max(keep, sum of floors)`` True entries in total.
    """
    reserved = {name: topk_mask(score, floors[name]) for name, score in scores.items()}
    open_slots = max(keep - sum(floors[name] for name in scores), 0)
    rest = torch.cat(
        [
            score.float().masked_fill(reserved[name], -torch.inf).reshape(-1)
            for name, score in scores.items()
        ]
    )
    chosen = topk_mask(rest, open_slots)
    masks: dict[str, Tensor] = {}
    start = 0
    for name, score in scores.items():
        end = start + score.numel()
        masks[name] = reserved[name] | chosen[start:end].view(score.shape)
        start = end
    return masks

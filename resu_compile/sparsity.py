"""Masks from scores, with exact counts.

    n_keep = int((1 - s) N);  ties fall to the lower index

The k-th largest score is found by selection (on CUDA by radix histograms), not by sorting index
lists; everything above it is kept, and of the scores equal to it as many as are still missing, in
index order. The same scores therefore give the same mask on every device and in every run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels.radix_select import topk_mask_reference


def keep_count(numel: int, sparsity: float) -> int:
    """How many of ``numel`` weights stay active: ``int((1 - sparsity) * numel)``, to the letter."""
    return int((1.0 - sparsity) * numel)


def topk_mask(score: Tensor, k: int, first: Tensor | None = None) -> Tensor:
    """True at the ``k`` highest scores; ties fall to the lower row-major index.

    Args:
        score: floating point, any shape, free of NaN.
        k: number of True entries, in [0, score.numel()].
        first: bool, shape of ``score``; these places come before all others, whatever they score.

    Returns:
        bool mask of the shape of ``score`` with exactly ``k`` True entries.

    Raises:
        ArgumentError: if ``k`` is out of range.
    """
    numel = score.numel()
    if not 0 <= k <= numel:
        raise ArgumentError(f"k: expected an integer in [0, {numel}], got {k}")
    if first is not None:
        n_first = int(first.sum())
        if k <= n_first:
            return topk_mask(only_at(score, first), k)
        return first | topk_mask(only_at(score, ~first), k - n_first)
    if score.is_cuda and score.is_floating_point():  # 16 bits as they are
        mask: Tensor = torch.ops.resu_compile.topk_mask.default(score.detach(), k)
        return mask
    return topk_mask_reference(_as_float(score), k)


def only_at(score: Tensor, places: Tensor) -> Tensor:
    """``score`` at ``places`` and ``-inf`` elsewhere; its own ``-inf`` still rank above those."""
    return score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~places, -torch.inf)


def _as_float(score: Tensor) -> Tensor:
    """float64 stays; all else becomes float32, which is exact for 16 bits and known everywhere."""
    score = score.detach()
    return score if score.dtype == torch.float64 else score.float()


def global_topk_masks(
    scores: Mapping[str, Tensor],
    keep: int,
    floors: Mapping[str, int],
    first: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One threshold over all ``scores``, while no weight falls under its floor.

    Each weight's ``floors[name]`` best entries are kept first; the rest of ``keep`` goes to the
    best of all remaining entries. Ties fall to the earlier weight, then to the lower index.

    Args:
        scores: name -> score tensor free of NaN, any shapes; all on one device.
        keep: total number of entries to keep over all weights.
        floors: name -> least number of entries that weight keeps.
        first: name -> bool mask of the places that come before all others, whatever they score.

    Returns:
        name -> bool mask; the masks hold ``max(keep, sum of floors)`` True entries in total.
    """
    if first is None:
        first = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    reserved = {name: topk_mask(scores[name], floors[name], first[name]) for name in scores}
    flat = torch.cat([_as_float(score).reshape(-1) for score in scores.values()])  # cat promotes
    taken = torch.cat([reserved[name].reshape(-1) for name in scores])
    leading = torch.cat([first[name].reshape(-1) for name in scores]) & ~taken
    open_slots = max(keep - sum(floors[name] for name in scores), 0)
    n_leading = int(leading.sum())
    if open_slots <= n_leading:
        chosen = topk_mask(only_at(flat, leading), open_slots)
    else:
        chosen = leading | topk_mask(only_at(flat, ~(leading | taken)), open_slots - n_leading)
    sizes = [score.numel() for score in scores.values()]
    return {
        name: reserved[name] | part.view(reserved[name].shape)
        for name, part in zip(scores, chosen.split(sizes), strict=True)
    }

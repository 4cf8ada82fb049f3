"""DSnoT: prune, then exchange pruned and kept places until each output is nearly as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from resu_compile.errors import ArgumentTypeError, check_choice, check_integer, check_number
from resu_compile.methods.registry import check_blocks, register_method

if TYPE_CHECKING:
    from resu_compile.calibration.block import Block

_LEAST_VARIANCE = 1e-12  # an input that never changes has none to divide by


@register_method("dsnot")
@dataclass(frozen=True)
class DSnoT:
    """Start from a mask and exchange entries of each row, without training any weight.

        E_ij = W_ij * t_j       t_j = mean over samples of the sum over tokens of x_j
        err  = sum of E_ij over the pruned j of row i

    One exchange: of the pruned entries grow that of the largest E/v_j (err > 0) or of the smallest
    (err < 0), v_j the variance of x_j over all tokens; of the kept entries whose E has the sign
    opposite to err prune that of the lowest Wanda score; err += E[pruned] - E[grown]. A row stops
    at |err| <= ``threshold``, after ``cycles`` exchanges, or when one side has no candidate. An
    entry moves at most once. With a pattern N:M both entries are of one group of M. The weights
    that stay keep their values.

    In the SPARSE phase, where pruned weights hold zeros, only active places take part.

    Attributes:
        initial: score of the mask to start from, lowest of each row: ``"wanda"`` or
            ``"magnitude"``.
        skip: names or globs of weights or modules that keep their initial mask.
        cycles: most exchanges of a row, >= 0.
        threshold: |err| at which a row is good enough, >= 0.
        blocks: as in ``Wanda``.

    Source: Zhang et al. 2023, https://arxiv.org/abs/2310.08915; zyxxmu/DSnoT, lib/prune.py, which
    leaves the weights of MLPs at their initial mask (here: ``skip``) and weighs the variances of
    calls by their tokens, where here one variance is taken over all tokens, so that it does not
    depend on how the data are batched.
    """

    initial: Literal["wanda", "magnitude"] = "wanda"
    skip: str | Sequence[str] = ()
    cycles: int = 50
    threshold: float = 0.1
    blocks: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice(self.initial, ("magnitude", "wanda"), name="initial")
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, (list, tuple)) or not all(isinstance(s, str) for s in skip):
            raise ArgumentTypeError(f"skip: expected names or globs, got {self.skip!r}")
        object.__setattr__(self, "skip", tuple(skip))
        check_integer(self.cycles, name="cycles")
        check_number(self.threshold, name="threshold", minimum=0.0, expected="a number >= 0")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    def prune(self, block: Block) -> dict[str, Tensor]:
        """Masks of the weights of ``block``."""
        from resu_compile.selection import matches

        statistics = block.statistics(moments=True)
        layouts = {name: found.layout for name, found in statistics.items()}
        size = {name: weight.detach().abs().float() for name, weight in block.weights.items()}
        wanda = {name: size[name] * found.norm for name, found in statistics.items()}
        masks = block.lowest_masks(wanda if self.initial == "wanda" else size, layouts)
        pattern = block.request.pattern
        for name, found in statistics.items():
            if any(matches(p, alias) for p in self.skip for alias in block.aliases[name]):
                continue
            assert found.total is not None
            assert found.variance is not None
            energy = block.weights[name].detach().float() * found.total
            active = block.request.active.get(name)
            movable = torch.ones_like(masks[name]) if active is None else active.to(energy.device)
            layout, last = found.layout, pattern is not None
            parts = (energy, found.variance, wanda[name], masks[name], movable)
            rows = exchange(
                *(layout.to_rows(part, channels_last=last) for part in parts),
                cycles=self.cycles,
                threshold=self.threshold,
                group=pattern.group if pattern else None,
            )
            masks[name] = layout.from_rows(rows, channels_last=last)
        return masks


def exchange(
    energy: Tensor,
    variance: Tensor,
    score: Tensor,
    mask: Tensor,
    movable: Tensor,
    *,
    cycles: int,
    threshold: float,
    group: int | None = None,
) -> Tensor:
    """Exchange pruned and kept entries of all rows at once; see ``DSnoT``.

    Args:
        energy: (rows, columns), E.
        variance: (rows, columns), v >= 0.
        score: (rows, columns), Wanda scores; of the kept entries the lowest goes.
        mask: bool (rows, columns), True = kept, to start from.
        movable: bool (rows, columns); other entries are not grown.
        cycles: most exchanges of a row.
        threshold: a row stops at |err| <= threshold.
        group: M of a pattern: both entries of an exchange are of one group of M columns.

    Returns:
        bool (rows, columns) with as many True in each row as ``mask`` has.
    """
    mask = mask.clone()
    pruned_first, kept_first = ~mask & movable, mask.clone()
    error = energy.masked_fill(mask, 0.0).sum(-1, keepdim=True)  # (rows, 1)
    ratio = energy / variance.clamp(min=_LEAST_VARIANCE)
    group_of = torch.arange(energy.shape[-1], device=energy.device) // (group or 1)
    for _ in range(cycles):
        positive = error > 0
        prunable = kept_first & torch.where(positive, energy < 0, energy > 0)
        growable = pruned_first
        if group is not None:
            possible = prunable.unflatten(-1, (-1, group)).any(-1)  # (rows, groups)
            growable = growable & possible.repeat_interleave(group, -1)
        gain = torch.where(positive, ratio, -ratio).masked_fill(~growable, -torch.inf)
        grown = gain.argmax(-1, keepdim=True)  # (rows, 1)
        if group is not None:
            prunable = prunable & (group_of == group_of[grown])
        pruned = score.masked_fill(~prunable, torch.inf).argmin(-1, keepdim=True)
        going = (
            (error.abs() > threshold)
            & growable.any(-1, keepdim=True)
            & prunable.any(-1, keepdim=True)
        )
        if not bool(going.any()):
            break
        change = energy.gather(-1, pruned) - energy.gather(-1, grown)
        error = torch.where(going, error + change, error)
        for places, value in ((grown, True), (pruned, False)):
            mask.scatter_(-1, places, torch.where(going, value, mask.gather(-1, places)))
        pruned_first.scatter_(-1, grown, pruned_first.gather(-1, grown) & ~going)
        kept_first.scatter_(-1, pruned, kept_first.gather(-1, pruned) & ~going)
    return mask

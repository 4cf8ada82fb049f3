"""SNFS: weights move to where the momentum of the gradient is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from resu_compile.methods.criteria import Criterion, Places, get_criterion, scored
from resu_compile.methods.drop_and_grow import DropAndGrow
from resu_compile.methods.registry import register_method

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run

CAP = 0.99  # of a weight's free places


@register_method("snfs")
@dataclass(frozen=True)
class SNFS(DropAndGrow):
    """Sparse networks from scratch: places move between layers too.

        drop    ceil(f n_active) lowest |w| of each weight, f from 0.5 by a cosine to 0.005
        share   what was dropped, by the mean |m| of each weight's active places; at most 0.99 of
                the free places of one, the rest goes round again
        grow    by |m| of the missing; ``grow="adam_momentum"`` takes |m| / (sqrt(v) + 1e-8) for
                both, as the source does beside Adam

    Gradients are dense on every step before ``stop``: m is their mean with decay 0.9, kept beside
    the optimizer, whose own state stays 0 at pruned places. The total of active places is constant.
    The source updates at the end of each epoch; here every ``every`` steps up to ``stop``.

    Source: Dettmers and Zettlemoyer 2019, https://arxiv.org/abs/1907.04840;
    TimDettmers/sparse_learning, core.py
    """

    fraction: float = 0.5
    fraction_end: float = 0.005
    grow: str | Criterion = "momentum"
    label: ClassVar[str] = "snfs"

    def new_masks(self, run: Run) -> Iterator[tuple[str, Tensor]]:
        """Drop in each weight, share out the places, grow."""
        fraction = self.fraction_now(run)
        counts, importance, free = {}, {}, {}
        for places in run.trained_places():
            active = int(places.mask.sum())
            counts[places.name] = min(math.ceil(fraction * active), active)
            free[places.name] = places.mask.numel() - active + counts[places.name]
            importance[places.name] = self._importance(places)
        grown = shared_out(sum(counts.values()), importance, free)
        for places in run.trained_places():
            yield places.name, self.swapped(places, counts[places.name], grown[places.name])

    def _importance(self, places: Places) -> float:
        if not bool(places.mask.any()):
            return 0.0
        return float(scored(get_criterion(self.grow), places)[places.mask].double().mean())


def shared_out(
    total: int, importance: dict[str, float], free: dict[str, int], cap: float = CAP
) -> dict[str, int]:
    """``total`` places among the weights in proportion to ``importance``; the sum is exact.

    Args:
        total: places to give, at most the sum of ``free``.
        importance: weight name -> its claim, >= 0.
        free: weight name -> places that it has.
        cap: share of them that it gets at most, unless the others are full too.

    Returns:
        weight name -> its number. Parts of a place go to the largest fraction first, of equal ones
        to the earlier weight.
    """
    given = dict.fromkeys(free, 0)
    for limit in ({name: int(cap * count) for name, count in free.items()}, free):
        while sum(given.values()) < total:
            left = total - sum(given.values())
            open_names = [name for name in free if given[name] < limit[name]]
            if not open_names:
                break
            claims = {name: importance[name] for name in open_names}
            scale = sum(claims.values())
            exact = {n: left * (c / scale if scale else 1 / len(claims)) for n, c in claims.items()}
            parts = {name: int(value) for name, value in exact.items()}
            rest = sorted(open_names, key=lambda n: parts[n] - exact[n])
            for name in rest[: left - sum(parts.values())]:
                parts[name] += 1
            for name, part in parts.items():
                given[name] = min(given[name] + part, limit[name])
    return given

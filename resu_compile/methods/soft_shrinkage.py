"""Iterative soft shrinkage: the smallest weights are shrunk a little at a time, then pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from resu_compile.errors import check_number
from resu_compile.methods.gmp import cubic_sparsity
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import TrainingMethod, check_when, span_of, steps_of
from resu_compile.phase import Phase
from resu_compile.sparsity import keep_count, topk_mask

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("soft_shrinkage")
@dataclass(frozen=True)
class SoftShrinkage(TrainingMethod):
    """Train dense; every few steps the smallest weights lose a share of their magnitude.

        w <- (1 - shrink) w  at the s_t n smallest |w| of a weight with n entries

    A weight that grows against it leaves the set. s_t rises to the sparsity by the cubic of gradual
    pruning; at ``stop`` the rest is pruned for good. The source shrinks at a constant share; the
    ramp is a choice made here.

    Source: after Wang et al. 2023 (ISS-P), https://arxiv.org/abs/2303.09650

    Attributes:
        shrink: share of the magnitude that goes, in [0, 1].
        every: steps between two shrinkages: an int, or a float, the share of all steps.
        start: the first: an int or a share.
        stop: the pruning: an int or a share.
    """

    shrink: float = 0.1
    every: int | float = 10
    start: int | float = 0.1
    stop: int | float = 0.75

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_number(self.shrink, name="shrink", minimum=0.0, maximum=1.0)
        check_when(self.every, name="every", minimum=1)
        check_when(self.start, name="start")
        check_when(self.stop, name="stop")

    def settled(self, run: Run) -> int:
        """The step of the pruning."""
        return span_of(self.start, self.stop, run.steps)[1]

    def begin(self, run: Run) -> None:
        """Prune here, if ``stop`` is 0."""
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        """Shrink or prune, if it is time."""
        start, stop = span_of(self.start, self.stop, run.steps)
        every = max(steps_of(self.every, run.steps), 1)
        if run.step == stop:
            run.prune()
        elif start <= run.step < stop and (run.step - start) % every == 0:
            count = max((stop - start) // every, 1)
            sparsity = cubic_sparsity(
                run.step,
                start=start,
                every=every,
                count=count,
                initial=0.0,
                final=run.config.sparsity,
            )
            self._shrink(run, sparsity)

    def _shrink(self, run: Run, sparsity: float) -> None:
        with torch.no_grad():
            for places in run.places():
                keep = keep_count(places.mask.numel(), sparsity)
                large = topk_mask(places.weight.abs(), keep)
                places.weight.copy_(
                    torch.where(large, places.weight, places.weight * (1.0 - self.shrink))
                )

    def finish(self, run: Run) -> None:
        """Prune now, if the run ends before its time."""
        if run.controller.phase is Phase.DENSE:
            run.prune()

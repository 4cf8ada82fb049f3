"""Gradual magnitude pruning: a sparsity that rises fast at first and slowly at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from resu_compile.errors import ArgumentError, check_flag, check_share
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import TrainingMethod, check_when, span_of, steps_of
from resu_compile.phase import Phase

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


def cubic_sparsity(
    step: int, *, start: int, every: int, count: int, initial: float, final: float
) -> float:
    """Sparsity after ``step`` steps: ``s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3``, clamped.

    Args:
        step: t, optimizer steps done.
        start: t0, the first pruning.
        every: dt, steps between two prunings.
        count: n, prunings after the first; 0 prunes to ``final`` at once.
        initial: s_i.
        final: s_f.

    Source: Zhu and Gupta 2017, eq. 1, https://arxiv.org/abs/1710.01878
    """
    progress = min(max((step - start) / (count * every), 0.0), 1.0) if count else 1.0
    return final + (initial - final) * (1.0 - progress) ** 3


@register_method("gmp")
@dataclass(frozen=True)
class GMP(TrainingMethod):
    """Prune by magnitude every ``every`` steps, up to the cubic sparsity; train in between.

    Weights may return: a pruned weight rests with the value that it had, which the forward pass
    does not see and the optimizer does not move, and each pruning ranks the resting with the
    active. One that ranks high enough comes back with its value and optimizer state 0. This is
    the source's form; there, resting weights also drift by momentum and weight decay, here they do
    not. It costs a copy of each weight until the last pruning; ``returns=False`` spares it: what
    is pruned is then 0 for good.

    Source: Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878

    Attributes:
        every: steps between two prunings: an int, or a float, the share of all steps.
        start: the first pruning: an int or a share.
        stop: the last one is at the latest here: an int or a share.
        initial: sparsity of the first pruning, in [0, 1).
        returns: whether pruned weights may come back.
    """

    every: int | float = 50
    start: int | float = 0.1
    stop: int | float = 0.75
    initial: float = 0.0
    returns: bool = True

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_when(self.every, name="every", minimum=1)
        check_when(self.start, name="start")
        check_when(self.stop, name="stop")
        check_share(self.initial, name="initial")
        check_flag(self.returns, name="returns")

    def _plan(self, run: Run) -> tuple[int, int, int]:
        """First pruning, steps between two, number of further ones."""
        start, stop = span_of(self.start, self.stop, run.steps)
        every = max(steps_of(self.every, run.steps), 1)
        return start, every, max((stop - start) // every, 0)

    def settled(self, run: Run) -> int:
        """The step of the last pruning."""
        start, every, count = self._plan(run)
        return start + every * count

    def sparsity_at(self, run: Run) -> float:
        """What the next pruning prunes to."""
        start, every, count = self._plan(run)
        return cubic_sparsity(
            run.step,
            start=start,
            every=every,
            count=count,
            initial=self.initial,
            final=run.config.sparsity,
        )

    def begin(self, run: Run) -> None:
        """Prune here, if the first pruning is to be at step 0."""
        if self.initial > run.config.sparsity:
            raise ArgumentError(
                f"initial: expected at most {run.config.sparsity:g}, the sparsity of the run, got "
                f"{self.initial!r}"
            )
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        """Prune, if it is time."""
        start, every, _ = self._plan(run)
        last = self.settled(run)
        if start <= run.step <= last and (run.step - start) % every == 0:
            self._prune(run, self.sparsity_at(run))
        if run.step >= last:
            run.master = None  # what rests now rests for good

    def _prune(self, run: Run, sparsity: float) -> None:
        if sparsity == 0.0:
            return
        if run.master is not None:
            run.master.take(run.controller.masks)
            run.master.show()
        elif self.returns:
            run.keep_values()
        run.prune(sparsity)

    def finish(self, run: Run) -> None:
        """Prune to the final sparsity, if the run ends before its time."""
        if run.controller.phase is Phase.DENSE or run.step < self.settled(run):
            self._prune(run, run.config.sparsity)

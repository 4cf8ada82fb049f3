"""Dynamic sparse training: every so often the worst active places give way to others.

    drop the n lowest drop scores of the active,  n = int(f n_active)
    grow the n highest grow scores of all that are then not active

A place that was just dropped may grow again at once; it then keeps its value and its optimizer
state. All other new places start with value and state 0. Under an N:M pattern each group grows as
many as it has lost.

Source: google-research/rigl, rigl/sparse_optimizers_base.py
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from resu_compile.errors import check_choice, check_flag, check_number
from resu_compile.methods.criteria import Criterion, Needs, Places, get_criterion, scored
from resu_compile.methods.training_method import TrainingMethod, check_when, steps_of
from resu_compile.sparsity import only_at, topk_mask

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run

log = logging.getLogger(__name__)


# -- one weight --------------------------------------------------------------------------------
def drop_and_grow(
    mask: Tensor, drop: Tensor, grow: Tensor, n_drop: int, n_grow: int | None = None
) -> Tensor:
    """The mask after ``n_drop`` places were dropped and ``n_grow`` have grown.

    Args:
        mask: bool, any shape, True = active.
        drop: floating point, shape of ``mask``, free of NaN; the lowest go. Of equal ones, the
            higher index goes.
        grow: the same; the highest come, of equal ones the lower index.
        n_drop: in [0, number of active places].
        n_grow: at most the number of places that are then free; None is ``n_drop``.

    Returns:
        bool mask.
    """
    kept = topk_mask(only_at(drop, mask), int(mask.sum()) - n_drop)
    return kept | topk_mask(only_at(grow, ~kept), n_drop if n_grow is None else n_grow)


# -- how much ----------------------------------------------------------------------------------
def constant(_progress: float) -> float:
    """1 all the time."""
    return 1.0


def cosine(progress: float) -> float:
    """``(1 + cos(pi t)) / 2``: from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """``1 - t``."""
    return 1.0 - progress


DECAYS: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
}


# -- the method --------------------------------------------------------------------------------
@dataclass(frozen=True)
class DropAndGrow(TrainingMethod):
    """What SET, RigL, SNFS and MEST have in common.

    Attributes:
        fraction: share f of each weight's active places that is dropped, in [0, 1].
        every: steps between two updates: an int, or a float, the share of all steps.
        start: no update up to this step: an int or a share.
        stop: no update from this step on: an int or a share.
        decay: of f, from the first step to ``stop``: a name of ``DECAYS``.
        fraction_end: what f decays to, in [0, ``fraction``].
        drop: criterion of those that go; a name of ``CRITERIA`` or an object.
        grow: criterion of those that come.
        replaces_step: True updates in place of an optimizer step, as RigL does. False updates
            after the step, or before it if a criterion looks at the gradient.
    """

    fraction: float = 0.3
    every: int | float = 100
    start: int | float = 0
    stop: int | float = 0.75
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    fraction_end: float = 0.0
    drop: str | Criterion = "magnitude"
    grow: str | Criterion = "random"
    replaces_step: bool = False
    label: ClassVar[str] = "update"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_number(self.fraction, name="fraction", minimum=0.0, maximum=1.0)
        check_number(self.fraction_end, name="fraction_end", minimum=0.0, maximum=self.fraction)
        check_when(self.every, name="every", minimum=1)
        check_when(self.start, name="start")
        check_when(self.stop, name="stop")
        check_choice(self.decay, DECAYS, name="decay")
        get_criterion(self.drop, name="drop")
        get_criterion(self.grow, name="grow")
        check_flag(self.replaces_step, name="replaces_step")

    # -- when ----------------------------------------------------------------------------------
    def settled(self, run: Run) -> int:
        """The step of ``stop``."""
        return steps_of(self.stop, run.steps)

    def update_steps(self, run: Run) -> Collection[int]:
        """When the masks are to be updated: at so many steps done."""
        every = max(steps_of(self.every, run.steps), 1)
        first = every * (steps_of(self.start, run.steps) // every + 1)
        return range(first, self.settled(run), every)

    def is_due(self, run: Run) -> bool:
        """Whether the masks are updated when ``run.step`` steps are done."""
        return run.step in self.update_steps(run) or self.is_late(run)

    def is_late(self, run: Run) -> bool:
        """Whether the last step was to update, and its gradients had overflowed."""
        return run.postponed and self._is_before_step and run.step < self.settled(run)

    def fraction_now(self, run: Run) -> float:
        """f, with ``end + (f - end) decay(min(t, T) / T)``, T the step of ``stop``."""
        progress = min(run.step / max(self.settled(run), 1), 1.0)
        span = self.fraction - self.fraction_end
        return self.fraction_end + span * DECAYS[self.decay](progress)

    @property
    def _needs(self) -> set[Needs]:
        return {get_criterion(self.drop).needs, get_criterion(self.grow).needs}

    @property
    def _is_before_step(self) -> bool:
        return self.replaces_step or "gradient" in self._needs

    def needs_dense_gradient(self, run: Run) -> bool:
        """On update steps, to grow by gradient; on all steps before ``stop``, by momentum."""
        if self._needs & {"momentum", "moments"}:
            return run.step < self.settled(run)
        return get_criterion(self.grow).needs == "gradient" and self.is_due(run)

    def looks_at_gradients(self, run: Run) -> bool:
        """On the steps of updates before the step, and whenever gradients are dense."""
        return self.needs_dense_gradient(run) or (self._is_before_step and self.is_due(run))

    # -- hooks ---------------------------------------------------------------------------------
    def begin(self, run: Run) -> None:
        """A random mask."""
        if not self.update_steps(run):
            log.warning(
                "%s: no update in %d steps with every=%r, start=%r and stop=%r; masks will stay",
                self.label,
                run.steps,
                self.every,
                self.start,
                self.stop,
            )
        run.prune(method="random")

    def before_step(self, run: Run) -> bool:
        """Update now, if the gradient decides or the update takes the place of the step."""
        if self._needs & {"momentum", "moments"} and self.needs_dense_gradient(run):
            run.observe_gradients(square="moments" in self._needs)
        if not self._is_before_step or not self.is_due(run):
            return False
        self.update(run)
        return self.replaces_step

    def after_step(self, run: Run) -> None:
        """Update after the step, unless it is done before."""
        if not self._is_before_step and self.is_due(run):
            self.update(run)
        if run.step >= self.settled(run):
            run.forget_gradients()

    def update(self, run: Run) -> None:
        """Drop and grow in every weight; not before the first gradient that is finite."""
        if self._needs & {"momentum", "moments"} and "mean" not in run.memory:
            return
        run.remask(self.new_masks(run), self.label)

    def new_masks(self, run: Run) -> Iterator[tuple[str, Tensor]]:
        """Name and new mask of each weight that trains, one after another."""
        fraction = self.fraction_now(run)
        for places in run.trained_places():
            n_drop = int(fraction * int(places.mask.sum()))
            yield places.name, self.swapped(places, n_drop, n_drop)

    def swapped(self, places: Places, n_drop: int, n_grow: int) -> Tensor:
        """The mask of ``places`` after dropping and growing so many."""
        drop = scored(get_criterion(self.drop), places)
        grow = scored(get_criterion(self.grow), places)
        n_active = int(places.mask.sum())
        if places.fill is not None:  # as many as were dropped, in the groups that they left
            kept = topk_mask(only_at(drop, places.mask), n_active - n_drop)
            return places.fill(kept, grow)
        n_free = places.mask.numel() - n_active + n_drop
        return drop_and_grow(places.mask, drop, grow, n_drop, min(n_grow, n_free))

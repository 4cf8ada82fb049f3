"""One-shot pruning: train dense, prune once, train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from resu_compile.errors import ArgumentError
from resu_compile.methods.registry import (
    AnyMethod,
    get_method,
    is_calibrated,
    is_gradient_method,
    register_method,
)
from resu_compile.methods.training_method import TrainingMethod, check_when, steps_of
from resu_compile.phase import Phase

if TYPE_CHECKING:
    from resu_compile.training.config import TrainingConfig
    from resu_compile.training.method_run import Run


@register_method("one_shot")
@dataclass(frozen=True)
class OneShot(TrainingMethod):
    """Prune once by magnitude, or by another method.

    Source: Han et al. 2015, https://arxiv.org/abs/1506.02626

    Attributes:
        at: when: an int, steps, or a float, a share of all steps; 0 is before the first.
        criterion: what ``sparsify`` takes as method; calibrated ones measure ``calibration``.
    """

    keeps_pattern: ClassVar[bool] = True
    at: int | float = 0.5
    criterion: str | AnyMethod = "magnitude"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_when(self.at, name="at")
        get_method(self.criterion)

    def needs_calibration(self, config: TrainingConfig) -> bool:  # noqa: ARG002
        """If the criterion does."""
        return is_calibrated(self.criterion)

    def settled(self, run: Run) -> int:
        """The step of the pruning."""
        return steps_of(self.at, run.steps)

    def begin(self, run: Run) -> None:
        """Prune here, if it is to be at step 0."""
        if self.settled(run) > run.steps:
            raise ArgumentError(f"at: expected at most {run.steps} steps, got {self.at!r}")
        if is_gradient_method(self.criterion):
            run.controller.track_gradients()
        if self.settled(run) == 0:
            self._prune(run)

    def after_step(self, run: Run) -> None:
        """Prune, if this was the step."""
        if run.step == self.settled(run):
            self._prune(run)

    def finish(self, run: Run) -> None:
        """Prune now, if the run ends before its time."""
        if run.controller.phase is Phase.DENSE:
            self._prune(run)

    def _prune(self, run: Run) -> None:
        run.prune(method=self.criterion)
        if is_gradient_method(self.criterion):
            run.controller.forget_gradients()

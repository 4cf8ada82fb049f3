"""RESU: pruned weights train in their places and compete to come back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from resu_compile.methods.registry import AnyMethod, get_method, register_method
from resu_compile.methods.training_method import TrainingMethod

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("resu")
@dataclass(frozen=True)
class Resu(TrainingMethod):
    """The cycles of ``training/cycle.py``: warm-up, prune, resurrect, commit, recover.

    ``cycles``, ``cycle``, ``resurrection`` and the other fields of ``TrainingConfig`` are its
    settings; ``preset("published", method="resu")`` gives those of the source.

    Source: RESU (huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md)

    Attributes:
        criterion: what ``sparsify`` takes as method; calibrated ones measure ``calibration``.
    """

    keeps_pattern: ClassVar[bool] = True
    criterion: str | AnyMethod = "magnitude"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        get_method(self.criterion)

    def settled(self, run: Run) -> int:
        """Where the recovery begins."""
        from resu_compile.training.plan import Stage, build_plan

        spans = [span for span in build_plan(run.config) if span.stage is Stage.RECOVER]
        return spans[0].start if spans else run.steps

    def begin(self, run: Run) -> None:
        """Build the cycle and enter its first span."""
        self.resume(run)
        assert run.cycle is not None
        run.cycle.start()

    def resume(self, run: Run) -> None:
        """Build the cycle, whose state is loaded next."""
        from resu_compile.training.cycle import Cycle

        config = replace(run.config, method=self.criterion, method_options={})
        run.cycle = Cycle(
            run.model,
            config,
            on_event=run.hear,
            on_pause=run.on_pause,
            calibration=run.calibration,
        )

    def after_step(self, run: Run) -> None:
        """Cross the border of a span, if this is one."""
        assert run.cycle is not None
        run.cycle.step()

    def finish(self, run: Run) -> None:
        """Commit what is open."""
        if run.cycle is not None:
            run.cycle.finish()

"""RESU: pruned weights train in their places and compete to come back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from resu_compile.methods.registry import AnyMethod, get_method, is_calibrated, register_method
from resu_compile.methods.training_method import TrainingMethod

if TYPE_CHECKING:
    from resu_compile.training.config import TrainingConfig
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
    criterion: str | AnyMethod = "saliency"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        get_method(self.criterion)

    def needs_calibration(self, config: TrainingConfig) -> bool:
        """If the criterion or the commits do."""
        from resu_compile.training.data_needs import commit_measures

        commits = config.cycle.resu > 0.0 and commit_measures(self._config(config))
        return commits or is_calibrated(self.criterion)

    def _config(self, config: TrainingConfig) -> TrainingConfig:
        """That of the cycle: its method is the pruning method."""
        return replace(config, method=self.criterion, method_options={})

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

        run.cycle = Cycle(
            run.model,
            self._config(run.config),
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

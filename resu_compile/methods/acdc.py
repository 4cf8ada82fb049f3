"""AC/DC: dense and compressed phases take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from resu_compile.errors import ArgumentError, check_flag
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import TrainingMethod, check_when, steps_of
from resu_compile.phase import Phase

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("acdc")
@dataclass(frozen=True)
class ACDC(TrainingMethod):
    """Alternating compressed / decompressed training.

        dense warm-up | sparse dense sparse ... | dense, longer | sparse, to the end

    Each sparse phase begins with a pruning by magnitude among all places; each dense one lets all
    of them train, from 0 where they were pruned. Shares of training as in the source's 100 epochs:
    warm-up 10, phases 5, last dense phase 10, last sparse phase 15. Weights compete inside their
    layer, or over all layers with ``scope="global"``.

    Source: Peste et al. 2021, https://arxiv.org/abs/2106.12379

    Attributes:
        warmup: dense steps at the beginning: an int, or a float, the share of all steps.
        phase: steps of each phase in between.
        last_dense: steps of the last dense phase.
        last_sparse: steps of the last sparse phase.
        reset_optimizer: forget the optimizer's state at each switch to a dense phase.
    """

    keeps_pattern: ClassVar[bool] = True
    warmup: int | float = 0.10
    phase: int | float = 0.05
    last_dense: int | float = 0.10
    last_sparse: int | float = 0.15
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        for name in ("warmup", "last_dense"):
            check_when(getattr(self, name), name=name)
        for name in ("phase", "last_sparse"):
            check_when(getattr(self, name), name=name, minimum=1)
        check_flag(self.reset_optimizer, name="reset_optimizer")

    def switches(self, steps: int) -> dict[int, Phase]:
        """Step -> the phase that begins there, for a run of so many steps.

        Raises:
            ArgumentError: the phases do not fit into the run.
        """
        step, phase = steps_of(self.warmup, steps), max(steps_of(self.phase, steps), 1)
        final = steps - steps_of(self.last_sparse, steps)
        dense_from = final - steps_of(self.last_dense, steps)
        if dense_from < step:
            raise ArgumentError(
                f"warmup, last_dense, last_sparse: expected to fit into {steps} steps, got "
                f"{self.warmup}, {self.last_dense}, {self.last_sparse}"
            )
        found: dict[int, Phase] = {}
        sparse = True
        while step + phase <= dense_from:
            found[step] = Phase.SPARSE if sparse else Phase.DENSE
            step, sparse = step + phase, not sparse
        if dense_from < final and not sparse:  # else it is dense already
            found[step] = Phase.DENSE
        found[final] = Phase.SPARSE
        return found

    def settled(self, run: Run) -> int:
        """Where the last sparse phase begins."""
        return max(self.switches(run.steps))

    def begin(self, run: Run) -> None:
        """Switch, if there is no warm-up."""
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        """Switch, if it is time."""
        wanted = self.switches(run.steps).get(run.step)
        if wanted is Phase.SPARSE:
            run.prune()
        elif wanted is Phase.DENSE:
            run.controller.set_phase("dense")
            if self.reset_optimizer:
                run.reset_optimizer()

    def finish(self, run: Run) -> None:
        """Prune, if the run ends in a dense phase."""
        if run.controller.phase is Phase.DENSE:
            run.prune()

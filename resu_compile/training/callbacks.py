"""What a run tells others while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.runtime.commit_report import CommitReport
from resu_compile.training.densify import Pause
from resu_compile.training.distributed import is_first

if TYPE_CHECKING:
    from resu_compile.training.trainer import Trainer, TrainingResult


class Callback:
    """Methods that ``Trainer`` calls, in this order within a step; each does nothing by default.

    ``trainer.cycle`` says where the run is: ``step_index``, ``span``, ``controller``, ``history``.
    Several callbacks are called in the order in which they were given.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, or before the first one after a resume."""

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        """After each optimizer step, before the border of a span is crossed.

        Args:
            trainer: the run.
            loss: mean over the step's batches, shape (), detached; reading it waits for the device.
        """

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """After each evaluation."""

    def on_prune(self, trainer: Trainer, report: CommitReport) -> None:
        """After each pruning."""

    def on_commit(self, trainer: Trainer, report: CommitReport) -> None:
        """After each commit."""

    def on_pause(self, trainer: Trainer, pause: Pause) -> None:
        """At each pause of a densification; training goes on when all callbacks have returned."""

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        """When the run stops before its end."""

    def on_end(self, trainer: Trainer, result: TrainingResult) -> None:
        """At the end, stopped early or not."""


class ProgressBar(Callback):
    """A progress bar with stage, loss and sparsity, on rank 0.

    Args:
        every: steps between two readings of the loss, each of which waits for the device.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._bar: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Draw the bar."""
        if not is_first():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            raise ArgumentError(
                "progress: expected tqdm to be installed for a progress bar, it is not; "
                "pip install resu-compile[train]"
            ) from None
        self._bar = tqdm(
            total=trainer.config.steps,
            initial=trainer.cycle.step_index,
            unit="step",
            dynamic_ncols=True,
        )

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        """Move the bar by one step."""
        if self._bar is None:
            return
        self._bar.update()
        if self._bar.n % self.every == 0:
            span = trainer.cycle.span
            self._bar.set_description_str(str(span.stage), refresh=False)
            self._bar.set_postfix_str(f"loss {loss.item():.4f} sparsity {span.sparsity:.1%}")

    def on_end(self, trainer: Trainer, result: TrainingResult) -> None:  # noqa: ARG002
        """Leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """Give the terminal's line back."""
        if self._bar is not None:
            self._bar.close()

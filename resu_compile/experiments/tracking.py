"""Runs in TensorBoard, wherever it is installed, and in Weights & Biases, where it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.training.callbacks import Callback

if TYPE_CHECKING:
    from resu_compile.runtime.commit_report import CommitReport
    from resu_compile.training.trainer import Trainer


class Tracker(Callback):
    """Sends losses, learning rate, sparsity, evaluations and churn to ``write``."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log ``values`` at ``step``."""
        raise NotImplementedError

    def close(self) -> None:
        """The run is over, or has failed."""

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        """Every ``log_every`` steps."""
        step = trainer.cycle.step_index + 1  # of this one; it is counted after the callbacks
        if step % trainer.config.log_every:
            return
        controller = trainer.cycle.controller
        values = {"train/loss": loss.item(), "train/lr": trainer.optimizer.param_groups[0]["lr"]}
        if controller is not None:
            values["train/sparsity"] = controller.sparsity
        self.write(values, step)

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Each metric."""
        step = min(trainer.cycle.step_index + 1, trainer.config.steps)
        self.write({f"validation/{name}": value for name, value in metrics.items()}, step)

    def on_commit(self, trainer: Trainer, report: CommitReport) -> None:
        """Each change of masks."""
        step = trainer.cycle.step_index
        self.write({"masks/churn": report.overall.churn}, step)


class TensorBoard(Tracker):
    """Event files in ``folder``.

    Args:
        folder: of the run.
        start: steps that are done; what an interrupted run wrote after them is hidden.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start or None)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class WandB(Tracker):
    """A run of a Weights & Biases project.

    Args:
        project: its name.
        name: of the run.
        key: of the cell, so that a resumed run goes on in the same place.
        config: shown with it.
        folder: where Weights & Biases keeps its files.
    """

    def __init__(
        self, project: str, *, name: str, key: str, config: Mapping[str, Any], folder: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = import_wandb().init(
            project=project,
            name=name,
            id=key,
            resume="allow",
            config=dict(config),
            dir=str(folder),
            reinit=True,
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """All of one step together."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def import_wandb() -> Any:
    """The package ``wandb``.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ArgumentError(
            f"wandb: expected the package wandb for logging to it, got {error}; "
            "pip install wandb, or leave wandb out"
        ) from error


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None

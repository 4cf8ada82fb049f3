"""What a method that changes masks while the model trains is made of.

    begin        masks before the first step
    before_step  between backward() and optimizer.step(); may take the place of the step
    after_step   after optimizer.step()

The engine (``training/sparse_training.py``) calls these with the ``Run`` to work with. A
method holds its settings only; what it has to remember goes into ``run.memory``, which checkpoints
keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from resu_compile.errors import ArgumentError

if TYPE_CHECKING:
    from resu_compile.training.config import TrainingConfig
    from resu_compile.training.method_run import Run


class TrainingMethod:
    """A rule for the masks of a training run. Every hook does nothing by default.

    Attributes:
        distribution: how the sparsity is spread over the layers, unless the config says otherwise.
        scope: where weights are ranked, unless the config says otherwise.
        keeps_pattern: whether its masks are N:M where the config has a ``pattern``.
    """

    distribution: ClassVar[Literal["uniform", "er", "erk"]] = "uniform"
    scope: ClassVar[Literal["layer", "global"]] = "layer"
    keeps_pattern: ClassVar[bool] = False

    def needs_calibration(self, config: TrainingConfig) -> bool:  # noqa: ARG002
        """Whether a run by ``config`` looks at calibration data."""
        return False

    def level_steps(self, config: TrainingConfig) -> int:
        """Steps over which a learning rate is to fall: all, unless training begins again within."""
        return config.steps

    def begin(self, run: Run) -> None:
        """Choose the masks of the first step. The model is dense up to here."""

    def resume(self, run: Run) -> None:
        """Build what ``begin`` builds beside ``run.memory``; a run that began is then loaded."""

    def needs_dense_gradient(self, run: Run) -> bool:  # noqa: ARG002
        """Whether the gradient of the next step has to reach the pruned places."""
        return False

    def looks_at_gradients(self, run: Run) -> bool:
        """Whether ``before_step`` has something to do at the next step.

        Such a step needs ``after_backward()``, and is left alone where its gradients overflowed.
        """
        return self.needs_dense_gradient(run)

    def before_step(self, run: Run) -> bool:  # noqa: ARG002
        """Look at the gradients; change masks if it is time.

        Returns:
            True if this took the place of the optimizer's step, which then does nothing.
        """
        return False

    def after_step(self, run: Run) -> None:
        """Change masks if it is time; ``run.step`` counts the step that was just done."""

    def settled(self, run: Run) -> int:  # noqa: ARG002
        """The step from which on the masks stay."""
        return 0

    def finish(self, run: Run) -> None:
        """End the run, early or not: the model is left in the SPARSE phase."""


def steps_of(value: int | float, steps: int) -> int:
    """``value`` in steps: an int is a number of steps, a float a share of ``steps``."""
    return value if isinstance(value, int) else round(value * steps)


def span_of(start: int | float, stop: int | float, steps: int) -> tuple[int, int]:
    """``start`` and ``stop`` in steps, both inside a run of ``steps``.

    Raises:
        ArgumentError: it is another order, or the run is too short.
    """
    first, last = steps_of(start, steps), steps_of(stop, steps)
    if not first <= last <= steps:
        raise ArgumentError(
            f"start, stop: expected start <= stop <= {steps}, the steps of the run, got {first} "
            f"and {last}"
        )
    return first, last


def check_when(value: object, *, name: str, minimum: int = 0) -> None:
    """Check a number of steps (int) or a share of all steps (float in [0, 1])."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return
    if isinstance(value, float) and 0.0 <= value <= 1.0 and (value > 0.0 or minimum == 0):
        return
    raise ArgumentError(
        f"{name}: expected a number of steps (an int >= {minimum}) or a share of all steps "
        f"(a float in [0, 1]), got {value!r}"
    )

"""Methods whose pruned weights keep their values to the end.

Forward passes see ``M * W``, its gradient goes to all places, and the optimizer steps W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resu_compile.methods.training_method import TrainingMethod

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


class KeptValues(TrainingMethod):
    """SR-STE and Top-KAST but for what they make of gradients and masks.

    ``before_step`` changes the gradients and lends ``run.master`` to the optimizer; ``after_step``
    takes it back and hides what is pruned.
    """

    def settled(self, run: Run) -> int:
        """Never: the masks follow the weights to the end."""
        return run.steps

    def needs_dense_gradient(self, run: Run) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def begin(self, run: Run) -> None:
        """The first masks, by magnitude."""
        run.keep_values()
        run.prune()

    def finish(self, run: Run) -> None:
        """Only what the forward pass sees stays."""
        run.drop_hidden()

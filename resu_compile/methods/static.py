"""Static random masks: chosen before training, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import TrainingMethod

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("static")
@dataclass(frozen=True)
class Static(TrainingMethod):
    """A random mask from the first step to the last; ERK, or what ``distribution`` says.

    Source: Liu et al. 2022, https://arxiv.org/abs/2202.02643; VITA-Group/Random_Pruning
    """

    keeps_pattern: ClassVar[bool] = True
    distribution: ClassVar[Literal["uniform", "er", "erk"]] = "erk"

    def begin(self, run: Run) -> None:
        """Draw the mask."""
        run.prune(method="random")

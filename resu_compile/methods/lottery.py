"""The lottery ticket: train, prune, rewind, again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from resu_compile.errors import ArgumentError, check_share
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import TrainingMethod, check_when, steps_of

if TYPE_CHECKING:
    from resu_compile.training.config import TrainingConfig
    from resu_compile.training.method_run import Run


@register_method("lottery")
@dataclass(frozen=True)
class Lottery(TrainingMethod):
    """Iterative magnitude pruning with rewinding.

        level 0      train dense
        level l      prune to 1 - (1 - rate)^l, put all weights back to those of step ``rewind``,
                     reset the optimizer, train

    The steps of the run are shared out evenly over the levels, of which there are as many as the
    sparsity asks for; the last one prunes to it exactly. Weights compete over all layers. With a
    learning rate schedule, let each level have one of its own: ``level_ends(run)`` says where, and
    ``level_steps(config)`` over how many steps. ``Trainer`` begins it anew by itself.

    Source: Frankle and Carbin 2019, https://arxiv.org/abs/1803.03635; rewinding to a later step:
    Frankle et al. 2020, https://arxiv.org/abs/1912.05671; facebookresearch/open_lth

    Attributes:
        rate: share of the remaining weights that a level removes, in (0, 1).
        rewind: step of the first level that weights go back to: an int, or a float, a share of the
            level; 0 is the initialisation.
    """

    scope: ClassVar[Literal["layer", "global"]] = "global"
    rate: float = 0.2
    rewind: int | float = 0

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        if check_share(self.rate, name="rate") == 0.0:
            raise ArgumentError("rate: expected a number in (0, 1), got 0")
        check_when(self.rewind, name="rewind")

    def sparsities(self, final: float) -> list[float]:
        """The sparsity of each level, from 0 to ``final``."""
        count = max(math.ceil(round(math.log(1.0 - final) / math.log(1.0 - self.rate), 9)), 1)
        return [1.0 - (1.0 - self.rate) ** level for level in range(count)] + [final]

    def level_ends(self, run: Run) -> list[int]:
        """The steps at which a level ends and the next one begins."""
        count = len(self.sparsities(run.config.sparsity))
        return [run.steps * (level + 1) // count for level in range(count - 1)]

    def level_steps(self, config: TrainingConfig) -> int:
        """Steps of the longest level."""
        return math.ceil(config.steps / len(self.sparsities(config.sparsity)))

    def settled(self, run: Run) -> int:
        """Where the last level begins."""
        return self.level_ends(run)[-1]

    def begin(self, run: Run) -> None:
        """Remember the weights, if they are to be those of step 0."""
        levels = len(self.sparsities(run.config.sparsity))
        if run.steps < 2 * levels:
            raise ArgumentError(
                f"steps: expected at least {2 * levels}, two for each of {levels} levels that lead "
                f"to sparsity {run.config.sparsity:g} at rate={self.rate}, got {run.steps}; a "
                "higher rate takes fewer levels"
            )
        first = self.level_ends(run)[0]
        if isinstance(self.rewind, int) and self.rewind >= first:
            raise ArgumentError(
                f"rewind: expected a step of the first level, which has {first}, got {self.rewind}"
            )
        self.after_step(run)

    def after_step(self, run: Run) -> None:
        """Remember the weights, or prune and rewind, if it is time."""
        ends = self.level_ends(run)
        if run.step == min(steps_of(self.rewind, ends[0]), ends[0] - 1):
            run.memory["rewind"] = {k: v.detach().clone() for k, v in _tensors(run.model).items()}
        if run.step in ends:
            level = ends.index(run.step) + 1
            run.prune(self.sparsities(run.config.sparsity)[level])
            self._rewind(run, level)

    def _rewind(self, run: Run, level: int) -> None:
        with torch.no_grad():
            for name, value in _tensors(run.model).items():
                value.copy_(run.memory["rewind"][name])
        run.controller.refresh()  # pruned places are 0 again
        run.reset_optimizer()
        run.tell_of_rewind(level)

    def finish(self, run: Run) -> None:
        """Prune to the final sparsity, if the run ends before its last level."""
        if run.step < self.settled(run):
            run.prune()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

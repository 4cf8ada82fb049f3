"""SNIP: prune at initialisation, by what the loss of one batch says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from resu_compile.methods.criteria import Criterion, get_criterion
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import TrainingMethod

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("snip")
@dataclass(frozen=True)
class SNIP(TrainingMethod):
    """Keep the highest |g w| of the first batch, then train with these masks.

    Scores compete over all layers, and ``min_density`` of the config keeps each alive;
    ``scope="layer"`` compares inside each. The pruning takes the place of the first step: its
    gradient is that of the dense network at initialisation, of as many batches as were accumulated.

    Source: Lee et al. 2019, https://arxiv.org/abs/1810.02340

    Attributes:
        criterion: a name of ``CRITERIA`` or an object.
    """

    keeps_pattern: ClassVar[bool] = True
    scope: ClassVar[Literal["layer", "global"]] = "global"
    criterion: str | Criterion = "taylor"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        get_criterion(self.criterion)

    def settled(self, run: Run) -> int:  # noqa: ARG002
        """After the first step."""
        return 1

    def needs_dense_gradient(self, run: Run) -> bool:
        """Until the masks are there."""
        return "pruned" not in run.memory

    def before_step(self, run: Run) -> bool:
        """Prune by the first gradient."""
        if "pruned" in run.memory:
            return False
        run.prune_by(get_criterion(self.criterion))
        run.memory["pruned"] = True
        return True

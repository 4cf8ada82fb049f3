"""MEST: sparser for a moment, then random growth, in less and less of a range."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_choice, check_number
from resu_compile.methods.criteria import Criterion
from resu_compile.methods.drop_and_grow import DropAndGrow
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import steps_of

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("mest")
@dataclass(frozen=True)
class MEST(DropAndGrow):
    """Memory-economic sparse training, elastic mutation (EM) and its soft form (EM&S).

        prune each weight to the lower density, grow at random to the upper one
        EM     lower  d (1 - r),  upper  d              r = 0.2, 0.1, 0
        EM&S   lower  d,          upper  d + (1 - s) r  r = 0.5, 0.25, 0

    with d the density of the weight and s the sparsity of the run. Of 90 %, that is .92, .91, .90
    down to .90 (EM), and .90 up to .85, .875, .90 (EM&S). r advances at 9/16 and 12/16 of training;
    an update every 1/32 of it (5 epochs of 160). EM&S needs the memory of its upper density.
    ``drop="weight_and_gradient"`` is the score |w| + lambda |g| of the paper; lambda is 0 in its
    scripts, which is ``"magnitude"`` and the default.

    Source: Yuan et al. 2021, https://arxiv.org/abs/2110.14032; boone891214/MEST, prune_utils
    """

    every: int | float = 1 / 32
    stop: int | float = 13 / 16
    mode: Literal["em", "em&s"] = "em"
    ranges: tuple[float, ...] | None = None
    stages: tuple[float, ...] = (9 / 16, 12 / 16)
    drop: str | Criterion = "magnitude"
    label: ClassVar[str] = "mest"

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        super().__post_init__()
        check_choice(self.mode, ("em", "em&s"), name="mode")
        for name in ("ranges", "stages"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _shares(values, name))
        ranges, stages = self._ranges, self.stages
        if len(ranges) != len(stages) + 1 or ranges[-1] != 0.0 or sorted(stages) != list(stages):
            raise ArgumentError(
                f"ranges: expected one more than the {len(stages)} rising stages, the last one 0, "
                f"so that the run ends at its sparsity, got {ranges} and {stages}"
            )

    @property
    def _ranges(self) -> tuple[float, ...]:
        if self.ranges is not None:
            return self.ranges
        return (0.2, 0.1, 0.0) if self.mode == "em" else (0.5, 0.25, 0.0)

    def range_now(self, run: Run) -> float:
        """r, from the share of the steps that is done."""
        return self._ranges[sum(run.step >= border for border in self._borders(run))]

    def update_steps(self, run: Run) -> Collection[int]:
        """As for the others, and where a range ends: the last one brings the final sparsity."""
        return {*super().update_steps(run), *self._borders(run)}

    def is_late(self, run: Run) -> bool:
        """As for the others, and after the last border too."""
        return run.postponed and self._is_before_step

    def _borders(self, run: Run) -> list[int]:
        return [steps_of(share, run.steps) for share in self.stages]

    def settled(self, run: Run) -> int:
        """The step of ``stop``, or after the last range begins."""
        return max(super().settled(run), *(border + 1 for border in self._borders(run)))

    def new_masks(self, run: Run) -> Iterator[tuple[str, Tensor]]:
        """Prune each weight to the lower density, then grow it to the upper one."""
        share = self.range_now(run)
        for places in run.trained_places():
            total, active = places.mask.numel(), int(places.mask.sum())
            kept = run.memory["counts"][places.name]
            if self.mode == "em":
                lower, upper = int((1.0 - share) * kept), kept
            else:
                lower = kept
                upper = min(kept + int((1.0 - run.config.sparsity) * share * total), total)
            n_drop = max(active - lower, 0)
            yield places.name, self.swapped(places, n_drop, max(upper - (active - n_drop), 0))

    def finish(self, run: Run) -> None:
        """Prune to the sparsity, if the run ends denser."""
        counts = run.memory.get("counts", {})
        if any(run.controller.weights[name].nnz > count for name, count in counts.items()):
            run.prune()

    def begin(self, run: Run) -> None:
        """A random mask, whose counts are what the ranges refer to."""
        super().begin(run)
        weights = run.controller.weights
        run.memory["counts"] = {name: weight.nnz for name, weight in weights.items()}


def _shares(values: object, name: str) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise ArgumentTypeError(f"{name}: expected a sequence of numbers, got {values!r}")
    return tuple(check_number(value, name=name, minimum=0.0, maximum=1.0) for value in values)

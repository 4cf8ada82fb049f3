"""Which stage holds at which step: the plan of a training run.

    WARMUP | TRAIN  PRUNE  STABILIZE  RESU  COMMIT | ... | RECOVER
             `------------ one cycle ------------'

PRUNE and COMMIT happen between two steps: pruning where a span is sparser than what was before it,
the commit where a RESU span ends. TRAIN keeps the sparsity of the cycle before. The recovery at the
end is what makes the result good: a plan that ends in a commit ships weights that came back and
were never trained in the network that they joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from resu_compile.errors import ArgumentError
from resu_compile.runtime.tournament import linear_budget, linear_margin
from resu_compile.training.schedules import scheduled_sparsities

if TYPE_CHECKING:
    from resu_compile.training.config import TrainingConfig


class Stage(StrEnum):
    """What a span of steps is for."""

    WARMUP = "warmup"
    TRAIN = "train"
    STABILIZE = "stabilize"
    RESU = "resu"
    RECOVER = "recover"


@dataclass(frozen=True)
class Span:
    """Steps ``start`` to ``stop`` (exclusive) in one stage at one sparsity.

    Attributes:
        start: first step, counted from 0.
        stop: first step after it.
        stage: what it is for.
        cycle: the cycle that it belongs to, from 0 on; -1 before the first and after the last.
        sparsity: share of pruned weights in it; 0 is dense.
    """

    start: int
    stop: int
    stage: Stage
    cycle: int
    sparsity: float

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.stop - self.start


Plan = tuple[Span, ...]


def default_warmup(sparsity: float) -> float:
    """Share of dense training before the first cycle: ``4/3 (1 - s)``, between 0.1 and 0.4.

    The sparser the goal, the earlier the ramp has to begin (docs/training.md has the numbers).

    Args:
        sparsity: after the last cycle.
    """
    return min(max(4.0 / 3.0 * (1.0 - sparsity), 0.1), 0.4)


def cycle_sparsities(config: TrainingConfig) -> tuple[float, ...]:
    """The sparsity that each cycle of ``config`` ends with."""
    if config.densify is not None:
        return config.densify.sparsities(cycles=config.cycles, final=config.sparsity)
    return scheduled_sparsities(
        config.schedule,
        cycles=config.cycles,
        initial=config.initial_sparsity,
        final=config.sparsity,
    )


def cycle_budgets(config: TrainingConfig) -> tuple[float, ...]:
    """The budget of each cycle's commit: linear, and the last cycle's is ``budget_end``.

        r(c) = r_start - (r_start - r_end) c / (C - 1)

    A single cycle takes ``budget_end``.

    Source: RESU divides by C instead, and then never reaches r_end
    (huy209vn/RESU, resu/training/config.py).
    """
    count = config.cycles
    return tuple(
        linear_budget(c, count, config.budget_start, config.budget_end) for c in range(count)
    )


def cycle_margins(config: TrainingConfig) -> tuple[float, ...]:
    """The margin of each cycle's commit: ``resurrection.margin`` first, ``margin_end`` last."""
    start, count = config.resurrection.margin, config.cycles
    end = start if config.margin_end is None else config.margin_end
    return tuple(linear_margin(c, count, start, end) for c in range(count))


def build_plan(config: TrainingConfig) -> Plan:
    """The spans of ``config``, in order; they cover each of its steps once.

    A stage whose share is 0 has no span; any other has a step at least.

    Raises:
        ArgumentError: there are fewer steps than stages, or none are left for the cycles.
    """
    share = default_warmup(config.sparsity) if config.warmup is None else config.warmup
    warm = _at_least_one(config.steps, share)
    tail = _at_least_one(config.steps, config.recovery)
    shares = config.cycle
    parts = [
        (Stage.TRAIN, shares.train),
        (Stage.STABILIZE, shares.stabilize),
        (Stage.RESU, shares.resu),
    ]
    parts = [(stage, share) for stage, share in parts if share > 0.0]
    middle = config.steps - warm - tail
    if middle < config.cycles * len(parts):
        least = _least_steps(config.cycles * len(parts), share, config.recovery)
        raise ArgumentError(
            f"steps: expected at least {least} for {config.cycles} cycles of {len(parts)} stages "
            f"between a warm-up of {share:.3g} and a recovery of {config.recovery:.3g} of the "
            f"steps, got {config.steps}; take more steps or fewer cycles"
        )
    spans = [Span(0, warm, Stage.WARMUP, -1, 0.0)] if warm else []
    before = config.initial_sparsity
    for cycle, after in enumerate(cycle_sparsities(config)):
        start = warm + middle * cycle // config.cycles
        stop = warm + middle * (cycle + 1) // config.cycles
        edges = _split(start, stop, [share for _, share in parts])
        for (stage, _), left, right in zip(parts, edges[:-1], edges[1:], strict=True):
            # a cycle that ends less sparse than it began keeps its places until the commit
            held = before if stage is Stage.TRAIN else max(before, after)
            spans.append(Span(left, right, stage, cycle, held))
        before = after
    if tail:
        spans.append(Span(config.steps - tail, config.steps, Stage.RECOVER, -1, config.sparsity))
    return tuple(spans)


def _least_steps(middle: int, warmup: float, recovery: float) -> int:
    """How many steps leave ``middle`` of them to the cycles."""
    rest = 1.0 - warmup - recovery
    if rest <= 0.0:
        raise ArgumentError(
            "warmup, recovery: expected shares that leave steps for the cycles, got "
            f"{warmup:.3g} and {recovery:.3g}, which are all steps"
        )
    steps = max(middle, int((middle - 1) / rest))  # two roundings make one step at most
    while steps - _at_least_one(steps, warmup) - _at_least_one(steps, recovery) < middle:
        steps += 1
    return steps


def _at_least_one(steps: int, share: float) -> int:
    return max(round(steps * share), 1) if share > 0.0 else 0


def _split(start: int, stop: int, shares: list[float]) -> list[int]:
    """The edges that cut ``[start, stop)`` in proportion to ``shares``, no part empty."""
    total, edges, gone = sum(shares), [start], 0.0
    for index, share in enumerate(shares[:-1]):
        gone += share
        edge = start + round((stop - start) * gone / total)
        parts_left = len(shares) - 1 - index
        edges.append(min(max(edge, edges[-1] + 1), stop - parts_left))
    return [*edges, stop]

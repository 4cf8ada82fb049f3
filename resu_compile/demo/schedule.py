"""Which phase runs at which step: the plans that the demo compares.

A plan is a tuple of spans that cover every step once. Where a span is sparser than the one before
it, the weights are pruned again at its first step; a RESU span ends with a commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from resu_compile.errors import ArgumentError, check_number, check_sparsity
from resu_compile.phase import Phase


@dataclass(frozen=True)
class Span:
    """Steps ``start`` to ``stop`` (exclusive) in one phase at one sparsity."""

    start: int
    stop: int
    phase: Phase
    sparsity: float


Plan = tuple[Span, ...]


def cubic(progress: float, target: float) -> float:
    """Sparsity of the cubic ramp from 0 to ``target`` at ``progress`` in [0, 1].

    Source: Zhu and Gupta 2017, eq. 1, https://arxiv.org/abs/1710.01878
    """
    return target * (1.0 - (1.0 - progress) ** 3)


def dense_plan(steps: int) -> Plan:
    """No pruning at all."""
    return (Span(0, steps, Phase.DENSE, 0.0),)


def one_shot_plan(steps: int, sparsity: float, *, prune_at: float = 0.7) -> Plan:
    """Train dense, prune once at the share ``prune_at`` of the steps, fine-tune the rest."""
    check_plan(steps, sparsity)
    cut = round(steps * prune_at)
    return (Span(0, cut, Phase.DENSE, 0.0), Span(cut, steps, Phase.SPARSE, sparsity))


def gradual_plan(
    steps: int, sparsity: float, *, prunings: int = 10, begin: float = 0.5, end: float = 0.75
) -> Plan:
    """Prune a little more at each of ``prunings`` steps of a cubic ramp; then recover.

    Args:
        steps: optimizer steps of the whole plan.
        sparsity: reached at the last pruning, in [0, 1).
        prunings: how often the weights are pruned.
        begin: share of the steps that are trained dense first.
        end: share of the steps at which the ramp ends.
    """
    check_plan(steps, sparsity)
    edges = _edges(steps, prunings, begin, end)
    spans = [Span(0, edges[0], Phase.DENSE, 0.0)]
    for index, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        spans.append(Span(start, stop, Phase.SPARSE, cubic((index + 1) / prunings, sparsity)))
    return (*spans, Span(edges[-1], steps, Phase.SPARSE, sparsity))


def resu_plan(
    steps: int,
    sparsity: float,
    *,
    cycles: int = 5,
    begin: float = 0.5,
    end: float = 0.75,
    resu_share: float = 0.3,
) -> Plan:
    """Prune along the ramp of ``gradual_plan``, and let the pruned compete in each cycle.

    A cycle prunes to its sparsity, trains sparse, then opens a RESU phase whose commit decides who
    of the pruned comes back. The last act is recovery: a plan that ended with a commit would ship
    weights that were resurrected and never trained in the network that they joined.

    Args:
        steps: optimizer steps of the whole plan.
        sparsity: reached in the last cycle, in [0, 1).
        cycles: how often the weights are pruned and resurrected.
        begin: share of the steps that are trained dense first.
        end: share of the steps at which the last cycle ends.
        resu_share: share of each cycle spent in the RESU phase, in (0, 1).
    """
    check_plan(steps, sparsity)
    check_number(resu_share, name="resu_share", minimum=0.0, maximum=1.0)
    edges = _edges(steps, cycles, begin, end)
    spans = [Span(0, edges[0], Phase.DENSE, 0.0)]
    for index, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        target = cubic((index + 1) / cycles, sparsity)
        opens = min(max(round(stop - resu_share * (stop - start)), start + 1), stop - 1)
        spans.append(Span(start, opens, Phase.SPARSE, target))
        spans.append(Span(opens, stop, Phase.RESU, target))
    return (*spans, Span(edges[-1], steps, Phase.SPARSE, sparsity))


def check_plan(steps: int, sparsity: float) -> None:
    """Raise an error that names what cannot be planned."""
    check_sparsity(sparsity)
    if steps < 1:
        raise ArgumentError(f"steps: expected at least 1, got {steps}")


def _edges(steps: int, parts: int, begin: float, end: float) -> list[int]:
    """The ``parts + 1`` steps that cut the ramp into parts of two steps or more."""
    if not 0.0 <= begin < end <= 1.0:
        raise ArgumentError(f"begin, end: expected 0 <= begin < end <= 1, got {begin} and {end}")
    if parts < 1:
        raise ArgumentError(f"cycles: expected at least 1, got {parts}")
    first, last = round(steps * begin), round(steps * end)
    if last - first < 2 * parts:
        raise ArgumentError(
            f"cycles: expected at most {(last - first) // 2} in {steps} steps (a cycle needs two "
            f"steps, and the ramp has {last - first}), got {parts}"
        )
    return [first + (last - first) * index // parts for index in range(parts + 1)]

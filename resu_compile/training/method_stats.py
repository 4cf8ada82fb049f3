"""What a training method did: Rs, churn, layer densities, FLOPs.

Source of Rs: Liu et al. 2021 (In-Time Over-Parameterization), https://arxiv.org/abs/2102.02887
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from resu_compile.runtime.commit_report import CommitReport
from resu_compile.runtime.controller import Controller
from resu_compile.training.flops import ModelFlops, StepCosts, inference_share


@dataclass(frozen=True)
class UpdateStats:
    """One change of masks, over all weights.

    Attributes:
        step: optimizer steps done.
        strategy: what changed them.
        sparsity: share of pruned entries afterwards.
        grown: entries that are active now and were not before.
        churn: ``grown`` as a share of the active entries.
        ever_share: Rs, share of the entries that were active in any mask so far.
    """

    step: int
    strategy: str
    sparsity: float
    grown: int
    churn: float
    ever_share: float | None

    @classmethod
    def of(cls, step: int, report: CommitReport) -> UpdateStats:
        """The totals of ``report``."""
        total = report.overall
        return cls(
            step, report.strategy, total.sparsity, total.resurrected, total.churn, total.ever_share
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class MethodStats:
    """A run so far.

    Attributes:
        steps: optimizer steps done.
        sparsity: share of pruned entries over all masked weights.
        ever_share: Rs, share of the entries that were active in any mask. The mask of a model that
            begins dense is full, so that it is 1 for methods that prune trained weights.
        updates: how many changes of masks there were.
        mean_churn: mean over those after the first step of the share of active entries that were
            new; 0 without any.
        densities: weight name -> share of active entries.
        training_flops: relative to training as many steps dense.
        inference_flops: relative to a dense forward pass.
    """

    steps: int
    sparsity: float
    ever_share: float
    updates: int
    mean_churn: float
    densities: dict[str, float]
    training_flops: float
    inference_flops: float

    @classmethod
    def of(
        cls,
        controller: Controller,
        updates: Sequence[UpdateStats],
        costs: StepCosts,
        flops: ModelFlops | None = None,
    ) -> MethodStats:
        """The stats of a run, from what its parts have counted."""
        weights = controller.weights.values()
        ever = sum(controller.history.ever_active(weight) for weight in weights)
        total = sum(weight.numel for weight in weights)
        churns = [update.churn for update in updates if update.step > 0]
        return cls(
            steps=costs.steps,
            sparsity=controller.sparsity,
            ever_share=ever / total,
            updates=len(updates),
            mean_churn=sum(churns) / len(churns) if churns else 0.0,
            densities={weight.name: weight.nnz / weight.numel for weight in weights},
            training_flops=costs.training_share(flops),
            inference_flops=inference_share(controller, flops),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

"""Commit of a RESU phase: which places are active afterwards, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tabulate import tabulate
from torch import Tensor

from resu_compile.sparsity import only_at, topk_mask


def amnesty_mask(score: Tensor, mask: Tensor, n_keep: int, n_resurrected: int) -> Tensor:
    """The tournament: active compete with active, resurrected with resurrected.

    The best ``n_keep - n_resurrected`` of the active and the best ``n_resurrected`` of the pruned
    places win. Places that one group cannot fill go to the other group's best.

    Args:
        score: floating point, any shape, free of NaN; higher wins, ties fall to the lower index.
        mask: bool, shape of ``score``, True = active before the commit.
        n_keep: places that are active afterwards, in [0, score.numel()].
        n_resurrected: of these, the places reserved for the resurrected.

    Returns:
        bool mask with exactly ``n_keep`` True entries.

    Source: RESU, n_res = int(r n_keep); leftovers go first to the other group's best.
    """
    n_active = int(mask.sum())
    n_pruned = mask.numel() - n_active
    from_pruned = min(n_resurrected, n_pruned, n_keep)
    from_active = min(n_keep - from_pruned, n_active)
    from_pruned = n_keep - from_active  # leftovers of the active group
    winners_active = topk_mask(only_at(score, mask), from_active)
    winners_pruned = topk_mask(only_at(score, ~mask), from_pruned)
    return winners_active | winners_pruned


@dataclass(frozen=True)
class WeightCommit:
    """What a commit did to one weight, in numbers of entries."""

    total: int
    kept: int
    resurrected: int
    lost: int

    @property
    def active(self) -> int:
        """Active entries after the commit."""
        return self.kept + self.resurrected

    @property
    def churn(self) -> float:
        """Share of the entries active afterwards that were not active before."""
        return self.resurrected / self.active if self.active else 0.0

    @property
    def jaccard(self) -> float:
        """Overlap of the old and the new active set: intersection over union."""
        union = self.kept + self.resurrected + self.lost
        return self.kept / union if union else 1.0


@dataclass(frozen=True)
class CommitReport:
    """What a commit did, per weight and in total."""

    strategy: str
    weights: dict[str, WeightCommit] = field(default_factory=dict)

    @property
    def overall(self) -> WeightCommit:
        """The sums over all weights."""
        rows = self.weights.values()
        return WeightCommit(
            total=sum(row.total for row in rows),
            kept=sum(row.kept for row in rows),
            resurrected=sum(row.resurrected for row in rows),
            lost=sum(row.lost for row in rows),
        )

    @property
    def total(self) -> int:
        """Entries of all weights."""
        return self.overall.total

    @property
    def kept(self) -> int:
        """Entries active before and after."""
        return self.overall.kept

    @property
    def resurrected(self) -> int:
        """Entries that came back."""
        return self.overall.resurrected

    @property
    def lost(self) -> int:
        """Entries that were active before and are pruned now."""
        return self.overall.lost

    @property
    def active(self) -> int:
        """Entries active after the commit."""
        return self.overall.active

    def as_dict(self) -> dict[str, object]:
        """Plain data: the strategy, one entry a weight and the total."""
        rows = {**self.weights, "total": self.overall}
        return {
            "strategy": self.strategy,
            "weights": {
                name: {
                    "total": row.total,
                    "active": row.active,
                    "kept": row.kept,
                    "resurrected": row.resurrected,
                    "lost": row.lost,
                    "churn": row.churn,
                    "jaccard": row.jaccard,
                }
                for name, row in rows.items()
            },
        }

    def table(self) -> str:
        """The report as a text table."""
        rows = {**self.weights, "total": self.overall}
        text: str = tabulate(
            [
                [name, row.total, row.active, row.kept, row.resurrected, row.lost, row.churn]
                for name, row in rows.items()
            ],
            headers=["weight", "entries", "active", "kept", "resurrected", "lost", "churn"],
            floatfmt=".4f",
        )
        return text

    def __str__(self) -> str:
        return self.table()


def compare_masks(old: Tensor, new: Tensor) -> WeightCommit:
    """Counts of the change from ``old`` to ``new``; bool masks of one shape."""
    return WeightCommit(
        total=old.numel(),
        kept=int((old & new).sum()),
        resurrected=int((~old & new).sum()),
        lost=int((old & ~new).sum()),
    )

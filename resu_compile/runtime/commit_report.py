"""What a commit did: counts of entries and the shares that follow from them.

    churn    resurrected / active
    jaccard  kept / (kept + resurrected + lost)
    Rs       entries that were active in any mask so far / entries

Source of Rs: Liu et al. 2021 (In-Time Over-Parameterization), https://arxiv.org/abs/2102.02887
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tabulate import tabulate
from torch import Tensor

from resu_compile.errors import ArgumentTypeError


class ScalarWriter(Protocol):
    """What of a TensorBoard ``SummaryWriter`` is needed."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Note one number."""


@dataclass(frozen=True)
class WeightCommit:
    """What a commit did to one weight, in numbers of entries.

    Attributes:
        total: entries.
        kept: active before and after.
        resurrected: active after, not before.
        lost: active before, not after.
        ever_active: active in any mask so far, those before and after included; None if nobody
            kept a history.
    """

    total: int
    kept: int
    resurrected: int
    lost: int
    ever_active: int | None = None

    @property
    def active(self) -> int:
        """Active entries after the commit."""
        return self.kept + self.resurrected

    @property
    def sparsity(self) -> float:
        """Share of pruned entries after the commit."""
        return 1.0 - self.active / self.total if self.total else 0.0

    @property
    def churn(self) -> float:
        """Share of the entries active afterwards that were not active before."""
        return self.resurrected / self.active if self.active else 0.0

    @property
    def jaccard(self) -> float:
        """Overlap of the old and the new active set: intersection over union."""
        union = self.kept + self.resurrected + self.lost
        return self.kept / union if union else 1.0

    @property
    def ever_share(self) -> float | None:
        """Rs, the share of the entries that were active in any mask so far."""
        if self.ever_active is None:
            return None
        return self.ever_active / self.total if self.total else 0.0

    def as_dict(self) -> dict[str, float]:
        """Counts and shares by name; what is not known is left out."""
        numbers = {
            "total": self.total,
            "active": self.active,
            "kept": self.kept,
            "resurrected": self.resurrected,
            "lost": self.lost,
            "sparsity": self.sparsity,
            "churn": self.churn,
            "jaccard": self.jaccard,
            "ever_active": self.ever_active,
            "ever_share": self.ever_share,
        }
        return {name: number for name, number in numbers.items() if number is not None}


@dataclass(frozen=True)
class CommitReport:
    """What a commit did, per weight and in total.

    Attributes:
        strategy: how it was decided: a commit's strategy, or ``"prune"``.
        weights: parameter name -> what happened to it.
    """

    strategy: str
    weights: dict[str, WeightCommit] = field(default_factory=dict)

    @property
    def overall(self) -> WeightCommit:
        """The sums over all weights."""
        rows = self.weights.values()
        ever = [row.ever_active for row in rows if row.ever_active is not None]
        return WeightCommit(
            total=sum(row.total for row in rows),
            kept=sum(row.kept for row in rows),
            resurrected=sum(row.resurrected for row in rows),
            lost=sum(row.lost for row in rows),
            ever_active=sum(ever) if len(ever) == len(rows) else None,
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

    @property
    def sparsity(self) -> float:
        """Share of pruned entries after the commit."""
        return self.overall.sparsity

    @property
    def churn(self) -> float:
        """Share of the entries active afterwards that were not active before."""
        return self.overall.churn

    @property
    def jaccard(self) -> float:
        """Overlap of the old and the new active set: intersection over union."""
        return self.overall.jaccard

    @property
    def ever_share(self) -> float | None:
        """Rs, the share of the entries that were active in any mask so far."""
        return self.overall.ever_share

    def _rows(self) -> dict[str, WeightCommit]:
        return {**self.weights, "total": self.overall}

    def as_dict(self) -> dict[str, object]:
        """Plain data: the strategy, one entry a weight and the total."""
        return {
            "strategy": self.strategy,
            "weights": {name: row.as_dict() for name, row in self._rows().items()},
        }

    def to_tensorboard(self, writer: ScalarWriter, step: int, prefix: str = "resu") -> None:
        """Write every number of ``as_dict`` as ``{prefix}/{weight or total}/{number}``.

        Args:
            writer: anything with ``add_scalar(tag, value, step)``, as a TensorBoard
                ``SummaryWriter``.
            step: training step of the commit.
            prefix: first part of every tag.

        Raises:
            ArgumentTypeError: ``writer`` has no ``add_scalar``.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise ArgumentTypeError(
                "writer: expected an object with add_scalar(tag, value, step), a TensorBoard "
                f"SummaryWriter say, got {type(writer).__name__}"
            )
        for name, row in self._rows().items():
            for key, number in row.as_dict().items():
                writer.add_scalar(f"{prefix}/{name}/{key}", number, step)

    def table(self) -> str:
        """The report as a text table."""
        text: str = tabulate(
            [
                [name, row.total, row.active, row.kept, row.resurrected, row.lost]
                + [row.churn, row.jaccard, row.ever_share]
                for name, row in self._rows().items()
            ],
            headers=["weight", "entries", "active", "kept", "resurrected", "lost"]
            + ["churn", "jaccard", "ever"],
            floatfmt=".4f",
        )
        return text

    def __str__(self) -> str:
        return self.table()


def compare_masks(old: Tensor, new: Tensor, ever_active: int | None = None) -> WeightCommit:
    """Counts of the change from ``old`` to ``new``; bool masks of one shape."""
    return WeightCommit(
        total=old.numel(),
        kept=int((old & new).sum()),
        resurrected=int((~old & new).sum()),
        lost=int((old & ~new).sum()),
        ever_active=ever_active,
    )

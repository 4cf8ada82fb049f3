"""Early stopping: when a metric has not improved for long enough."""

from __future__ import annotations

import math
from collections.abc import Mapping

from resu_compile.errors import ArgumentError
from resu_compile.training.config import EarlyStop


class Patience:
    """Counts the evaluations without improvement.

    Args:
        rule: which metric, and for how long.

    Attributes:
        best: best value so far; None before the first evaluation. NaN is never an improvement.
        waited: evaluations since it improved.
    """

    def __init__(self, rule: EarlyStop) -> None:
        self.rule = rule
        self.best: float | None = None
        self.waited = 0

    def see(self, metrics: Mapping[str, float]) -> bool:
        """Take note of an evaluation; True if the run is to stop."""
        if self.rule.metric not in metrics:
            raise ArgumentError(
                f"early_stop: expected evaluate() to return {self.rule.metric!r}, "
                f"got {', '.join(sorted(metrics)) or 'nothing'}"
            )
        value = float(metrics[self.rule.metric])
        sign = -1.0 if self.rule.mode == "min" else 1.0
        first = self.best is None and not math.isnan(value)
        if first or (self.best is not None and sign * (value - self.best) > self.rule.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.rule.patience

"""Whether a plan looks at calibration data, and where."""

from __future__ import annotations

from collections.abc import Iterator

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import Resu, is_calibrated, is_gradient_method
from resu_compile.runtime.commit import takes_score
from resu_compile.training.config import TrainingConfig


def commit_measures(config: TrainingConfig) -> bool:
    """Whether a commit looks at calibration data."""
    theta = config.resurrection
    by_method = theta.strategy == "reprune" and is_calibrated(config.method)
    return by_method or (_takes_score(config) and theta.score == "wanda")


def sees_gradients(config: TrainingConfig) -> bool:
    """Whether a pruning or a commit scores by mean squares of gradients."""
    commits = config.cycle.resu > 0.0 and _takes_score(config)
    by_score = commits and config.resurrection.score == "saliency"
    return by_score or is_gradient_method(config.method)


def _takes_score(config: TrainingConfig) -> bool:
    """Whether commits look at ``resurrection.score``, and not at the method's scores."""
    return takes_score(config.sparsity_config(), config.resurrection.strategy)


def check_calibration(config: TrainingConfig, calibration: object) -> None:
    """Raise an error now, not at the first pruning, which may be hours away."""
    method = config.training_method()
    needed = method.needs_calibration(config)
    what = f"method {config.method!r}"
    if isinstance(method, Resu):
        what = f"method {method.criterion!r} and score {config.resurrection.score!r}"
    if needed and calibration is None:
        raise ArgumentError(
            f"calibration: expected data for {what}, got None; give batches or a function "
            "forward_loop(model)"
        )
    if calibration is not None and not needed:
        raise ArgumentError(f"calibration: expected None with {what}: no data are looked at")
    if isinstance(calibration, Iterator):
        raise ArgumentTypeError(
            "calibration: expected batches that can be iterated at each pruning anew, got a "
            f"{type(calibration).__name__}, which runs out; pass a list"
        )

"""What a RESU run is compared with: configs of the same steps, without resurrection.

    RESU      WARMUP | TRAIN  prune  STABILIZE  RESU  commit | ... | RECOVER
    gradual   WARMUP | TRAIN  prune  STABILIZE               | ... | RECOVER
    one-shot  WARMUP           prune STABILIZE
    dense     WARMUP ...

All other settings stay those of the RESU run, so that nothing else makes a difference.
"""

from __future__ import annotations

from dataclasses import replace

from resu_compile.errors import ArgumentError, check_integer
from resu_compile.training.config import CycleShares, TrainingConfig

PRUNE_ONLY = CycleShares(train=0.0, stabilize=1.0, resu=0.0)


def gradual_config(config: TrainingConfig) -> TrainingConfig:
    """``config`` without resurrection: its RESU stages are sparse training like the rest.

    Args:
        config: of a RESU run, without ``densify``.
    """
    shares = config.cycle
    return replace(
        config,
        cycle=CycleShares(shares.train, stabilize=shares.stabilize + shares.resu, resu=0.0),
    )


def one_shot_config(config: TrainingConfig, *, prune_at: int) -> TrainingConfig:
    """``config`` with one pruning to the final sparsity, and nothing but sparse training after it.

    Args:
        config: of a RESU run, without ``densify``.
        prune_at: optimizer steps before the pruning, in [0, ``config.steps``).

    Raises:
        ArgumentError: ``prune_at`` is out of range.
    """
    if check_integer(prune_at, name="prune_at", minimum=0) >= config.steps:
        raise ArgumentError(
            f"prune_at: expected an integer below steps={config.steps}, got {prune_at}"
        )
    return replace(
        config,
        warmup=prune_at / config.steps,
        recovery=0.0,
        cycles=1,
        cycle=PRUNE_ONLY,
        schedule="constant",
    )


def dense_config(config: TrainingConfig) -> TrainingConfig:
    """``config`` with nothing pruned, for what trains by a plan in any case."""
    return replace(config, sparsity=0.0, cycles=1, cycle=PRUNE_ONLY, schedule="constant")

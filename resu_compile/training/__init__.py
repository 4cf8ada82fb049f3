"""The training loop: a plan of phases from a config, for any loop or with one that is ready."""

from resu_compile.training.config import (
    CheckpointConfig,
    CycleShares,
    EarlyStop,
    TrainingConfig,
)
from resu_compile.training.cycle import Cycle, CycleEvent, CycleStats
from resu_compile.training.densify import Densification, Pause
from resu_compile.training.plan import Plan, Span, Stage, build_plan
from resu_compile.training.presets import PRESETS, preset
from resu_compile.training.stats import read_stats

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Cycle",
    "CycleEvent",
    "CycleShares",
    "CycleStats",
    "Densification",
    "EarlyStop",
    "Pause",
    "Plan",
    "Span",
    "Stage",
    "TrainingConfig",
    "build_plan",
    "preset",
    "read_stats",
]

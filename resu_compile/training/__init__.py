"""The training loop: a plan of phases from a config, for any loop or with one that is ready."""

from resu_compile.training.callbacks import Callback, ProgressBar
from resu_compile.training.config import (
    CheckpointConfig,
    CycleShares,
    EarlyStop,
    TrainingConfig,
)
from resu_compile.training.cycle import Cycle, CycleEvent, CycleStats
from resu_compile.training.densify import Densification, Pause
from resu_compile.training.flops import ModelFlops, count_flops
from resu_compile.training.method_stats import MethodStats, UpdateStats
from resu_compile.training.plan import Plan, Span, Stage, build_plan
from resu_compile.training.presets import PRESETS, preset
from resu_compile.training.sparse_training import SparseTraining
from resu_compile.training.stats import read_stats
from resu_compile.training.trainer import Trainer, TrainingResult

__all__ = [
    "PRESETS",
    "Callback",
    "CheckpointConfig",
    "Cycle",
    "CycleEvent",
    "CycleShares",
    "CycleStats",
    "Densification",
    "EarlyStop",
    "MethodStats",
    "ModelFlops",
    "Pause",
    "Plan",
    "ProgressBar",
    "Span",
    "SparseTraining",
    "Stage",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "UpdateStats",
    "build_plan",
    "count_flops",
    "preset",
    "read_stats",
]

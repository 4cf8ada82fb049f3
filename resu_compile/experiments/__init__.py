"""Experiments: tasks x methods x sparsities x seeds, compared at equal steps or training FLOPs."""

from resu_compile.experiments.config import ExperimentConfig, MethodSpec, TaskSpec, Tuning
from resu_compile.experiments.report import Report, write_report
from resu_compile.experiments.runner import Outcome, run_experiment
from resu_compile.experiments.tasks import ExperimentTask, make_task, register_task, task_names

__all__ = [
    "ExperimentConfig",
    "ExperimentTask",
    "MethodSpec",
    "Outcome",
    "Report",
    "TaskSpec",
    "Tuning",
    "make_task",
    "register_task",
    "run_experiment",
    "task_names",
    "write_report",
]

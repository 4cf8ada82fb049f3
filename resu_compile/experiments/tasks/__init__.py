"""What experiments learn: a registry of tasks, each with training, validation and test data."""

from resu_compile.experiments.tasks.registry import (
    ExperimentTask,
    make_task,
    register_task,
    task_names,
)

__all__ = ["ExperimentTask", "make_task", "register_task", "task_names"]

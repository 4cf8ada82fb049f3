"""One dict, one decorator, one lookup; a task of your own is a function.

def make_task(*, steps: int, seed: int, **options) -> ExperimentTask: ...

In an experiment it is called ``"my_module:make_task"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training.tasks import TrainingTask, import_function
from resu_compile.training.trainer import Evaluate

MODULES = ("digits", "text", "images")  # of this package; each registers its tasks
_TASKS: dict[str, Callable[..., ExperimentTask]] = {}
F = TypeVar("F", bound=Callable[..., "ExperimentTask"])


@dataclass(frozen=True)
class ExperimentTask(TrainingTask):
    """A task whose data are split in three.

    Training data train; ``evaluate`` looks at validation data, which choose settings; ``test``
    looks at test data, which nothing was chosen by, once, when the run is over.

    Attributes:
        test: ``(model) -> {metric: number}``, the metrics of ``evaluate``.
        on_training: the same of data that were trained on, to tell what was learned from what was
            learned by heart; None looks at none.
        metric: the one that methods are compared by.
        higher_is_better: whether more of it is better.
        example: inputs of one call of the model, for counting FLOPs; None counts one product for
            each entry of a weight.
        autocast: dtype of mixed precision; None trains in the model's own.
    """

    test: Evaluate | None = None
    on_training: Evaluate | None = None
    metric: str = "loss"
    higher_is_better: bool = False
    example: tuple[Any, ...] | None = None
    autocast: Literal["bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        """Check what an experiment cannot do without."""
        for name in ("evaluate", "test"):
            if not callable(getattr(self, name)):
                raise ArgumentTypeError(
                    f"{name}: expected a function (model) -> {{metric: number}} in a task of an "
                    f"experiment, got {getattr(self, name)!r}; training.TrainingTask needs none"
                )


def register_task(name: str) -> Callable[[F], F]:
    """Decorator: make ``(*, steps, seed, **options) -> ExperimentTask`` known under ``name``."""

    def register(make: F) -> F:
        if name in _TASKS:
            raise ArgumentError(f"task name {name!r} is already registered by {_TASKS[name]}")
        _TASKS[name] = make
        return make

    return register


def _load_own() -> None:
    for module in MODULES:
        importlib.import_module(f"resu_compile.experiments.tasks.{module}")


def task_names() -> list[str]:
    """Names of the registered tasks; sorted."""
    _load_own()
    return sorted(_TASKS)


def make_task(name: str, *, steps: int, seed: int, **options: Any) -> ExperimentTask:
    """The task that a config names.

    Args:
        name: a registered name, or ``"module:function"``, imported with the current directory on
            ``sys.path``.
        steps: optimizer steps of the run, over which a learning rate may fall.
        seed: of initial weights and batches; also set as torch's before the function is called.
        **options: keyword arguments of the function.

    Raises:
        ArgumentError: no such task, or the function fails.
        ArgumentTypeError: the function returns something else.
    """
    _load_own()
    if name not in _TASKS and ":" not in name:
        raise ArgumentError(
            f"task: expected one of {', '.join(task_names())}, or 'module:function' of your own "
            f"that returns an ExperimentTask; got {name!r}"
        )
    make = _TASKS[name] if name in _TASKS else import_function(name)
    torch.manual_seed(seed)
    try:
        made = make(steps=steps, seed=seed, **options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ArgumentError(f"task {name!r}: cannot be made with ({given}): {error}") from error
    if not isinstance(made, ExperimentTask):
        raise ArgumentTypeError(
            f"task {name!r}: expected an ExperimentTask, got a {type(made).__name__}"
        )
    return made


def import_extra(module: str, *, task: str, extra: str = "data") -> ModuleType:
    """A package that only some tasks need.

    Raises:
        ArgumentError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(
            f"task {task!r}: expected {module.partition('.')[0]} to be installed, it is not "
            f"({error}); pip install resu-compile[{extra}]"
        ) from error


def check_torch_device(device: object) -> torch.device:
    """``device`` (``"cpu"``, ``"cuda"``, ``"cuda:1"``) if torch can use it here."""
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device: expected a GPU that torch can use for {str(device)!r}, found "
            f"{torch.cuda.device_count()}; take 'cpu', or another index"
        )
    return torch.device(found)

"""What a training from a file trains: a model with its optimizer, loss, data and evaluation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_choice, check_known_keys
from resu_compile.training.batches import Batches
from resu_compile.training.stepper import LossFn
from resu_compile.training.trainer import Evaluate

if TYPE_CHECKING:
    from resu_compile.demo.tasks import Task

BUILT_IN = ("digits", "bytes")
BUILT_IN_OPTIONS = ("size", "device")


@dataclass(frozen=True)
class TrainingTask:
    """All that ``Trainer`` needs beside the config.

    Attributes:
        model: on its device.
        optimizer: of the model's parameters.
        loss_fn: ``(model, batch) -> scalar tensor``.
        batches: a ``DataLoader``, another re-iterable, or a function from the epoch to its batches.
        evaluate: ``(model) -> {metric: number}``.
        scheduler: stepped after each optimizer step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    batches: Batches
    evaluate: Evaluate | None = None
    scheduler: LRScheduler | None = None


def make_training_task(
    name: str, options: Mapping[str, Any], *, steps: int, seed: int
) -> TrainingTask:
    """The task that a config names.

    Args:
        name: ``"digits"`` or ``"bytes"``, the demo's tasks, or ``"module:function"``. The module is
            imported with the current directory on ``sys.path``.
        options: keyword arguments of the function; for the demo's tasks ``size`` (``"small"`` or
            ``"large"``) and ``device``.
        steps: optimizer steps of the run; the demo's learning rate falls over them.
        seed: set as torch's before the function is called.

    Raises:
        ArgumentError: no such task or option, or the function cannot be imported or fails.
        ArgumentTypeError: the function returns something else than a ``TrainingTask``.
    """
    if ":" not in name:
        if name not in BUILT_IN:
            raise ArgumentError(
                f"task: expected {' or '.join(BUILT_IN)}, or 'module:function' of your own that "
                f"returns a TrainingTask; got {name!r}"
            )
        return _built_in(name, options, steps=steps, seed=seed)
    make = import_function(name)
    torch.manual_seed(seed)
    try:
        made = make(**options)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ArgumentError(
            f"task {name!r}: expected {name.partition(':')[2]}({given}) to return a TrainingTask, "
            f"it raised {type(error).__name__}: {error}"
        ) from error
    return check_task(made, name)


def import_function(name: str, *, what: str = "task") -> Callable[..., Any]:
    """The function, or class, that ``"module:function"`` names.

    Args:
        name: imported with the current directory on ``sys.path``.
        what: it is, for messages.

    Raises:
        ArgumentError: it cannot be imported, or there is no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"{what}: expected 'module:function', got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # stays: the task may import its own modules later
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ArgumentError(
            f"{what} {name!r}: expected a module {module_name!r} that can be imported (from the "
            f"current directory too), got {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ArgumentError(
            f"{what} {name!r}: expected a function {attribute!r} in {module.__file__}, "
            f"got {'nothing of that name' if function is None else repr(function)}"
        )
    found: Callable[..., Any] = function
    return found


def check_task(made: object, name: str) -> TrainingTask:
    """``made`` as a ``TrainingTask``: itself, or from an object with the same attributes.

    Raises:
        ArgumentTypeError: it has not these attributes, or one of them has a wrong type.
    """
    required = ("model", "optimizer", "loss_fn", "batches")
    missing = [attribute for attribute in required if not hasattr(made, attribute)]
    if missing:
        raise ArgumentTypeError(
            f"task {name!r}: expected a TrainingTask(model, optimizer, loss_fn, batches, "
            f"evaluate=None, scheduler=None), got a {type(made).__name__} without "
            f"{', '.join(missing)}"
        )
    values: dict[str, Any] = {f.name: getattr(made, f.name, None) for f in fields(TrainingTask)}
    if not isinstance(values["model"], nn.Module):
        kind = type(values["model"]).__name__
        raise ArgumentTypeError(f"task {name!r}: expected an nn.Module as model, got a {kind}")
    return made if isinstance(made, TrainingTask) else TrainingTask(**values)


# -- the demo's tasks ------------------------------------------------------------------------


def _built_in(name: str, options: Mapping[str, Any], *, steps: int, seed: int) -> TrainingTask:
    try:
        from resu_compile.demo.tasks import SIZES, make_task

        check_known_keys(options, BUILT_IN_OPTIONS, what=f"option of task {name!r}")
        size = check_choice(options.get("size", "small"), SIZES, name="task_options.size")
        task = make_task(name, size, check_device(options.get("device", "cpu")))
    except ImportError as error:
        raise ArgumentError(
            f"task {name!r}: expected scikit-learn and the demo's other packages to be installed "
            f"({error}); pip install resu-compile[demo]"
        ) from error
    return adapt_demo_task(task, steps=steps, seed=seed)


def check_device(device: object) -> str:
    """``device`` if torch can use it here, or an error that says what to do."""
    name = check_choice(device, ("cpu", "cuda"), name="device")
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            "device: expected a GPU that torch can use for 'cuda', found none; "
            "take 'cpu', or install a CUDA build of torch"
        )
    return name


def adapt_demo_task(task: Task, *, steps: int, seed: int) -> TrainingTask:
    """A task of the demo, with its optimizer and learning rate, for ``Trainer``.

    For one ``seed`` the initial weights and the order of the batches are always the same.

    Args:
        task: data, model and settings.
        steps: over which the learning rate falls.
        seed: of the initial weights; one more is that of the batches.
    """
    from resu_compile.demo.tasks import batch_loss

    settings = replace(task.training, steps=steps)
    model = task.build(seed)
    optimizer = task.optimizer(model)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        return batch_loss(model(inputs), target)

    def evaluate(model: nn.Module) -> dict[str, float]:
        # eagerly: a score on the way is not worth another compilation
        with torch.compiler.set_stance("force_eager"):
            score = task.evaluate(model)
        return {task.metric: score.metric, "loss": score.loss}

    return TrainingTask(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        batches=lambda epoch: task.batches(seed + 1 + epoch),  # an epoch never ends
        evaluate=evaluate,
        scheduler=LambdaLR(optimizer, lambda step: settings.lr_at(step) / settings.lr),
    )

"""Give a model a controller with nothing pruned yet."""

from __future__ import annotations

from torch import nn

from resu_compile.errors import ArgumentTypeError
from resu_compile.pruning import sparsify
from resu_compile.runtime.controller import find_controller
from resu_compile.training.config import TrainingConfig
from resu_compile.training.distributed import plain_model


def checked_model(model: object, config: object) -> nn.Module:
    """The plain model of a run, which may be inside a ``DistributedDataParallel``.

    Raises:
        ArgumentTypeError: ``model`` is no module, or ``config`` no ``TrainingConfig``.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, TrainingConfig):
        raise ArgumentTypeError(f"config: expected a TrainingConfig, got {type(config).__name__}")
    return plain_model(model)


def attach(model: nn.Module, config: TrainingConfig) -> bool:
    """Let a controller look after ``model``, in the DENSE phase; one that has one keeps it.

    Returns:
        True if it had one.
    """
    if find_controller(model) is not None:
        return True
    sparsify(
        model,
        sparsity=0.0,  # masks of ones; the method, which may need data, comes at the pruning
        targets=config.targets,
        exclude=config.exclude,
        seed=config.seed,
        compile=config.compile,
    )
    made = find_controller(model)
    assert made is not None
    made.set_phase("dense")
    return False

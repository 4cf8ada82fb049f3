"""Calibration data: batches, or a loop of the user's that runs the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from resu_compile.errors import ArgumentError, ArgumentTypeError

Calibration = Callable[[nn.Module], object] | Iterable[Any]
Loop = Callable[[nn.Module], object]


def as_loop(calibration: Calibration) -> Loop:
    """One function that runs a model on all the data, as often as it is called.

    Args:
        calibration: a function ``forward_loop(model)``, taken as it is; or batches, which are read
            once and kept. A batch is a tensor, a tuple or list of positional inputs, or a mapping
            of keyword inputs. Of a tuple, what ``forward`` has no positional parameter for is left
            away: the labels of an (inputs, labels) pair, for a model whose forward takes only
            inputs. Whatever forward does take is passed.

    Raises:
        ArgumentError: no batch at all.
        ArgumentTypeError: neither a function nor batches.
    """
    if callable(calibration) and not isinstance(calibration, nn.Module):
        return calibration
    if isinstance(calibration, (Tensor, str, bytes, Mapping, nn.Module)) or not isinstance(
        calibration, Iterable
    ):
        raise ArgumentTypeError(
            "calibration: expected a function forward_loop(model) or an iterable of batches, got "
            f"{type(calibration).__name__}; a single batch goes into a list: calibration=[batch]"
        )
    batches = list(calibration)
    if not batches:
        raise ArgumentError("calibration: expected at least one batch, got none")
    for batch in batches:
        if not isinstance(batch, (Tensor, tuple, list, Mapping)):
            raise ArgumentTypeError(
                "calibration: expected batches that are tensors, tuples or lists of positional "
                f"inputs, or mappings of keyword inputs, got {type(batch).__name__}"
            )
    return Batches(batches)


class Batches:
    """Runs a model on stored batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __call__(self, model: nn.Module) -> None:
        """One forward pass a batch."""
        for batch in self.batches:
            run_batch(model, batch)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model`` on ``batch``, which is moved to the device of the model's first parameter."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**_moved(dict(batch), device))
    inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    return model(*_moved(inputs[: _positional(model)], device))


def _positional(model: nn.Module) -> int | None:
    """How many positional inputs ``forward`` takes; None for any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds for parameter in parameters)


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def kept_leaf(leaf: Any) -> Any:
    """A copy of an argument as it is now, unless it is a constant.

    An object that is neither a tensor nor a constant may hold what earlier blocks have left there
    (a cache of keys and values), and each call has to find it as the model's own call did.
    """
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf if is_constant(leaf) else copy.deepcopy(leaf)


def is_constant(leaf: Any) -> bool:
    """True for an argument that nobody can write into."""
    kinds = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    return leaf is None or isinstance(leaf, kinds)

"""Global optimizer hooks: the user's loop stays as it was, no attach call is needed.

PyTorch calls these around ``step()`` of every ``torch.optim.Optimizer``. An optimizer that holds no
masked weight costs one dictionary look-up.

In the SPARSE phase gradients arrive masked (tensor hook or compiled graph). The weight, its
gradient and its state are then 0 at every pruned place, and an optimizer that works entry by entry
keeps them exactly there: every term of its update is a product or a sum of zeros. Any other
optimizer (Muon mixes rows and columns) has weight and state zeroed again after its step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn, optim
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from resu_compile.phase import Phase, Routing
from resu_compile.runtime.optimizer_state import zero_state
from resu_compile.state import MaskedWeight, masked_weight_of, registry_epoch

# Exact types only: a subclass may override step().
ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        optim.SGD,
        optim.Adam,
        optim.AdamW,
        optim.RMSprop,
        optim.Adafactor,
        optim.Adagrad,
        optim.Adadelta,
        optim.Adamax,
        optim.NAdam,
        optim.RAdam,
    }
)


@dataclass
class _View:
    """The masked weights of one optimizer."""

    signature: tuple[int, ...]
    entries: list[tuple[dict[str, Any], nn.Parameter, MaskedWeight]]
    synced: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (id, mask_version)


_views: WeakKeyDictionary[Optimizer, _View] = WeakKeyDictionary()
_installed = False


def install() -> None:
    """Register the hooks with PyTorch, once a process."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True


def optimizers_of(weight: MaskedWeight) -> list[Optimizer]:
    """The optimizers that have stepped ``weight``."""
    return [
        optimizer
        for optimizer, view in list(_views.items())
        if any(found is weight for _, _, found in view.entries)
    ]


def mark_synced(optimizer: Optimizer, weight: MaskedWeight) -> None:
    """Note that ``optimizer``'s state fits the present mask of ``weight``."""
    _views[optimizer].synced[weight.name] = (id(weight), weight.mask_version)


def _view_of(optimizer: Optimizer) -> _View:
    groups = optimizer.param_groups
    signature = (registry_epoch(), *(len(group["params"]) for group in groups))
    view = _views.get(optimizer)
    if view is None or view.signature != signature:
        entries = []
        for group in groups:
            for parameter in group["params"]:
                weight = masked_weight_of(parameter)
                if weight is not None:
                    entries.append((group, parameter, weight))
        view = _View(signature, entries, view.synced if view else {})
        _views[optimizer] = view
    return view


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    view = _view_of(optimizer)
    if not view.entries:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _prepare(optimizer, view)
        return None

    def closure_then_prepare() -> Any:
        """Gradients are made inside step(): what hides them has to wait for them."""
        _finish(optimizer, view, final=False)  # a second evaluation sees the real weights again
        loss = closure()
        _prepare(optimizer, view)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_then_prepare}
    return (args[0], closure_then_prepare, *args[2:]), kwargs


def _prepare(optimizer: Optimizer, view: _View) -> None:
    for group, parameter, weight in view.entries:
        controller = weight.controller
        weight.follow(parameter)
        if controller.phase is Phase.SPARSE:
            if view.synced.get(weight.name) != (id(weight), weight.mask_version):
                zero_state(optimizer, parameter, weight.bits, keep=True)
                mark_synced(optimizer, weight)
            weight.enforce_zeros(parameter)
            if parameter.grad is not None:
                weight.clean_gradient(parameter.grad, Routing.ACTIVE)
        elif controller.phase is Phase.RESU:
            assert controller.resurrection is not None
            controller.resurrection.before_step(optimizer, group, weight, parameter)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    view = _views.get(optimizer)
    if view is not None and view.entries:
        _finish(optimizer, view, final=True)


def _finish(optimizer: Optimizer, view: _View, *, final: bool) -> None:
    elementwise = type(optimizer) in ELEMENTWISE
    for _, parameter, weight in view.entries:
        controller = weight.controller
        if controller.phase is Phase.RESU:
            assert controller.resurrection is not None
            controller.resurrection.after_step(optimizer, weight)
        elif controller.phase is Phase.SPARSE and final:
            if elementwise:
                weight.trust_value(parameter)
            else:
                weight.enforce_zeros(parameter)
                zero_state(optimizer, parameter, weight.bits, keep=True)



__all__ = ["ELEMENTWISE", "install", "mark_synced", "optimizers_of"]

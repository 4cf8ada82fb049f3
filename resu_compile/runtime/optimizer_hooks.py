"""Global optimizer hooks: the user's loop stays as it was, no attach call is needed.

PyTorch calls these around ``step()`` of every ``torch.optim.Optimizer``. An optimizer that holds no
masked weight costs one dictionary look-up.

In the SPARSE phase gradients arrive masked (tensor hook or compiled graph). The weight, its
gradient and its state are then 0 at every pruned place, and an optimizer that works entry by entry
keeps them exactly there: every term of its update is a product or a sum of zeros. Any other
optimizer (Muon mixes rows and columns) has weight and state zeroed again after its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from resu_compile.kernels.mask_bits import zero_where_
from resu_compile.optim import SGD, AdamW
from resu_compile.phase import Phase, Routing
from resu_compile.runtime.masked_optimizer import Entry, MaskedOptimizer
from resu_compile.runtime.optimizer_state import zero_state
from resu_compile.runtime.resurrection import factor_of, skipped_by_scaler
from resu_compile.state import MaskedWeight, masked_weight_of, registry_epoch

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

# Exact types only: a subclass may override step(). Adamax is not among them: its exp_inf holds eps
# where the gradient is 0.
ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        optim.SGD,
        optim.Adam,
        optim.AdamW,
        optim.RMSprop,
        optim.Adafactor,
        optim.Adagrad,
        optim.Adadelta,
        optim.NAdam,
        optim.RAdam,
        AdamW,
        SGD,
    }
)


LOOK_EVERY = 32  # steps


@dataclass
class _View:
    """The masked weights of one optimizer, and the masks that its state fits."""

    signature: tuple[object, ...]
    entries: list[Entry]
    state: Mapping[Any, Any]  # load_state_dict() puts another one in its place
    synced: MutableMapping[MaskedWeight, int] = field(default_factory=WeakKeyDictionary)
    steps: int = 0
    hidden: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)  # gradients

    def is_synced(self, weight: MaskedWeight) -> bool:
        """True if the state is 0 wherever the present mask of ``weight`` is."""
        return self.synced.get(weight) == weight.mask_version


_views: WeakKeyDictionary[Optimizer, _View] = WeakKeyDictionary()
_controllers: WeakSet[Controller] = WeakSet()
# packed masks of what survived a commit that no optimizer has seen
_survivors: WeakKeyDictionary[MaskedWeight, Tensor] = WeakKeyDictionary()
_installed = False


def install() -> None:
    """Register the hooks with PyTorch, once a process."""
    global _installed
    if not _installed:
        # a compiled optimizer.step must call them, not trace them
        untraced = torch.compiler.disable(reason="resu_compile masks gradients and state")
        register_optimizer_step_pre_hook(untraced(_before_step))
        register_optimizer_step_post_hook(untraced(_after_step))
        _installed = True


def watch(controller: Controller) -> None:
    """Look after the parameters of ``controller``'s model that have no mask but may be frozen."""
    _controllers.add(controller)


def optimizers_of(weight: MaskedWeight) -> list[Optimizer]:
    """The optimizers that have stepped ``weight``."""
    return [
        optimizer
        for optimizer, view in list(_views.items())
        if any(found is weight for _, _, found in view.entries)
    ]


def all_optimizers() -> list[Optimizer]:
    """The optimizers that have made a step, of masked weights or not."""
    return list(_views)


def mark_synced(optimizer: Optimizer, weight: MaskedWeight) -> None:
    """Note that ``optimizer``'s state fits the present mask of ``weight``."""
    view = _views[optimizer]
    view.state = optimizer.state
    view.synced[weight] = weight.mask_version


@contextmanager
def state_follows(
    weight: MaskedWeight, survivors: Tensor, *, packed: bool = True
) -> Iterator[None]:
    """Around a change of ``weight``'s mask: its state becomes 0 wherever it does not survive.

    Args:
        weight: whose mask changes inside the block.
        survivors: packed mask of the places whose state stays as it is.
        packed: False where pruned places have state as well, which no optimizer may pack away.
    """
    parameter, optimizers = weight.parameter, optimizers_of(weight)
    for optimizer in optimizers:
        if isinstance(optimizer, MaskedOptimizer):
            optimizer.unpack_state(parameter, weight)
    yield
    for optimizer in optimizers:
        zero_state(optimizer, parameter, survivors, keep=True)
        if packed and isinstance(optimizer, MaskedOptimizer) and optimizer.packs_state:
            optimizer.pack_state(parameter, weight)
        mark_synced(optimizer, weight)
    running = weight.controller.resurrection
    earlier = _survivors.pop(weight, None)
    if earlier is not None:
        _survivors[weight] = earlier.to(survivors.device) & survivors
    elif not optimizers and running is not None and running.resumed:
        # theta's means come with the state of an optimizer that has not stepped yet
        _survivors[weight] = survivors


def forget_survivors(weight: MaskedWeight) -> None:
    """The mask of ``weight`` is another one now, loaded with the state that belongs to it."""
    _survivors.pop(weight, None)


def _zero_on_first_sight(
    optimizer: Optimizer, view: _View, parameter: nn.Parameter, weight: MaskedWeight
) -> None:
    """Fit the state that ``optimizer`` has brought along to the mask."""
    bits = _survivors.pop(weight, weight.bits).to(weight.bits.device)
    zero_state(optimizer, parameter, bits, keep=True)
    view.synced[weight] = weight.mask_version


def let_go(weight: MaskedWeight, *, loaded: bool = True) -> None:
    """Give the state of ``weight`` the shape that a plain optimizer expects.

    Args:
        weight: whose mask goes away.
        loaded: also state that was loaded since the last step, for a mask that may be to come.
    """
    for optimizer in optimizers_of(weight):
        is_known = _views[optimizer].state is optimizer.state
        if isinstance(optimizer, MaskedOptimizer) and (loaded or is_known):
            optimizer.unpack_state(weight.parameter, weight)


def _view_of(optimizer: Optimizer) -> _View:
    groups = optimizer.param_groups
    signature = (registry_epoch(), *((id(group), len(group["params"])) for group in groups))
    view = _views.get(optimizer)
    if view is None:
        view = _views[optimizer] = _View((), [], optimizer.state)
    if view.state is not optimizer.state:
        view.state = optimizer.state
        for known in list(view.synced):
            if known.controller.phase is not Phase.RESU:  # theta's means are kept as loaded
                del view.synced[known]
    if view.signature != signature:
        view.signature = signature
        view.entries = [
            (group, parameter, weight)
            for group in groups
            for parameter in group["params"]
            if (weight := masked_weight_of(parameter)) is not None
        ]
    return view


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    view = _view_of(optimizer)
    if not view.entries and not any(controller.freezes_all for controller in _controllers):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
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
    if view.steps % LOOK_EVERY == 0:
        _look_for_hidden_writes(view)
    view.steps += 1
    view.hidden.clear()  # of a step() that raised
    _freeze_others(optimizer, view)
    own: list[Entry] = []
    seen: dict[Controller, list[tuple[str, Tensor]]] = {}
    for group, parameter, weight in view.entries:
        controller, running = weight.controller, weight.controller.resurrection
        weight.follow(parameter)
        if controller.phase is Phase.SPARSE:
            if not view.is_synced(weight):
                _zero_on_first_sight(optimizer, view, parameter, weight)
            weight.enforce_zeros(parameter)
            weight.clean_gradient(parameter, Routing.ACTIVE)
        nested = False
        if running is not None:
            if weight not in view.synced and (not running.resumed or weight in _survivors):
                _zero_on_first_sight(optimizer, view, parameter, weight)  # from before sparsify
            running.observe(optimizer, weight, parameter)
            if running.has_to_choose(weight) and not skipped_by_scaler(optimizer):
                running.choose(weight, parameter)
            if weight.live is not None:
                weight.clean_gradient(parameter, running.routing)
            nested = running.is_nested(optimizer, weight)
            running.show(weight, parameter)
        moments, grad = controller.moments, parameter.grad
        if (
            moments is not None
            and grad is not None
            and not nested
            and moments.enter(weight.name, grad, weight.backward_count)
        ):
            seen.setdefault(controller, []).append((weight.name, grad))
        if _steps_it_itself(optimizer, group, parameter, weight, nested=nested):
            own.append((group, parameter, weight))
        elif running is not None and not nested:
            running.before_step(optimizer, group, weight, parameter)
    for controller, grads in seen.items():
        if controller.moments is not None and not skipped_by_scaler(optimizer):
            controller.moments.observe(grads, factor_of(optimizer, {}))
    if own:
        assert isinstance(optimizer, MaskedOptimizer)
        optimizer.step_masked(own)
        for _, parameter, _ in own:
            _hide_gradient(view, parameter)


def _freeze_others(optimizer: Optimizer, view: _View) -> None:
    """Hide the gradients of what has no mask from ``optimizer``, where only theta may move."""
    models = [controller.model for controller in _controllers if controller.freezes_all]
    if not models:
        return
    held = {id(parameter) for model in models for parameter in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (
                id(parameter) in held
                and parameter.grad is not None
                and masked_weight_of(parameter) is None
            ):
                _hide_gradient(view, parameter)


def _hide_gradient(view: _View, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        view.hidden.append((parameter, parameter.grad))
        parameter.grad = None


def _steps_it_itself(
    optimizer: Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    weight: MaskedWeight,
    *,
    nested: bool = False,
) -> bool:
    """Whether ``optimizer`` knows what the phase asks of ``weight``; else its state is torch's."""
    if not isinstance(optimizer, MaskedOptimizer) or parameter.grad is None:
        return False
    if not nested and optimizer.takes_over(group, parameter, weight):
        return True
    optimizer.unpack_state(parameter, weight)
    return False


def _look_for_hidden_writes(view: _View) -> None:
    """Look at what versions say is masked: ``p.grad.data.add_(noise)`` writes past them.

    A loop that does so does it from the first step on; its weights are masked at every step then.
    """
    flags = {
        weight: flag
        for _, parameter, weight in view.entries
        if weight.controller.phase is not Phase.DENSE and weight.bits.device == parameter.device
        if not (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
        if (flag := weight.hidden_write(parameter)) is not None
    }
    if not flags:
        return
    device = next(iter(flags.values())).device
    found = torch.stack([flag.to(device) for flag in flags.values()]).tolist()  # waits once
    for weight, written in zip(flags, found, strict=True):
        if written:
            weight.trusts_versions = False
            if weight.controller.phase is Phase.SPARSE:  # theta's means stay, see _finish
                view.synced.pop(weight, None)


def _after_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    view = _views.get(optimizer)
    if view is not None and (view.entries or view.hidden):
        _finish(optimizer, view, final=True)


def _finish(optimizer: Optimizer, view: _View, *, final: bool) -> None:
    while view.hidden:
        parameter, grad = view.hidden.pop()
        parameter.grad = grad
    elementwise = type(optimizer) in ELEMENTWISE and not _has_other_hooks(optimizer)
    for _, parameter, weight in view.entries:
        weight.step_count += 1
        controller = weight.controller
        if controller.moments is not None:
            controller.moments.leave(weight.name)
        # in float16 Adam's denominator is 0 where the mean square is: 0 / 0 is NaN
        is_exact = parameter.dtype != torch.float16
        if controller.phase is Phase.RESU:
            assert controller.resurrection is not None
            controller.resurrection.after_step(weight, parameter)
            exact = elementwise and is_exact and weight.trusts_versions
            held = None if exact or not final else controller.resurrection.held(weight)
            if held is not None:
                zero_where_(parameter, held, True)
                zero_state(optimizer, parameter, held, keep=True)
        elif controller.phase is Phase.SPARSE and final:
            if elementwise and is_exact:
                weight.trust_value(parameter)
            else:
                weight.distrust_value()  # not every optimizer's writes reach the version counter
                weight.enforce_zeros(parameter)
                zero_state(optimizer, parameter, weight.bits, keep=True)


def _has_other_hooks(optimizer: Optimizer) -> bool:
    """Hooks of the user's own run between ours and may write anything."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or len(_global_optimizer_pre_hooks) > 1
        or len(_global_optimizer_post_hooks) > 1
    )

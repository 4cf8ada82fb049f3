"""What a controller saves and loads: plain data for checkpoints, snapshots for model copies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels.mask_bits import unpack_mask
from resu_compile.phase import Phase
from resu_compile.runtime import optimizer_hooks
from resu_compile.runtime.gradient_moments import GradientMoments
from resu_compile.runtime.mask_history import MaskHistory
from resu_compile.runtime.resurrection import Resurrection
from resu_compile.selection import NamedWeight
from resu_compile.state import MaskedWeight

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

STATE_VERSION = 1
STATE_KEYS = ("version", "phase", "config", "masks", "shapes", "generator", "resurrection")
PRUNE_ARGUMENTS = ("method", "scope", "distribution", "overrides", "min_density", "pattern")


# -- plain data --------------------------------------------------------------------------------
def state_of(controller: Controller) -> dict[str, Any]:
    """Plain data and tensors, all of it copies; see ``Controller.state_dict``."""
    weights, running = controller.weights, controller.resurrection
    if running is not None:
        running.recover(weights)
    return {
        "version": STATE_VERSION,
        "phase": str(controller.phase),
        "config": _config_state(controller),
        "masks": {name: weight.bits.clone() for name, weight in weights.items()},
        "shapes": {name: list(weight.shape) for name, weight in weights.items()},
        "generator": controller.generator.get_state(),
        "resurrection": running.state_dict() if running else None,
        "history": controller.history.state_dict(),
        "moments": None if controller.moments is None else controller.moments.state_dict(),
    }


def _config_state(controller: Controller) -> dict[str, Any]:
    config = controller.config
    values = {key: getattr(config, key) for key in ("sparsity", *PRUNE_ARGUMENTS)}
    if not isinstance(values["method"], str):
        del values["method"]
    return {**values, "overrides": dict(config.overrides)}


def load_state(controller: Controller, state: Mapping[str, Any]) -> None:
    """Take over ``state``, or raise before anything has changed."""
    weights = controller.weights
    _check_state(controller, state)
    masks = {
        name: unpack_mask(state["masks"][name].to(weight.bits.device), weight.shape)
        for name, weight in weights.items()
    }
    # a state without a pattern was written before there were any
    config = replace(controller.config, **{"pattern": None, **state["config"]})
    phase, saved = Phase(state["phase"]), state["resurrection"]
    resurrection = Resurrection.from_state_dict(saved) if saved else None
    history = MaskHistory(state.get("history"))
    moments = state.get("moments")  # of a state that was written before there were any
    controller.generator.set_state(state["generator"].cpu())
    counts = {name: weight.nnz for name, weight in weights.items()}
    for name, weight in weights.items():
        optimizer_hooks.let_go(weight, loaded=False)
        weight.set_mask(masks[name])
        optimizer_hooks.forget_survivors(weight)
    if any(weights[name].nnz != count for name, count in counts.items()):
        controller.structure += 1
    controller.config = config
    controller._phase = phase
    controller.resurrection = resurrection
    if resurrection is not None:
        resurrection.attach(weights)
    controller.history = history
    controller.moments = None if moments is None else GradientMoments.from_state_dict(moments)
    controller.epoch += 1


def _check_state(controller: Controller, state: Mapping[str, Any]) -> None:
    weights = controller.weights
    if not isinstance(state, Mapping) or any(key not in state for key in STATE_KEYS):
        raise ArgumentError(
            "state: expected what controller(model).state_dict() returns, got "
            + (f"keys {sorted(map(str, state))}" if isinstance(state, Mapping) else repr(state))
        )
    if state["version"] != STATE_VERSION:
        raise ArgumentError(
            f"state: expected version {STATE_VERSION}, got {state['version']!r}; "
            "load it with the release that wrote it"
        )
    if state["phase"] not in list(Phase):
        raise ArgumentError(
            f"state: expected a phase among {', '.join(Phase)}, got {state['phase']!r}"
        )
    missing = sorted(set(weights) - set(state["masks"]))
    unexpected = sorted(set(state["masks"]) - set(weights))
    if missing or unexpected:
        raise ArgumentError(
            f"state: expected masks for exactly the pruned weights; missing {missing}, "
            f"unexpected {unexpected}; sparsify with the same targets and exclude"
        )
    for name, weight in weights.items():
        shape = tuple(state["shapes"][name])
        if shape != tuple(weight.shape):
            raise ArgumentError(
                f"state: expected shape {tuple(weight.shape)} for {name}, got {shape}"
            )
        _check_bits(state["masks"][name], weight, "mask")
    for name, theta in ((state["resurrection"] or {}).get("hidden") or {}).items():
        if name not in weights or theta.shape != weights[name].shape:
            raise ArgumentError(
                f"state: expected hidden theta of masked weights in their shapes, got {name} "
                f"with {tuple(theta.shape)}"
            )
    for name, bits in (state.get("history") or {}).items():
        if name not in weights:
            raise ArgumentError(f"state: expected the history of masked weights, got {name}")
        _check_bits(bits, weights[name], "history")


def _check_bits(bits: object, weight: MaskedWeight, what: str) -> None:
    expected = math.ceil(weight.numel / 8)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or len(bits) != expected:
        raise ArgumentError(
            f"state: expected {expected} bytes of {what} for {weight.name}, got {bits!r}"
        )


# -- copies of the model -----------------------------------------------------------------------
def snapshot_of(controller: Controller) -> dict[str, Any]:
    """Configuration, modules and state; see ``Controller.snapshot``."""
    weights = controller.weights.values()
    return {
        "config": controller.config.without_predicates(),
        "compile_config": controller.compile_config,
        "skipped": dict(controller.skipped),
        "weights": [(w.name, w.aliases, w.owner, w.attribute) for w in weights],
        "state": controller.state_dict(),
    }


def masks_of_snapshot(snapshot: Mapping[str, Any]) -> list[tuple[NamedWeight, Tensor]]:
    """The weights of the copy and their bool masks, as ``Controller`` takes them."""
    state, masks = snapshot["state"], []
    for name, aliases, owner, attribute in snapshot["weights"]:
        named = NamedWeight(name, owner, attribute, owner._parameters[attribute], aliases)
        masks.append((named, unpack_mask(state["masks"][name], state["shapes"][name])))
    return masks

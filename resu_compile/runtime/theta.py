"""Theta of one weight: where it lives, and one step of it.

In place, theta is in the pruned places of the weight and the means of its rule are in the pruned
places of the optimizer's own state, which are 0 otherwise. In compact storage both are vectors of
one number a pruned place, and the weight shows theta, rounded to its own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.fused_update import STAY, Step, fused_update
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask
from resu_compile.kernels.selective_step import selective_step_
from resu_compile.runtime.optimizer_state import same_shaped_state
from resu_compile.runtime.rules import (
    EMAS,
    RULES,
    choose_subset,
    elementwise_step,
    selective_options,
    state_names,
)
from resu_compile.state import MaskedWeight

Means = tuple[Tensor | None, Tensor | None]


class Theta:
    """What a rule remembers of one weight's theta, and how it moves it.

    Attributes:
        config: of the phase.
        step: steps taken.
        buffers: means that no optimizer has a place for: of the weight's shape in place, of shape
            ``[p]`` in compact storage.
        vector: theta, shape ``[p]``, in compact storage; else None.
        chosen: packed mask of the subset that moves; None if all do.
    """

    def __init__(self, config: ResurrectionConfig) -> None:
        self.config = config
        self.step = 0
        self.buffers: dict[str, Tensor] = {}
        self.vector: Tensor | None = None
        self.chosen: Tensor | None = None

    def begin(
        self, weight: MaskedWeight, parameter: nn.Parameter, generator: torch.Generator
    ) -> None:
        """Write the first theta into the pruned places of ``parameter``."""
        config = self.config
        if weight.nnz == weight.numel:
            return
        if config.init != "zero":
            mask = weight.mask
            active = parameter.detach()[mask].float()
            sigma = float(active.std(unbiased=False)) if weight.nnz else 0.0
            noise = torch.empty(weight.shape)  # drawn on the CPU: the same theta on every device
            if config.init == "normal":
                noise.normal_(0.0, config.eps * sigma, generator=generator)
            else:
                noise.uniform_(-config.eps * sigma, config.eps * sigma, generator=generator)
            with torch.no_grad():
                theta = noise.to(device=parameter.device, dtype=parameter.dtype)
                parameter.copy_(torch.where(mask, parameter, theta))
        if config.storage == "compact":
            with torch.inference_mode(False):  # steps write it outside
                self.vector = weight.gather(parameter.detach(), False).to(_wide(parameter))

    # -- one step ------------------------------------------------------------------------------
    def move(
        self,
        optimizer: torch.optim.Optimizer,
        group: Mapping[str, Any],
        weight: MaskedWeight,
        parameter: nn.Parameter,
        active: Step = STAY,
        grad_factor: float = 1.0,
    ) -> None:
        """One step of theta, and of the active places along with it.

        Args:
            optimizer: the user's; its state holds theta's means where it has a place for them.
            group: the parameter group, whose ``lr`` theta follows unless it has its own.
            weight: the masked weight.
            parameter: its parameter, with a gradient.
            active: step of the active places, not taken if they are frozen; theta's own if it
                has no rule, of a phase that freezes them.
            grad_factor: multiplies the gradient.
        """
        assert parameter.grad is not None
        config, grad = self.config, parameter.grad.detach()
        self._follow(parameter.device)
        has_theta = weight.nnz < weight.numel
        with torch.no_grad():
            if config.rule == "optimizer":  # its step at the other side of the mask
                means = _means_of(optimizer.state, parameter, active)
                fused_update(parameter, grad, *means, ~weight.bits, active, STAY, None, grad_factor)
                return
            active = STAY if config.freeze_active else active
            theta = STAY
            if not has_theta:
                self._step_sides(optimizer, weight, parameter, active, theta, grad_factor)
                return
            self.step += 1
            lr = self._lr(optimizer, group)
            self._choose(weight, grad)
            if config.storage == "inplace" and config.rule != "selective":
                theta = elementwise_step(config, self.step, lr)
            self._step_sides(optimizer, weight, parameter, active, theta, grad_factor)
            if config.storage == "compact":
                self._move_vector(weight, parameter, grad, lr, grad_factor)
            elif config.rule == "selective":
                self._select(optimizer, weight, parameter, grad, lr, grad_factor)

    def _step_sides(
        self,
        optimizer: torch.optim.Optimizer,
        weight: MaskedWeight,
        parameter: nn.Parameter,
        active: Step,
        theta: Step,
        grad_factor: float,
    ) -> None:
        """Both sides in one pass, or in two if each keeps its means in tensors of its own."""
        assert parameter.grad is not None
        ours = self._means(optimizer, parameter, theta)
        theirs = _means_of(optimizer.state, parameter, active)
        if ours[0] is not None and theirs[0] is not None and ours[0] is not theirs[0]:
            passes = [(active, STAY, theirs), (STAY, theta, ours)]
        else:
            first, second = (a if a is not None else b for a, b in zip(theirs, ours, strict=True))
            passes = [(active, theta, (first, second))]
        for one, other, (first, second) in passes:
            if one is STAY and other is STAY:
                continue
            fused_update(
                parameter,
                parameter.grad.detach(),
                first,
                second,
                weight.bits,
                one,
                other,
                self.chosen,
                grad_factor,
            )

    def _select(
        self,
        optimizer: torch.optim.Optimizer,
        weight: MaskedWeight,
        parameter: nn.Parameter,
        grad: Tensor,
        lr: float,
        grad_factor: float,
    ) -> None:
        """The selective rule in place."""
        n_pruned = weight.numel - weight.nnz
        ema, ema_abs = (self._mean(optimizer, parameter, name) for name in EMAS)
        selective_step_(
            parameter,
            grad if grad_factor == 1.0 else grad * grad_factor,
            ema,
            ema_abs,
            weight.bits,
            n_pruned=n_pruned,
            **selective_options(self.config, n_pruned, lr),
        )

    def _move_vector(
        self,
        weight: MaskedWeight,
        parameter: nn.Parameter,
        grad: Tensor,
        lr: float,
        grad_factor: float,
    ) -> None:
        """Any rule in compact storage; the weight then shows theta."""
        theta = self.vector
        assert theta is not None
        shown = weight.gather(parameter.detach(), False)  # the user may have written others
        theta.copy_(torch.where(shown == theta.to(shown.dtype), theta, shown))
        vectors = {
            name: self.buffers.setdefault(name, torch.zeros_like(theta))
            for name in state_names(self.config)
        }
        if self.chosen is not None:
            vectors["chosen"] = weight.gather(unpack_mask(self.chosen, weight.shape), False)
        part = weight.gather(grad, False).to(theta.dtype) * grad_factor
        RULES[self.config.rule](theta, part, vectors, self.step, lr, self.config)
        weight.scatter_(parameter, theta, False)

    def _choose(self, weight: MaskedWeight, grad: Tensor) -> None:
        """Choose the subset of the rule of that name, where it is due."""
        config = self.config
        refresh = config.refresh > 0 and (self.step - 1) % config.refresh == 0
        if config.rule != "subset" or not (self.chosen is None or refresh):
            return
        generator = weight.controller.generator
        chosen = choose_subset(weight.gather(grad, False), config, generator)
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=grad.device)
        self.chosen = pack_mask(mask.masked_scatter_(~weight.mask, chosen))

    def _lr(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
        if self.config.lr is not None:
            return self.config.lr
        if "lr" not in group:
            raise ArgumentError(
                f"lr: expected a number, because {type(optimizer).__name__} has no 'lr' in its "
                "parameter groups to follow; got None"
            )
        return float(group["lr"])

    def settle(self, weight: MaskedWeight, before: Tensor) -> None:
        """Go on under a new mask: only places that stay pruned keep their means.

        Args:
            weight: with its new mask.
            before: bool, the mask before.
        """
        self.chosen = None  # of other places from here on
        for value in self.buffers.values():
            value.masked_fill_((before | weight.mask).to(value.device), 0)

    # -- the means of the rule -----------------------------------------------------------------
    def _means(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: Step
    ) -> Means:
        """First and second mean of theta, of the weight's shape; None where it has none."""
        found = [self._mean(optimizer, parameter, name) for name in _mean_names(step)]
        return _pair(found)

    def _mean(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str) -> Tensor:
        """The tensor ``name`` of the optimizer's state; one beside it where there is none.

        The one beside is at least float32: in float16 an Adam denominator of 1e-8 is 0, and
        0 / 0 is NaN.
        """
        beside = self.buffers.get(name)
        slot = theta_slot(optimizer, parameter, name)
        if slot is None:
            if beside is None:
                beside = torch.zeros_like(parameter, dtype=_wide(parameter))
            self.buffers[name] = beside
            return beside
        if beside is not None:  # the optimizer has made its state since
            slot.add_(self.buffers.pop(name))  # the one is 0 where the other is not
        return slot

    def _follow(self, device: torch.device) -> None:
        """Follow a model that moved."""
        if self.vector is not None:
            self.vector = self.vector.to(device)
        if self.chosen is not None:
            self.chosen = self.chosen.to(device)
        self.buffers = {name: value.to(device) for name, value in self.buffers.items()}

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain data and copies of the tensors."""
        return {
            "step": self.step,
            "buffers": {key: value.clone() for key, value in self.buffers.items()},
            "theta": None if self.vector is None else self.vector.clone(),
            "chosen": None if self.chosen is None else self.chosen.clone(),
        }

    @classmethod
    def from_state_dict(cls, config: ResurrectionConfig, data: Mapping[str, Any]) -> Theta:
        """The theta that ``state_dict`` described; tensors are copied."""
        theta = cls(config)
        theta.step = int(data["step"])
        theta.buffers = {key: value.clone() for key, value in data["buffers"].items()}
        vectors = [data.get(key) for key in ("theta", "chosen")]  # saves before these lack them
        theta.vector, theta.chosen = (None if v is None else v.clone() for v in vectors)
        return theta


def theta_slot(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Tensor | None:
    """The optimizer's own state tensor ``name``, if theta's mean can live in its pruned places."""
    for key, value in same_shaped_state(optimizer, parameter):
        if key == name and value.dtype != torch.float16 and value.device == parameter.device:
            return value
    return None


def _mean_names(step: Step) -> tuple[str, ...]:
    if step.kind == "adam":
        return EMAS
    return ("momentum_buffer",) if step.kind == "sgd" and step.beta1 else ()


def _means_of(
    state: Mapping[Tensor, Mapping[str, Tensor]], parameter: nn.Parameter, step: Step
) -> Means:
    return _pair([state[parameter][name] for name in _mean_names(step)])


def _pair(found: list[Tensor]) -> Means:
    first, second, *_ = (*found, None, None)
    return first, second


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)

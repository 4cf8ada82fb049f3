"""The RESU phase: theta of every weight, and what happens around each ``optimizer.step()``.

The rule (runtime/rules.py) moves theta (runtime/theta.py), while the user's optimizer moves the
active weights, or nothing if they are frozen. ``resu_compile.optim`` does both in one pass over
memory; from any other optimizer theta is set aside while it steps (runtime/set_aside.py).

Source: RESU (huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.config import ResurrectionConfig
from resu_compile.kernels.mask_bits import pack_mask
from resu_compile.phase import Routing
from resu_compile.runtime.commit_report import CommitReport
from resu_compile.runtime.gradient_score import LastGradients
from resu_compile.runtime.hidden_theta import HiddenTheta
from resu_compile.runtime.rules import state_names
from resu_compile.runtime.set_aside import SetAside
from resu_compile.runtime.theta import Theta
from resu_compile.sparsity import only_at, topk_mask
from resu_compile.state import MaskedWeight


class Resurrection:
    """One RESU phase of one controller.

    Attributes:
        config: what ``resurrect`` was given.
        thetas: weight name -> its theta.
        report: what the commit did, once there was one.
        gradients: those of the last step, if the commit is to score by them.
        hidden: theta, if forward passes do not see it.
        committing: True while a commit looks at the weights, which show theta to its own forward
            passes as well (calibration, scores).
        resumed: True if it came out of a ``state_dict``.
        chosen: weight name -> packed mask of the pruned places that hold theta, once
            ``config.places`` has chosen them.
        live: weight name -> packed mask of all places that train then.
        score_lost: True if its commit was to use a score function, which no ``state_dict`` holds.
    """

    def __init__(self, config: ResurrectionConfig) -> None:
        self.config = config
        self.thetas: dict[str, Theta] = {}
        self.chosen: dict[str, Tensor] = {}
        self.live: dict[str, Tensor] = {}
        self.report: CommitReport | None = None
        self.resumed = False
        self.score_lost = False
        self.committing = False
        self._hidden: dict[str, SetAside] = {}
        by_gradient = config.score in ("gradient", "growth")
        self.gradients = LastGradients() if by_gradient else None
        self.hidden = HiddenTheta() if config.hidden else None

    @property
    def routing(self) -> Routing:
        """Where gradients go in this phase."""
        return Routing.PRUNED if self.config.freeze_active else Routing.ALL

    @property
    def has_own_rule(self) -> bool:
        """Whether theta has a step of its own instead of the optimizer's."""
        return self.config.rule != "optimizer"

    # -- theta -------------------------------------------------------------------------------
    def init_theta(
        self, weight: MaskedWeight, parameter: nn.Parameter, generator: torch.Generator
    ) -> None:
        """Write the first theta into the pruned places of ``parameter``."""
        self.theta_of(weight).begin(weight, parameter, generator)
        if self.hidden is not None:
            self.hidden.begin(weight, parameter)

    def theta_of(self, weight: MaskedWeight) -> Theta:
        """Theta of ``weight``."""
        if weight.name not in self.thetas:
            self.thetas[weight.name] = Theta(self.config)
        return self.thetas[weight.name]

    def choose(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Let the pruned places with the largest |g| hold theta, and no others from here on.

        The first step of the phase computes a dense gradient for it, which several ranks have
        averaged by then.
        """
        share, grad = self.config.places, parameter.grad
        if share is None or grad is None or not self.has_to_choose(weight):
            return
        mask = weight.mask
        count = min(int(share * weight.nnz), weight.numel - weight.nnz)
        size = grad.detach().to_dense().abs() if grad.is_sparse else grad.detach().abs()
        with torch.inference_mode(False):
            self._keep(weight, pack_mask(topk_mask(only_at(size.to(mask.device), ~mask), count)))
        weight.forget_clean_gradient()

    def _keep(self, weight: MaskedWeight, chosen: Tensor) -> None:
        self.chosen[weight.name] = chosen
        self.live[weight.name] = chosen if self.config.freeze_active else chosen | weight.bits

    def held(self, weight: MaskedWeight) -> Tensor | None:
        """Packed mask of the places of ``weight`` that are not 0; None if all may be so."""
        chosen = self.chosen.get(weight.name)
        return None if chosen is None else chosen.to(weight.bits.device) | weight.bits

    def has_to_choose(self, weight: MaskedWeight) -> bool:
        """Whether the places of ``weight`` that hold theta are yet to be chosen."""
        return self.config.places is not None and weight.name not in self.chosen

    @property
    def is_choosing(self) -> bool:
        """Whether the next step needs dense gradients, to choose the places of theta by."""
        return self.config.places is not None and not self.chosen

    # -- around optimizer.step() ---------------------------------------------------------------
    def observe(
        self, optimizer: torch.optim.Optimizer, weight: MaskedWeight, parameter: nn.Parameter
    ) -> None:
        """Remember the gradient that ``optimizer`` steps ``parameter`` with, if the score asks."""
        if self.gradients is None or parameter.grad is None or skipped_by_scaler(optimizer):
            return
        self.gradients.observe(weight.name, parameter.grad)

    def is_nested(self, optimizer: torch.optim.Optimizer, weight: MaskedWeight) -> bool:
        """Whether ``optimizer`` steps within the step() of another, so that theta has moved."""
        hidden = self._hidden.get(weight.name)
        if hidden is None or hidden.backward_count != weight.backward_count:
            return self.hidden is not None and self.hidden.is_shown(weight)
        hidden.enter(optimizer)
        return True

    def show(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Let the weight show theta until ``after_step``."""
        if self.hidden is not None:
            aside = self._hidden.get(weight.name)
            if aside is not None and aside.backward_count != weight.backward_count:
                self._recover(weight)  # of a step() that raised
            self.hidden.show(weight, parameter)

    def before_step(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        weight: MaskedWeight,
        parameter: nn.Parameter,
    ) -> None:
        """Move theta by its rule and hide from the optimizer what it must not move."""
        config = self.config
        self._recover(weight)
        if parameter.grad is None:
            return
        weight.clean_gradient(parameter, self.routing)
        own_rule = self.has_own_rule
        has_theta = weight.nnz < weight.numel
        if own_rule and has_theta and not skipped_by_scaler(optimizer):
            factor = factor_of(optimizer, group)
            self.theta_of(weight).move(optimizer, group, weight, parameter, grad_factor=factor)
        if not config.freeze_active and not (own_rule and has_theta):
            return  # all of it is the optimizer's
        hidden = self._hidden[weight.name] = SetAside(optimizer, weight, parameter)
        if not config.freeze_active:
            hidden.set_theta_aside(state_names(config))
        elif own_rule or not has_theta:
            hidden.hide_gradient()
        else:
            hidden.keep_active()

    def after_step(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Put back what ``before_step`` hid, and hide what ``show`` showed."""
        hidden = self._hidden.get(weight.name)
        if hidden is not None:
            hidden.depth -= 1
            if hidden.depth == 0:
                del self._hidden[weight.name]
                hidden.restore_gradient()
                hidden.restore_weight()
        if self.hidden is not None:
            self.hidden.hide(weight, parameter)

    @contextmanager
    def shown(self, weights: Mapping[str, MaskedWeight]) -> Iterator[None]:
        """Let the weights show theta inside the block, which is to commit; not if it raises."""
        if self.hidden is None:
            yield
            return
        for weight in weights.values():
            self.hidden.show(weight, weight.parameter)
        self.committing = True
        try:
            yield
        except BaseException:
            for weight in weights.values():
                self.hidden.recover(weight, weight.parameter)
            raise
        finally:
            self.committing = False

    def settle(self, weight: MaskedWeight, before: Tensor) -> None:
        """Go on under a new mask of ``weight``, whose mask was ``before`` (bool)."""
        assert self.hidden is not None
        self.hidden.settle(weight, before)
        self.theta_of(weight).settle(weight, before)

    def recover(self, weights: Mapping[str, MaskedWeight]) -> None:
        """Put back the weights that a ``step()`` that raised has left without theta."""
        for name in list(self._hidden):
            self._recover(weights[name])
        if self.hidden is not None and not self.committing:
            for weight in weights.values():
                self.hidden.recover(weight, weight.parameter)

    def _recover(self, weight: MaskedWeight) -> None:
        hidden = self._hidden.pop(weight.name, None)
        if hidden is not None:
            hidden.restore_weight()  # the gradient is of a step that is past

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: the configuration, and what is remembered of each theta."""
        config = asdict(self.config)
        config["betas"] = list(self.config.betas)
        if callable(config["score"]) or self.score_lost:
            config["score"] = None  # a function is no data
        return {
            "config": config,
            "gradients": self.gradients.state_dict() if self.gradients else {},
            "states": {name: theta.state_dict() for name, theta in self.thetas.items()},
            "chosen": {name: bits.clone() for name, bits in self.chosen.items()},
            "hidden": self.hidden.values() if self.hidden is not None else {},
        }

    @classmethod
    def from_state_dict(cls, data: Mapping[str, Any]) -> Resurrection:
        """The phase that ``state_dict`` described; tensors are copied."""
        config = dict(data["config"])
        score_lost = config["score"] is None
        if score_lost:
            del config["score"]
        phase = cls(ResurrectionConfig(**config))
        phase.resumed = True
        phase.score_lost = score_lost
        if phase.gradients is not None:
            phase.gradients = LastGradients.from_state_dict(data.get("gradients", {}))
        for name, entry in data["states"].items():
            phase.thetas[name] = Theta.from_state_dict(phase.config, entry)
        phase.chosen = {name: bits.clone() for name, bits in data.get("chosen", {}).items()}
        if phase.hidden is not None:
            phase.hidden = HiddenTheta({k: v.clone() for k, v in data["hidden"].items()})
        return phase

    def attach(self, weights: Mapping[str, MaskedWeight]) -> None:
        """Take up ``weights``, whose masks were loaded along with this state."""
        for name, bits in self.chosen.items():
            self._keep(weights[name], bits.to(weights[name].bits.device))


def factor_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """What the optimizer multiplies the gradient by: -1 to maximise, 1 / scale if it unscales."""
    scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler, if step() unscales
    factor = 1.0 if scale is None else 1.0 / float(scale)
    return -factor if group.get("maximize", False) else factor


def skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimizer under GradScaler skips the step itself if a gradient overflowed."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())

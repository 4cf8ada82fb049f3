"""The RESU phase: theta in the pruned places of the weight, and the rule that trains it.

    adam   m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
           theta <- theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    sgd    b <- mu b + g;           theta <- theta - lr b

Theta is stored in place, so the effective weight is the weight itself. Around each
``optimizer.step()`` the rule moves theta while the user's optimizer moves the active weights, or
nothing if they are frozen. A rule with other steps is one more entry of ``RULES``.

Sources: RESU (huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md); Kingma and Ba 2015,
https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.effective_weight import route_gradient
from resu_compile.kernels.mask_bits import zero_where_
from resu_compile.phase import Routing
from resu_compile.runtime.commit import CommitReport
from resu_compile.runtime.optimizer_state import same_shaped_state, zero_state
from resu_compile.state import MaskedWeight


@dataclass
class ThetaState:
    """What a rule remembers of one weight's theta between steps."""

    step: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer ``name`` on the device of ``like``; zeros the first time.

        At least float32: in float16 an Adam denominator of 1e-8 is 0, and 0 / 0 is NaN.
        """
        found = self.buffers.get(name)
        dtype = torch.promote_types(like.dtype, torch.float32)
        if found is None:
            found = torch.zeros_like(like, dtype=dtype)
        found = found.to(device=like.device, dtype=dtype)
        self.buffers[name] = found
        return found


Rule = Callable[[Tensor, Tensor, ThetaState, float, ResurrectionConfig], None]


def adam_rule(
    weight: Tensor, grad: Tensor, state: ThetaState, lr: float, config: ResurrectionConfig
) -> None:
    """One Adam step of theta in place. ``grad`` is 0 at the active set, which thus stays."""
    beta1, beta2 = config.betas
    exp_avg = state.buffer("exp_avg", weight)
    exp_avg_sq = state.buffer("exp_avg_sq", weight)
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    correction1 = 1.0 - beta1**state.step
    correction2 = 1.0 - beta2**state.step
    denominator = (exp_avg_sq / correction2).sqrt_().add_(config.adam_eps)
    weight.addcdiv_(exp_avg, denominator, value=-lr / correction1)


def sgd_rule(
    weight: Tensor, grad: Tensor, state: ThetaState, lr: float, config: ResurrectionConfig
) -> None:
    """One step of SGD with momentum in place. ``grad`` is 0 at the active set."""
    if config.momentum:
        grad = state.buffer("momentum", weight).mul_(config.momentum).add_(grad)
    weight.add_(grad, alpha=-lr)


RULES: dict[str, Rule] = {"adam": adam_rule, "sgd": sgd_rule}


class Resurrection:
    """One RESU phase of one controller.

    Attributes:
        config: what ``resurrect`` was given.
        states: weight name -> what the rule remembers.
        report: what the commit did, once there was one.
        resumed: True if it came out of a ``state_dict``.
        score_lost: True if its commit was to use a score function, which no ``state_dict`` holds.
    """

    def __init__(self, config: ResurrectionConfig) -> None:
        self.config = config
        self.states: dict[str, ThetaState] = {}
        self.report: CommitReport | None = None
        self.resumed = False
        self.score_lost = False
        self._hidden: dict[str, _Hidden] = {}

    @property
    def routing(self) -> Routing:
        """Where gradients go in this phase."""
        return Routing.PRUNED if self.config.freeze_active else Routing.ALL

    # -- theta -------------------------------------------------------------------------------
    def init_theta(
        self, weight: MaskedWeight, parameter: nn.Parameter, generator: torch.Generator
    ) -> None:
        """Write the first theta into the pruned places of ``parameter``."""
        config = self.config
        if config.init == "zero" or weight.nnz == weight.numel:
            return
        mask = weight.mask
        sigma = float(parameter.detach()[mask].float().std(unbiased=False)) if weight.nnz else 0.0
        noise = torch.empty(weight.shape)  # drawn on the CPU: the same theta on every device
        if config.init == "normal":
            noise.normal_(0.0, config.eps * sigma, generator=generator)
        else:
            noise.uniform_(-config.eps * sigma, config.eps * sigma, generator=generator)
        with torch.no_grad():
            theta = noise.to(device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(torch.where(mask, parameter, theta))

    # -- around optimizer.step() ---------------------------------------------------------------
    def before_step(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        weight: MaskedWeight,
        parameter: nn.Parameter,
    ) -> None:
        """Move theta by its rule and hide from the optimizer what it must not move."""
        config = self.config
        hidden = self._hidden.get(weight.name)
        if hidden is not None and hidden.backward_count == weight.backward_count:
            hidden.depth += 1  # a step() that calls another one: theta has moved already
            return
        self._recover(weight)
        if parameter.grad is None:
            return
        weight.clean_gradient(parameter, self.routing)
        own_rule = config.rule != "optimizer"
        has_theta = weight.nnz < weight.numel
        if own_rule and has_theta and not _skipped_by_scaler(optimizer):
            self._move_theta(optimizer, group, weight, parameter)
        if not config.freeze_active and not (own_rule and has_theta):
            return  # all of it is the optimizer's
        hidden = self._hidden[weight.name] = _Hidden(optimizer, weight, parameter)
        if not config.freeze_active:
            hidden.set_theta_aside()
        elif own_rule or not has_theta:
            hidden.hide_gradient()
        else:
            hidden.keep_active()

    def after_step(self, weight: MaskedWeight) -> None:
        """Put back what ``before_step`` hid."""
        hidden = self._hidden.get(weight.name)
        if hidden is not None:
            hidden.depth -= 1
            if hidden.depth == 0:
                del self._hidden[weight.name]
                hidden.restore_gradient()
                hidden.restore_weight()

    def recover(self, weights: Mapping[str, MaskedWeight]) -> None:
        """Put back the weights that a ``step()`` that raised has left without theta."""
        for name in list(self._hidden):
            self._recover(weights[name])

    def _recover(self, weight: MaskedWeight) -> None:
        hidden = self._hidden.pop(weight.name, None)
        if hidden is not None:
            hidden.restore_weight()  # the gradient is of a step that is past

    def _move_theta(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        weight: MaskedWeight,
        parameter: nn.Parameter,
    ) -> None:
        config = self.config
        if config.lr is None and "lr" not in group:
            raise ArgumentError(
                f"lr: expected a number, because {type(optimizer).__name__} has no 'lr' in its "
                "parameter groups to follow; got None"
            )
        lr = float(group["lr"]) if config.lr is None else config.lr
        with torch.no_grad():
            assert parameter.grad is not None
            grad = parameter.grad.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            if self.routing is not Routing.PRUNED:
                grad = route_gradient(grad, weight.bits, False)
            scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler, if step() unscales
            if scale is not None:
                grad = grad / scale.to(grad.device)
            if group.get("maximize", False):
                grad = -grad
            state = self.states.setdefault(weight.name, ThetaState())
            state.step += 1
            RULES[config.rule](parameter, grad, state, lr, config)

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: the configuration, and each theta's step and buffers."""
        config = asdict(self.config)
        config["betas"] = list(self.config.betas)
        if callable(config["score"]) or self.score_lost:
            config["score"] = None  # a function is no data
        return {
            "config": config,
            "states": {
                name: {
                    "step": state.step,
                    "buffers": {key: value.clone() for key, value in state.buffers.items()},
                }
                for name, state in self.states.items()
            },
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
        for name, entry in data["states"].items():
            buffers = {key: value.clone() for key, value in entry["buffers"].items()}
            phase.states[name] = ThetaState(int(entry["step"]), buffers)
        return phase


def _skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimizer under GradScaler skips the step itself if a gradient overflowed."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


class _Hidden:
    """What is hidden of one weight while the user's optimizer steps."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, weight: MaskedWeight, parameter: nn.Parameter
    ) -> None:
        self.depth = 1
        self.backward_count = weight.backward_count
        self._optimizer = optimizer
        self._weight = weight
        self._parameter = parameter
        self._gradient = parameter.grad
        self._stand_in = parameter.grad
        self._theta: Tensor | None = None
        self._active: Tensor | None = None
        self._active_state: dict[str, Tensor] = {}

    def hide_gradient(self) -> None:
        """Without a gradient every optimizer leaves the weight alone, weight decay included."""
        self._stand_in = self._parameter.grad = None

    def set_theta_aside(self) -> None:
        """With 0 in the pruned places the optimizer's momentum and decay cannot reach theta."""
        bits, parameter = self._weight.bits, self._parameter
        with torch.no_grad():
            self._theta = parameter.detach().clone()
            zero_where_(self._theta, bits, False)
            zero_where_(parameter, bits, True)
            assert parameter.grad is not None
            self._stand_in = parameter.grad = route_gradient(parameter.grad, bits, True)

    def keep_active(self) -> None:
        """Copy the weight and its state, to put the active part back after the step."""
        self._active = self._parameter.detach().clone()
        state = same_shaped_state(self._optimizer, self._parameter)
        self._active_state = {key: value.detach().clone() for key, value in state}

    def restore_gradient(self) -> None:
        """Give the parameter back the gradient that the optimizer did not see."""
        if self._parameter.grad is self._stand_in:
            self._parameter.grad = self._gradient

    def restore_weight(self) -> None:
        """Put theta back, or the active weights and their state."""
        bits, parameter = self._weight.bits, self._parameter
        with torch.no_grad():
            if self._theta is not None:
                zero_where_(parameter, bits, True)
                zero_state(self._optimizer, parameter, bits, keep=True)
                parameter.add_(self._theta)
            if self._active is not None:
                mask = self._weight.mask
                parameter.copy_(torch.where(mask, self._active, parameter))
                for key, value in same_shaped_state(self._optimizer, parameter):
                    if key in self._active_state:
                        value.copy_(torch.where(mask, self._active_state[key], value))
                    else:  # made in this step: untouched means zero
                        zero_where_(value, bits.to(value.device), False)

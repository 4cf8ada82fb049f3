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

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.mask_bits import zero_where_
from resu_compile.phase import Routing
from resu_compile.runtime.optimizer_state import same_shaped_state, zero_state
from resu_compile.state import MaskedWeight


@dataclass
class ThetaState:
    """What a rule remembers of one weight's theta between steps."""

    step: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer ``name``, zeros of the shape of ``like`` the first time."""
        if name not in self.buffers:
            self.buffers[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        elif self.buffers[name].device != like.device:
            self.buffers[name] = self.buffers[name].to(like.device)
        return self.buffers[name]


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
    """One RESU phase of one controller."""

    def __init__(self, config: ResurrectionConfig) -> None:
        self.config = config
        self.states: dict[str, ThetaState] = {}
        self._between: dict[str, _Between] = {}

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
        noise = torch.empty(weight.shape)
        if config.init == "normal":
            noise.normal_(0.0, config.eps * sigma, generator=generator)
        else:
            noise.uniform_(-config.eps * sigma, config.eps * sigma, generator=generator)
        with torch.no_grad():
            theta = noise.to(device=parameter.device, dtype=parameter.dtype)
            parameter.copy_(torch.where(mask, parameter, theta))
        weight.distrust_value()

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
        grad = parameter.grad
        if grad is None or weight.nnz == weight.numel:
            return
        weight.clean_gradient(grad, self.routing)
        between = _Between(parameter)
        self._between[weight.name] = between
        if config.rule == "optimizer":
            if config.freeze_active:
                between.keep_active(optimizer)
            return
        if not _skipped_by_scaler(optimizer):
            self._move_theta(optimizer, group, weight, parameter, grad)
        if config.freeze_active:
            between.hide_gradient()
        else:
            between.set_theta_aside(weight)

    def after_step(self, optimizer: torch.optim.Optimizer, weight: MaskedWeight) -> None:
        """Put back what ``before_step`` hid."""
        between = self._between.pop(weight.name, None)
        if between is not None:
            between.restore(optimizer, weight)

    def _move_theta(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        weight: MaskedWeight,
        parameter: nn.Parameter,
        grad: Tensor,
    ) -> None:
        config = self.config
        state = self.states.setdefault(weight.name, ThetaState())
        state.step += 1
        theta_grad = grad.detach().to(parameter.dtype)
        if self.routing is not Routing.PRUNED:
            theta_grad = theta_grad.clone()
            zero_where_(theta_grad, weight.bits, False)
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        if scale is not None:
            theta_grad = theta_grad / scale.to(theta_grad.device)
        if group.get("maximize", False):
            theta_grad = -theta_grad
        if config.lr is None and "lr" not in group:
            raise ArgumentError(
                f"lr: expected a number, because {type(optimizer).__name__} has no 'lr' in its "
                "parameter groups to follow; got None"
            )
        lr = float(group["lr"]) if config.lr is None else config.lr
        with torch.no_grad():
            RULES[config.rule](parameter, theta_grad, state, lr, config)

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: the configuration, and each theta's step and buffers."""
        config = asdict(self.config)
        if callable(config["score"]):
            config["score"] = "magnitude"  # a function is not data; commit(score=...) takes it
        config["betas"] = list(self.config.betas)
        return {
            "config": config,
            "states": {
                name: {"step": state.step, "buffers": dict(state.buffers)}
                for name, state in self.states.items()
            },
        }

    @classmethod
    def from_state_dict(cls, data: dict[str, Any]) -> Resurrection:
        """The phase that ``state_dict`` described; tensors are copied."""
        config = dict(data["config"])
        config["betas"] = tuple(config["betas"])
        phase = cls(ResurrectionConfig(**config))
        for name, entry in data["states"].items():
            buffers = {key: value.clone() for key, value in entry["buffers"].items()}
            phase.states[name] = ThetaState(int(entry["step"]), buffers)
        return phase


def _skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimizer under GradScaler skips the step itself if a gradient overflowed."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


class _Between:
    """What is set aside of one weight while the user's optimizer steps."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.gradient: Tensor | None = None
        self.theta: Tensor | None = None
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.active_kept = False

    def hide_gradient(self) -> None:
        """Without a gradient every optimizer leaves the weight alone, weight decay included."""
        self.gradient = self.parameter.grad
        self.parameter.grad = None

    def set_theta_aside(self, weight: MaskedWeight) -> None:
        """With 0 in the pruned places the optimizer's momentum and decay cannot reach theta."""
        with torch.no_grad():
            self.theta = self.parameter.detach().clone()
            zero_where_(self.theta, weight.bits, False)
            zero_where_(self.parameter, weight.bits, True)
            assert self.parameter.grad is not None
            zero_where_(self.parameter.grad, weight.bits, True)

    def keep_active(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy the weight and its state, to put the active part back after the step."""
        self.active_kept = True
        tensors = [self.parameter.detach(), *same_shaped_state(optimizer, self.parameter)]
        self.saved = [(tensor, tensor.clone()) for tensor in tensors]

    def restore(self, optimizer: torch.optim.Optimizer, weight: MaskedWeight) -> None:
        """Undo what ``before_step`` did."""
        with torch.no_grad():
            if self.gradient is not None:
                self.parameter.grad = self.gradient
            if self.theta is not None:
                zero_where_(self.parameter, weight.bits, True)
                zero_state(optimizer, self.parameter, weight.bits, keep=True)
                self.parameter.add_(self.theta)
            if self.active_kept:
                mask = weight.mask
                known = {id(tensor) for tensor, _ in self.saved}
                for tensor, before in self.saved:
                    tensor.copy_(torch.where(mask, before, tensor))
                for fresh in same_shaped_state(optimizer, self.parameter):
                    if id(fresh) not in known:  # made in this step: untouched means zero
                        zero_where_(fresh, weight.bits, False)

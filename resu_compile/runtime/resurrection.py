"""The RESU phase: where theta lives, and what happens around each ``optimizer.step()``.

Stored in place, theta is in the pruned places of the weight, so that the effective weight is the
weight itself, and the means that its rule keeps are in the pruned places of the optimizer's own
state, which are 0 otherwise. Stored compactly, theta and its means are vectors of one number a
pruned place; the weight then shows theta, rounded to its own dtype.

Around each ``optimizer.step()`` the rule (runtime/rules.py) moves theta, while the user's optimizer
moves the active weights, or nothing if they are frozen. ``resu_compile.optim`` does both in one
pass over memory; from any other optimizer theta is hidden while it steps.

Source: RESU (huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.bit_rank import gather_by_rank, scatter_by_rank_
from resu_compile.kernels.effective_weight import route_gradient
from resu_compile.kernels.fused_update import STAY, Step, fused_update
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask, zero_where_
from resu_compile.kernels.selective_step import selective_step_
from resu_compile.phase import Routing
from resu_compile.runtime.commit_report import CommitReport
from resu_compile.runtime.gradient_score import LastGradients
from resu_compile.runtime.optimizer_state import same_shaped_state, zero_state
from resu_compile.runtime.rules import EMAS, RULES, choose_subset, state_names
from resu_compile.state import MaskedWeight


@dataclass
class ThetaState:
    """What a rule remembers of one weight's theta between steps.

    Attributes:
        step: steps taken.
        buffers: means that no optimizer has a place for: of the weight's shape in place, of shape
            ``[p]`` in compact storage.
        theta: ``[p]`` in compact storage, else None.
        chosen: packed mask of the subset that moves, else None.
    """

    step: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)
    theta: Tensor | None = None
    chosen: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Follow a model that moved."""
        if self.theta is not None:
            self.theta = self.theta.to(device)
        if self.chosen is not None:
            self.chosen = self.chosen.to(device)
        self.buffers = {name: value.to(device) for name, value in self.buffers.items()}


class Resurrection:
    """One RESU phase of one controller.

    Attributes:
        config: what ``resurrect`` was given.
        states: weight name -> what the rule remembers.
        report: what the commit did, once there was one.
        gradients: those of the last step, if the commit is to score by them.
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
        self.gradients = LastGradients() if config.score == "gradient" else None

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
            state = self.states[weight.name] = ThetaState()
            state.theta = _pruned_part(parameter.detach(), weight).to(_wide(parameter))

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
            active: step of the active places; not taken if they are frozen. Theta takes the same
                if it has no rule of its own.
            grad_factor: multiplies the gradient.
        """
        assert parameter.grad is not None
        has_theta = weight.nnz < weight.numel
        theta = active if has_theta and not self.has_own_rule else STAY
        if self.config.freeze_active:
            active = STAY
        state = self.states.setdefault(weight.name, ThetaState())
        state.to(parameter.device)
        by_vectors = False
        lr = 0.0
        if has_theta and self.has_own_rule:
            state.step += 1
            lr = self._lr(optimizer, group)
            if self._is_due(state):
                self._choose(weight, parameter.grad.detach(), state)
            by_vectors = not self._runs_elementwise
            theta = STAY if by_vectors else self._theta_step(state.step, lr)
        with torch.no_grad():
            self._move_elementwise(optimizer, weight, parameter, state, active, theta, grad_factor)
            if by_vectors and self.config.storage == "inplace":
                self._move_selected(optimizer, weight, parameter, state, lr, grad_factor)
            elif by_vectors:
                self._move_by_vectors(weight, parameter, state, lr, grad_factor)

    @property
    def _runs_elementwise(self) -> bool:
        """Whether theta's step fits into the kernel that steps the active places."""
        return self.config.storage == "inplace" and self.config.rule != "selective"

    def _theta_step(self, step: int, lr: float) -> Step:
        """The rule of elementwise kind, as the kernel takes it."""
        config = self.config
        if "exp_avg" in state_names(config):
            beta1, beta2 = config.betas
            corrections = (1.0 - beta1**step, 1.0 - beta2**step)
            return Step(
                "adam", lr, config.weight_decay, beta1, beta2, config.adam_eps, *corrections
            )
        momentum = config.momentum if config.rule == "momentum" else 0.0
        return Step("sgd", lr, config.weight_decay, momentum)

    def _move_elementwise(
        self,
        optimizer: torch.optim.Optimizer,
        weight: MaskedWeight,
        parameter: nn.Parameter,
        state: ThetaState,
        active: Step,
        theta: Step,
        grad_factor: float,
    ) -> None:
        """Both sides in one pass, or in two if each keeps its means in tensors of its own."""
        assert parameter.grad is not None
        means = [
            self._means(optimizer, parameter, state, active, False),
            self._means(optimizer, parameter, state, theta, self.has_own_rule),
        ]
        steps = [(active, theta)]
        if means[0][0] is not None and means[1][0] is not None and means[0][0] is not means[1][0]:
            steps = [(active, STAY), (STAY, theta)]
        for (one, other), sides in zip(steps, (means, means[::-1]), strict=False):
            if one is STAY and other is STAY:
                continue
            first, second = (
                sides[0][i] if sides[0][i] is not None else sides[1][i] for i in (0, 1)
            )
            fused_update(
                parameter,
                parameter.grad.detach(),
                first,
                second,
                weight.bits,
                one,
                other,
                state.chosen,
                grad_factor,
            )

    def _move_selected(
        self,
        optimizer: torch.optim.Optimizer,
        weight: MaskedWeight,
        parameter: nn.Parameter,
        state: ThetaState,
        lr: float,
        grad_factor: float,
    ) -> None:
        """The selective rule in place."""
        assert parameter.grad is not None
        config, n_pruned = self.config, weight.numel - weight.nnz
        grad = parameter.grad.detach()
        ema, ema_abs = (self._mean(optimizer, parameter, state, name) for name in EMAS)
        selective_step_(
            parameter,
            grad if grad_factor == 1.0 else grad * grad_factor,
            ema,
            ema_abs,
            weight.bits,
            n_pruned=n_pruned,
            lr=lr,
            beta=config.betas[0],
            delta=config.delta,
            tau=config.tau,
            k_screen=int(config.screen * n_pruned),
            k_select=int(config.select * n_pruned),
            adaptive=config.step == "adam",
            weight_decay=config.weight_decay,
        )

    def _move_by_vectors(
        self,
        weight: MaskedWeight,
        parameter: nn.Parameter,
        state: ThetaState,
        lr: float,
        grad_factor: float,
    ) -> None:
        """The rule on the vectors of compact storage; the weight then shows theta."""
        assert parameter.grad is not None
        assert state.theta is not None
        theta = state.theta
        grad = _pruned_part(parameter.grad.detach(), weight).to(theta.dtype) * grad_factor
        vectors = {
            name: state.buffers.setdefault(name, torch.zeros_like(theta))
            for name in state_names(self.config)
        }
        if state.chosen is not None:
            vectors["chosen"] = _pruned_part(unpack_mask(state.chosen, weight.shape), weight)
        RULES[self.config.rule](theta, grad, vectors, state.step, lr, self.config)
        scatter_by_rank_(parameter, theta, weight.bits, False)

    def _is_due(self, state: ThetaState) -> bool:
        """Whether the subset is to be chosen before this step."""
        config = self.config
        if config.rule != "subset":
            return False
        if state.chosen is None:
            return True
        return config.refresh > 0 and (state.step - 1) % config.refresh == 0

    def _choose(self, weight: MaskedWeight, grad: Tensor, state: ThetaState) -> None:
        vector = _pruned_part(grad, weight)
        chosen = choose_subset(vector, self.config, weight.controller.generator)
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=grad.device)
        state.chosen = pack_mask(mask.masked_scatter_(~weight.mask, chosen))

    def _lr(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
        if self.config.lr is not None:
            return self.config.lr
        if "lr" not in group:
            raise ArgumentError(
                f"lr: expected a number, because {type(optimizer).__name__} has no 'lr' in its "
                "parameter groups to follow; got None"
            )
        return float(group["lr"])

    # -- the means of theta's rule -------------------------------------------------------------
    def _means(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        state: ThetaState,
        step: Step,
        of_theta: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """First and second mean of one side, of the weight's shape; None where it has none."""
        names: tuple[str, ...] = ()
        if step.kind == "adam":
            names = EMAS
        elif step.kind == "sgd" and step.beta1:
            names = ("momentum_buffer",)
        if of_theta:
            found = [self._mean(optimizer, parameter, state, name) for name in names]
        else:
            found = [optimizer.state[parameter][name] for name in names]
        return (*found, None, None)[0], (*found, None, None)[1]

    def _mean(
        self,
        optimizer: torch.optim.Optimizer,
        parameter: nn.Parameter,
        state: ThetaState,
        name: str,
    ) -> Tensor:
        """The tensor ``name`` of the optimizer's state; one beside it where there is none.

        The one beside is at least float32: in float16 an Adam denominator of 1e-8 is 0, and
        0 / 0 is NaN.
        """
        beside = state.buffers.get(name)
        slot = theta_slot(optimizer, parameter, name)
        if slot is None:
            if beside is None:
                beside = torch.zeros_like(parameter, dtype=_wide(parameter))
            state.buffers[name] = beside
            return beside
        if beside is not None:  # the optimizer has made its state since
            slot.add_(state.buffers.pop(name))  # the one is 0 where the other is not
        return slot

    # -- around optimizer.step() ---------------------------------------------------------------
    def observe(
        self, optimizer: torch.optim.Optimizer, weight: MaskedWeight, parameter: nn.Parameter
    ) -> None:
        """Remember the gradient that ``optimizer`` steps ``parameter`` with, if the score asks."""
        if self.gradients is None or parameter.grad is None or skipped_by_scaler(optimizer):
            return
        self.gradients.observe(weight.name, parameter.grad)

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
        own_rule = self.has_own_rule
        has_theta = weight.nnz < weight.numel
        if own_rule and has_theta and not skipped_by_scaler(optimizer):
            self.move(optimizer, group, weight, parameter, grad_factor=factor_of(optimizer, group))
        if not config.freeze_active and not (own_rule and has_theta):
            return  # all of it is the optimizer's
        hidden = self._hidden[weight.name] = _Hidden(optimizer, weight, parameter)
        if not config.freeze_active:
            hidden.set_theta_aside(state_names(config))
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
            "states": {
                name: {
                    "step": state.step,
                    "buffers": {key: value.clone() for key, value in state.buffers.items()},
                    "theta": None if state.theta is None else state.theta.clone(),
                    "chosen": None if state.chosen is None else state.chosen.clone(),
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
        if phase.gradients is not None:
            phase.gradients = LastGradients.from_state_dict(data.get("gradients", {}))
        for name, entry in data["states"].items():
            buffers = {key: value.clone() for key, value in entry["buffers"].items()}
            vectors = [entry.get(key) for key in ("theta", "chosen")]
            theta, chosen = (None if vector is None else vector.clone() for vector in vectors)
            phase.states[name] = ThetaState(int(entry["step"]), buffers, theta, chosen)
        return phase


def theta_slot(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Tensor | None:
    """The optimizer's own state tensor ``name``, if theta's mean can live in its pruned places."""
    for key, value in same_shaped_state(optimizer, parameter):
        if key == name and value.dtype != torch.float16 and value.device == parameter.device:
            return value
    return None


def factor_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """What the optimizer multiplies the gradient by: -1 to maximise, 1 / scale if it unscales."""
    scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler, if step() unscales
    factor = 1.0 if scale is None else 1.0 / float(scale)
    return -factor if group.get("maximize", False) else factor


def skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimizer under GradScaler skips the step itself if a gradient overflowed."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _pruned_part(x: Tensor, weight: MaskedWeight) -> Tensor:
    part: Tensor = gather_by_rank(x, weight.bits, False, weight.numel - weight.nnz)
    return part


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
        self._aside: list[tuple[str | None, Tensor]] = []
        self._active: Tensor | None = None
        self._active_state: dict[str, Tensor] = {}

    def hide_gradient(self) -> None:
        """Without a gradient every optimizer leaves the weight alone, weight decay included."""
        self._stand_in = self._parameter.grad = None

    def set_theta_aside(self, names: tuple[str, ...]) -> None:
        """With 0 in the pruned places the optimizer's momentum and decay cannot reach theta.

        Args:
            names: of the state tensors in whose pruned places theta's means live.
        """
        bits, parameter = self._weight.bits, self._parameter
        with torch.no_grad():
            slots = {name: theta_slot(self._optimizer, parameter, name) for name in names}
            for name, tensor in [(None, parameter.detach()), *slots.items()]:
                if tensor is not None:
                    self._aside.append((name, _pruned_part(tensor, self._weight)))
                    zero_where_(tensor, bits, True)
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
            if self._aside:
                zero_state(self._optimizer, parameter, bits, keep=True)
            for name, values in self._aside:
                place = theta_slot(self._optimizer, parameter, name) if name else parameter
                if place is not None:
                    scatter_by_rank_(place, values, bits, False)
            if self._active is not None:
                mask = self._weight.mask
                parameter.copy_(torch.where(mask, self._active, parameter))
                for key, value in same_shaped_state(self._optimizer, parameter):
                    if key in self._active_state:
                        value.copy_(torch.where(mask, self._active_state[key], value))
                    else:  # made in this step: untouched means zero
                        zero_where_(value, bits.to(value.device), False)

"""The rules that move theta: plain functions on vectors, one entry a pruned place.

    sgd        theta <- theta - lr (g + wd theta)
    momentum   b <- mu b + g;  theta <- theta - lr (b + wd theta)
    adam       m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
               theta <- theta - lr ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd theta)
    selective  m <- b m + (1 - b) g;  v <- b v + (1 - b) |g|;  C = |m| / (v + delta)
               P_mag    = the k_screen largest |g|          P_con = {C > tau}
               P_select = the k_select largest |g| in both
               theta <- theta - lr (C u + wd theta) on P_select
    subset     theta <- theta - lr (u + wd theta) on a subset of the share alpha: drawn at random
               when the phase begins, or the largest |g| of its first step; drawn again every
               ``refresh`` steps

``u`` is the raw gradient (``step="raw"``, as published) or an adaptive step (``step="adam"``):
Adam's own for ``subset``; for ``selective`` m / (v + delta), Adam's with the mean of |g| in place
of the root of the mean of g^2, whose corrections for the start from zero cancel.

These functions are the meaning of every rule; the kernels are tested against them.

Sources: RESU (huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md; ``selective`` is its consistency rule,
``subset`` the static subset of its method note); Kingma and Ba 2015,
https://arxiv.org/abs/1412.6980; decoupled weight decay: Loshchilov and Hutter 2019,
https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from resu_compile.config import ResurrectionConfig
from resu_compile.kernels.selective_step import selective_step_reference
from resu_compile.sparsity import topk_mask

Rule = Callable[[Tensor, Tensor, Mapping[str, Tensor], int, float, ResurrectionConfig], None]

# names of the state tensors that a rule keeps, as torch's optimizers name theirs: where the user's
# optimizer has a state of that name, theta's part lives in its pruned places
EMAS = ("exp_avg", "exp_avg_sq")


def state_names(config: ResurrectionConfig) -> tuple[str, ...]:
    """The state tensors that the rule of ``config`` keeps, one number a pruned place each."""
    if config.rule in ("adam", "selective"):
        return EMAS
    if config.rule == "momentum":
        return ("momentum_buffer",)
    if config.rule == "subset" and config.step == "adam":
        return EMAS
    return ()


def sgd_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],  # noqa: ARG001
    step: int,  # noqa: ARG001
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One step of plain gradient descent."""
    _decay(theta, lr, config)
    theta.add_(grad, alpha=-lr)


def momentum_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,  # noqa: ARG001
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One step of gradient descent with momentum."""
    _decay(theta, lr, config)
    theta.add_(state["momentum_buffer"].mul_(config.momentum).add_(grad), alpha=-lr)


def adam_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One Adam step with decoupled weight decay; ``step`` counts from 1."""
    _decay(theta, lr, config)
    theta.sub_(_adam_direction(grad, state, step, config), alpha=lr)


def selective_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,  # noqa: ARG001
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One step of the entries whose gradient is large and keeps its sign."""
    count = theta.numel()
    selective_step_reference(
        theta,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        lr=lr,
        beta=config.betas[0],
        delta=config.delta,
        tau=config.tau,
        k_screen=int(config.screen * count),
        k_select=int(config.select * count),
        adaptive=config.step == "adam",
        weight_decay=config.weight_decay,
    )


def subset_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One step of the chosen subset, ``state["chosen"]`` (bool, one entry a pruned place)."""
    direction = grad
    if config.step == "adam":
        direction = _adam_direction(grad, state, step, config)
    moved = theta * (1.0 - lr * config.weight_decay) - lr * direction
    theta.copy_(torch.where(state["chosen"], moved, theta))


RULES: dict[str, Rule] = {
    "sgd": sgd_rule,
    "momentum": momentum_rule,
    "adam": adam_rule,
    "selective": selective_rule,
    "subset": subset_rule,
}


def choose_subset(grad: Tensor, config: ResurrectionConfig, generator: torch.Generator) -> Tensor:
    """The subset that moves: int(alpha p) of the p pruned places, ties to the lower place.

    Args:
        grad: gradient at the pruned places, shape ``[p]``.
        config: ``alpha`` and ``subset_by`` are used.
        generator: CPU generator of the random subset, the same on every device.

    Returns:
        bool, shape ``[p]``, on the device of ``grad``.
    """
    if config.subset_by == "random":
        score = torch.rand(grad.shape, generator=generator).to(grad.device)
    else:
        score = grad.abs()
    return topk_mask(score, int(config.alpha * grad.numel()))


def _decay(theta: Tensor, lr: float, config: ResurrectionConfig) -> None:
    if config.weight_decay:
        theta.mul_(1.0 - lr * config.weight_decay)


def _adam_direction(
    grad: Tensor, state: Mapping[str, Tensor], step: int, config: ResurrectionConfig
) -> Tensor:
    beta1, beta2 = config.betas
    mean = state["exp_avg"].lerp_(grad, 1.0 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    root = (square / (1.0 - beta2**step)).sqrt_().add_(config.adam_eps)
    return (mean / (1.0 - beta1**step)).div_(root)

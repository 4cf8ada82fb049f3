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
from typing import Any

import torch
from torch import Tensor

from resu_compile.config import ResurrectionConfig
from resu_compile.kernels.fused_update import Step, step_reference
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


def elementwise_step(config: ResurrectionConfig, count: int, lr: float) -> Step:
    """One step of a rule that moves each entry on its own, as the fused kernel takes it.

    Args:
        config: of any rule but ``"selective"`` and ``"optimizer"``.
        count: steps taken, this one included.
        lr: learning rate.
    """
    if state_names(config) == EMAS:
        beta1, beta2 = config.betas
        corrections = (1.0 - beta1**count, 1.0 - beta2**count)
        return Step("adam", lr, config.weight_decay, beta1, beta2, config.adam_eps, *corrections)
    momentum = config.momentum if config.rule == "momentum" else 0.0
    return Step("sgd", lr, config.weight_decay, momentum)


def elementwise_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One step of every entry, or of the subset ``state["chosen"]`` (bool); ``step`` is from 1."""
    chosen = state.get("chosen")
    before = None if chosen is None else theta.clone()
    first, second, *_ = (*(state[name] for name in state_names(config)), None, None)
    step_reference(theta, grad, first, second, elementwise_step(config, step, lr), coupled=False)
    if chosen is not None and before is not None:
        theta.copy_(torch.where(chosen, theta, before))


def selective_options(config: ResurrectionConfig, n_pruned: int, lr: float) -> dict[str, Any]:
    """The settings of the selective step, for reference and op alike."""
    return {
        "lr": lr,
        "beta": config.betas[0],
        "delta": config.delta,
        "tau": config.tau,
        "k_screen": int(config.screen * n_pruned),
        "k_select": int(config.select * n_pruned),
        "adaptive": config.step == "adam",
        "weight_decay": config.weight_decay,
    }


def selective_rule(
    theta: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,  # noqa: ARG001
    lr: float,
    config: ResurrectionConfig,
) -> None:
    """One step of the entries whose gradient is large and keeps its sign."""
    options = selective_options(config, theta.numel(), lr)
    selective_step_reference(theta, grad, state["exp_avg"], state["exp_avg_sq"], **options)


RULES: dict[str, Rule] = {
    "sgd": elementwise_rule,
    "momentum": elementwise_rule,
    "adam": elementwise_rule,
    "selective": selective_rule,
    "subset": elementwise_rule,
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

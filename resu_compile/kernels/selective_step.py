"""One step of RESU's selective rule on the pruned places P of a weight, in place.

    m <- b m + (1 - b) g        v <- b v + (1 - b) |g|        C = |m| / (v + delta)
    P_mag    = top k_screen of P by |g|
    P_con    = {C > tau}
    P_select = top k_select of P_mag & P_con by |g|, all of them if fewer
    theta   <- theta - lr (C g + decay theta)                  on P_select   (raw)
    theta   <- theta - lr (C m / (v + delta) + decay theta)    on P_select   (adaptive)

Ties by |g| fall to the lower row-major index. m and v decay alike from zero, so that the bias
corrections of the adaptive step cancel.

Source: https://github.com/huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.sparsity import topk_mask


# -- reference -------------------------------------------------------------------------------
def selective_step_reference(
    theta: Tensor,
    grad: Tensor,
    ema: Tensor,
    ema_abs: Tensor,
    *,
    lr: float,
    beta: float,
    delta: float,
    tau: float,
    k_screen: int,
    k_select: int,
    adaptive: bool,
    weight_decay: float = 0.0,
) -> None:
    """Plain meaning of the step, on vectors gathered at P; changes theta and both averages.

    Args:
        theta: ``[p]``, floating point.
        grad: ``[p]``, gradient at P.
        ema: ``[p]``, average of the gradient (m); its dtype is the dtype of the arithmetic.
        ema_abs: ``[p]``, average of the absolute gradient (v), dtype of ``ema``.
        lr: step size.
        beta: decay of both averages, in [0, 1).
        delta: added to v before the division, > 0.
        tau: least consistency C, in [0, 1].
        k_screen: number of places in P_mag; p and above take all.
        k_select: number of places that move at most.
        adaptive: step along ``C m / (v + delta)`` instead of ``C g``.
        weight_decay: decay of the places that move.
    """
    grad = grad.to(ema.dtype)
    ema.mul_(beta).add_(grad, alpha=1.0 - beta)
    magnitude = grad.abs()
    ema_abs.mul_(beta).add_(magnitude, alpha=1.0 - beta)
    direction = ema / (ema_abs + delta)
    consistency = direction.abs()
    screened = topk_mask(magnitude, min(k_screen, magnitude.numel()))
    eligible = screened & (consistency > tau)
    ranked = magnitude.masked_fill(~eligible, -1.0)  # below every magnitude
    selected = eligible & topk_mask(ranked, min(k_select, magnitude.numel()))
    value = theta.to(ema.dtype)
    update = consistency * (direction if adaptive else grad)
    if weight_decay:
        update.add_(value, alpha=weight_decay)
    theta.copy_(torch.where(selected, value.add(update, alpha=-lr), value))

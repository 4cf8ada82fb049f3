"""SGD for masked weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from resu_compile.kernels.fused_update import Step
from resu_compile.runtime.masked_optimizer import MaskedOptimizer


class SGD(MaskedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD``, with masks, theta's rule and frozen weights in the same pass.

    Takes the arguments of ``torch.optim.SGD``.
    """

    def _can_take_over(self, group: dict[str, Any]) -> bool:
        return not group["differentiable"]

    def _active_step(self, group: dict[str, Any], parameter: nn.Parameter) -> Step:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        state = self.state[parameter]
        first_time = momentum != 0.0 and state.get("momentum_buffer") is None
        if first_time:  # torch starts the buffer with the gradient, undamped
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return Step(
            "sgd",
            float(group["lr"]),
            group["weight_decay"],
            momentum,
            1.0 if first_time else 1.0 - dampening,
            nesterov=group["nesterov"],
        )

"""AdamW for masked weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from resu_compile.errors import ArgumentError, check_choice
from resu_compile.kernels.fused_update import Step
from resu_compile.runtime.masked_optimizer import MaskedOptimizer
from resu_compile.runtime.rules import EMAS


class AdamW(MaskedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW``, with masks, theta's rule and frozen weights in the same pass.

    Args:
        params: as in ``torch.optim.AdamW``, like all further arguments but ``state``.
        lr: learning rate.
        betas: decay rates of the means.
        eps: term added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: of torch's; theta's step is then not fused.
        state: ``"full"`` keeps moments for every place, as torch does, so that theta's have room;
            ``"active"`` keeps those of masked weights for the active places only while the phase
            is sparse (4 (1 - s) of 4 bytes each, in vectors), packs them again at every change of
            the mask and unpacks them for the other phases. Its ``state_dict()`` then holds the
            vectors; it loads, under either ``state``, only beside the same masks.
        **options: ``maximize``, ``foreach``, ``capturable``, ``differentiable``, ``fused``.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        state: Literal["full", "active"] = "full",
        **options: Any,
    ) -> None:
        check_choice(state, ("full", "active"), name="state")
        options = {**options, "amsgrad": amsgrad}
        unfused = [name for name in UNFUSED if options.get(name)]
        if state == "active" and unfused:
            raise ArgumentError(
                f"state: expected 'full' with {unfused[0]}=True, got 'active', which knows only "
                "the plain step"
            )
        super().__init__(params, lr, betas, eps, weight_decay, **options)
        self.packs_state = state == "active"

    def _can_take_over(self, group: dict[str, Any]) -> bool:
        return not any(group.get(name) for name in UNFUSED)

    def _active_step(self, group: dict[str, Any], parameter: nn.Parameter) -> Step:
        state = self.state[parameter]
        if "step" not in state:
            fused = bool(group["fused"])
            state["step"] = torch.zeros(
                (), dtype=torch.float32, device=parameter.device if fused else "cpu"
            )
        for name in EMAS:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        count = self._count_step(parameter)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return Step(
            "adam",
            float(group["lr"]),
            group["weight_decay"],
            beta1,
            beta2,
            group["eps"],
            1.0 - beta1**count,
            1.0 - beta2**count,
        )


UNFUSED = ("amsgrad", "capturable", "differentiable")

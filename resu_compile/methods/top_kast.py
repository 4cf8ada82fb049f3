"""Top-KAST: forward with the largest weights, backward into a larger set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resu_compile.errors import check_number
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask
from resu_compile.methods.kept_values import KeptValues
from resu_compile.methods.registry import register_method
from resu_compile.methods.training_method import check_when, steps_of
from resu_compile.sparsity import topk_mask

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run


@register_method("top_kast")
@dataclass(frozen=True)
class TopKAST(KeptValues):
    """Always sparse: A in the forward pass, the superset B is trained, the rest stays.

        A    the D n largest |w| of a weight with n entries       forward
        B    the (1 + extra) D n largest                          gradient, optimizer
        loss + penalty/2 (|w_A|^2 + |w_(B without A)|^2 / D)

    Outside of B nothing moves: values stay and optimizer state is 0. B without A keeps its values
    while the forward pass sees zeros there. A and B are chosen anew every ``every`` steps.

    Source: Jayakumar et al. 2020, https://arxiv.org/abs/2106.03517

    Attributes:
        extra: size of B without A relative to A, >= 0; 1 is 80 % sparse backward to 90 % forward.
        penalty: of the squared weights, >= 0; a decay of the optimizer's own comes on top.
        every: steps between two choices: an int, or a float, the share of all steps.
    """

    extra: float = 1.0
    penalty: float = 1e-4
    every: int | float = 100

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_number(self.extra, name="extra", minimum=0.0)
        check_number(self.penalty, name="penalty", minimum=0.0)
        check_when(self.every, name="every", minimum=1)

    def begin(self, run: Run) -> None:
        """A and B by magnitude at initialisation."""
        super().begin(run)
        self._choose_backward(run)

    def _choose_backward(self, run: Run) -> None:
        chosen, shares = {}, {}
        for places in run.places():
            active, total = int(places.mask.sum()), places.mask.numel()
            count = min(int((1.0 + self.extra) * active), total)
            wider = topk_mask(places.weight.abs(), count, places.mask)
            chosen[places.name], shares[places.name] = pack_mask(wider), count / total
        run.memory["backward"], run.memory["gradient_shares"] = chosen, shares

    def _backward(self, run: Run) -> dict[str, Tensor]:
        bits, weights = run.memory["backward"], run.controller.weights
        return {
            name: unpack_mask(bits[name].to(weight.bits.device), weight.shape)
            for name, weight in weights.items()
        }

    def before_step(self, run: Run) -> bool:
        """Gradient and penalty in B; the optimizer then sees the full weights."""
        assert run.master is not None
        backward = self._backward(run)
        for places in run.places():
            active = max(run.controller.weights[places.name].nnz, 1)
            factor = torch.where(places.mask, 1.0, places.mask.numel() / active)
            assert places.gradient is not None
            penalty = self.penalty * factor * places.weight
            grad = torch.where(backward[places.name], places.gradient + penalty, 0.0)
            run.set_gradient(places.name, grad)
        run.master.lend(backward)
        return False

    def after_step(self, run: Run) -> None:
        """Keep what moved in B, and choose A and B if it is time."""
        assert run.master is not None
        run.master.take_back()
        if run.step % max(steps_of(self.every, run.steps), 1) == 0 and not run.done:
            run.hide(run.chosen_masks().items(), "top_kast")
            self._choose_backward(run)
        else:
            run.master.hide()
        run.master.zero_state(self._backward(run))

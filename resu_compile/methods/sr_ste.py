"""SR-STE: all weights train, the forward pass sees the best N of each M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from resu_compile.errors import check_number
from resu_compile.methods.kept_values import KeptValues
from resu_compile.methods.registry import register_method

if TYPE_CHECKING:
    from resu_compile.training.method_run import Run

REPORT_EVERY = 100  # steps: masks change every step


@register_method("sr_ste")
@dataclass(frozen=True)
class SRSTE(KeptValues):
    """Sparse-refined straight-through estimator, for N:M patterns and for any other mask.

        forward   M * w,  M the top N of each M by |w|, chosen anew each step
        gradient  g(M * w) + decay (1 - M) w, to all places

    ``pattern`` of the config says which N:M; without one, M are the largest |w| at ``sparsity``.
    Pruned weights keep their values and their optimizer state until the run ends.

    Source: Zhou et al. 2021, https://arxiv.org/abs/2102.04010; aojunzz/NM-sparsity

    Attributes:
        decay: of the weights that the forward pass does not see, >= 0; 0 is the plain STE.
    """

    keeps_pattern: ClassVar[bool] = True
    decay: float = 2e-4

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_number(self.decay, name="decay", minimum=0.0)

    def before_step(self, run: Run) -> bool:
        """Add the decay; the optimizer then sees the full weights."""
        assert run.master is not None
        for places in run.places():
            assert places.gradient is not None
            decay = torch.where(places.mask, 0.0, self.decay * places.weight)
            run.set_gradient(places.name, places.gradient + decay)
        run.master.lend()
        return False

    def after_step(self, run: Run) -> None:
        """Take what the optimizer made of the weights, and choose the mask anew."""
        assert run.master is not None
        run.master.take_back()
        masks = run.chosen_masks()
        if run.step % REPORT_EVERY == 0 or run.done:
            run.hide(masks.items(), "sr_ste")
        else:
            run.master.hide(masks)

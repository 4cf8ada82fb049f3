"""Saliency: how much a weight holds, and how much the loss reacts to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resu_compile.errors import check_number
from resu_compile.methods.registry import register_method


@register_method("saliency")
@dataclass(frozen=True)
class Saliency:
    """Score a weight by ``|w| (E[g^2])^(power / 2)``, with the gradients of its own training.

    ``power=1`` orders weights as Optimal Brain Damage does, whose ``w^2 H / 2`` is what the loss
    rises by if the weight goes, with the empirical Fisher information ``E[g^2]`` for the curvature
    H. ``power=0`` is the magnitude. The mean of squares is a noisy measure of the curvature, and
    its root, half way between the two, kept the best weights where it was tried (docs/training.md).

    The controller has to see the gradients: ``controller(model).track_gradients()`` before
    training, which ``TrainingConfig`` does for this method by itself.

    Source: LeCun et al. 1990, Optimal Brain Damage, eq. 5; the power is this project's own.

    Attributes:
        power: in [0, 1].
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        """Check the power."""
        check_number(self.power, name="power", minimum=0.0, maximum=1.0)

    def score_with(self, weight: Tensor, mean_square: Tensor) -> Tensor:
        """``|w| (E[g^2])^(power / 2)``, float32 or wider, shape of ``weight``.

        Args:
            weight: floating point, any shape.
            mean_square: ``E[g^2]``, the same shape, >= 0.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.detach().abs().to(wide) * mean_square.to(wide) ** (0.5 * self.power)

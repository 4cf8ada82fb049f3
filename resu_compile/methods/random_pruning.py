"""Random pruning: every entry is equally likely to go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resu_compile.methods.registry import register_method


@register_method("random")
@dataclass(frozen=True)
class RandomPruning:
    """Score a weight by a uniform random number drawn on the CPU.

    The draw does not depend on the weight's device, so the mask is the same everywhere.

    Source: Liu et al. 2022, https://arxiv.org/abs/2202.02643
    """

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in [0, 1), float32, shape of ``weight``."""
        return torch.rand(weight.shape, generator=generator).to(weight.device)

"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resu_compile.methods.registry import register_method


@register_method("magnitude")
@dataclass(frozen=True)
class Magnitude:
    """Score a weight by its magnitude |w|.

    Source: Han et al. 2015, https://arxiv.org/abs/1506.02626
    """

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """|w|, shape and dtype of ``weight``."""
        return weight.detach().abs()

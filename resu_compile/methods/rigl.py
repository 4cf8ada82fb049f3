"""RigL: the smallest weights give way to those with the largest gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from resu_compile.methods.criteria import Criterion
from resu_compile.methods.drop_and_grow import DropAndGrow
from resu_compile.methods.registry import register_method


@register_method("rigl")
@dataclass(frozen=True)
class RigL(DropAndGrow):
    """The rigged lottery: drop by |w|, grow by the dense gradient, in place of the step.

        n = int(f n_active) in each weight,  f = alpha/2 (1 + cos(pi min(t, T) / T))

    alpha = 0.3, every 100 steps, T at 0.75 of training, ERK. Dense gradients are computed on the
    steps of updates only. The source leaves the first layer dense under uniform distribution; here
    ``exclude`` or ``overrides`` of the config say so.

    Source: Evci et al. 2020, https://arxiv.org/abs/1911.11134; google-research/rigl,
    rigl/sparse_optimizers_base.py
    """

    keeps_pattern: ClassVar[bool] = True
    distribution: ClassVar[Literal["uniform", "er", "erk"]] = "erk"
    grow: str | Criterion = "gradient"
    replaces_step: bool = True
    label: ClassVar[str] = "rigl"

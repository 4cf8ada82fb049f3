"""SET: the smallest weights give way to random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from resu_compile.methods.drop_and_grow import DropAndGrow
from resu_compile.methods.registry import register_method


@register_method("set")
@dataclass(frozen=True)
class SET(DropAndGrow):
    """Sparse evolutionary training: drop by |w|, grow at random, after the step.

        n = int(0.3 n_active) in each weight, every 100 steps; value and state of new places are 0

    The source updates at the end of each epoch but the last; here every ``every`` steps up to
    ``stop``, like the other methods, so that what grew last is trained.

    Source: Mocanu et al. 2018, https://arxiv.org/abs/1707.04780 (zeta = 0.3, Erdos-Renyi);
    google-research/rigl, rigl/sparse_optimizers_base.py
    """

    keeps_pattern: ClassVar[bool] = True
    distribution: ClassVar[Literal["uniform", "er", "erk"]] = "er"
    decay: Literal["constant", "cosine", "linear"] = "constant"
    label: ClassVar[str] = "set"

"""Optimizers that know masks: torch's own, with theta's step fused into theirs."""

from resu_compile.optim.adamw import AdamW
from resu_compile.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]

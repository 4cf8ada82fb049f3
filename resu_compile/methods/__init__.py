"""Pruning methods: one paper, one file, one registry."""

from resu_compile.methods.dsnot import DSnoT
from resu_compile.methods.magnitude import Magnitude
from resu_compile.methods.random_pruning import RandomPruning
from resu_compile.methods.registry import (
    AnyMethod,
    CalibratedMethod,
    Method,
    get_method,
    is_calibrated,
    method_names,
    register_method,
)
from resu_compile.methods.wanda import Wanda
from resu_compile.methods.wanda_plus import WandaPlus

__all__ = [
    "AnyMethod",
    "CalibratedMethod",
    "DSnoT",
    "Magnitude",
    "Method",
    "RandomPruning",
    "Wanda",
    "WandaPlus",
    "get_method",
    "is_calibrated",
    "method_names",
    "register_method",
]

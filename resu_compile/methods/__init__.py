"""Pruning methods: one paper, one file, one registry."""

from resu_compile.methods.magnitude import Magnitude
from resu_compile.methods.random_pruning import RandomPruning
from resu_compile.methods.registry import Method, get_method, method_names, register_method

__all__ = [
    "Magnitude",
    "Method",
    "RandomPruning",
    "get_method",
    "method_names",
    "register_method",
]

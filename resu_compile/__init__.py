"""Sparse weights for any PyTorch model: dense, sparse and resurrecting from one capture."""

from resu_compile import optim
from resu_compile.explanation import explain
from resu_compile.export import export, load
from resu_compile.phase import Phase
from resu_compile.pruning import sparsify
from resu_compile.reporting import report
from resu_compile.runtime.controller import controller

__version__ = "0.1.0"

__all__ = ["Phase", "controller", "explain", "export", "load", "optim", "report", "sparsify"]

"""Pruning and training methods: one paper, one file, one registry."""

from resu_compile.methods.acdc import ACDC
from resu_compile.methods.dsnot import DSnoT
from resu_compile.methods.gmp import GMP
from resu_compile.methods.lottery import Lottery
from resu_compile.methods.magnitude import Magnitude
from resu_compile.methods.mest import MEST
from resu_compile.methods.one_shot import OneShot
from resu_compile.methods.random_pruning import RandomPruning
from resu_compile.methods.registry import (
    AnyMethod,
    CalibratedMethod,
    GradientMethod,
    Method,
    get_method,
    get_training_method,
    is_calibrated,
    is_gradient_method,
    is_training_method,
    method_names,
    register_method,
    training_method_names,
)
from resu_compile.methods.resu import Resu
from resu_compile.methods.rigl import RigL
from resu_compile.methods.saliency import Saliency
from resu_compile.methods.set import SET
from resu_compile.methods.snfs import SNFS
from resu_compile.methods.snip import SNIP
from resu_compile.methods.soft_shrinkage import SoftShrinkage
from resu_compile.methods.sr_ste import SRSTE
from resu_compile.methods.static import Static
from resu_compile.methods.top_kast import TopKAST
from resu_compile.methods.training_method import TrainingMethod
from resu_compile.methods.wanda import Wanda
from resu_compile.methods.wanda_plus import WandaPlus

__all__ = [
    "ACDC",
    "AnyMethod",
    "CalibratedMethod",
    "DSnoT",
    "GMP",
    "GradientMethod",
    "Lottery",
    "MEST",
    "Magnitude",
    "Method",
    "OneShot",
    "RandomPruning",
    "Resu",
    "RigL",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "Saliency",
    "SoftShrinkage",
    "Static",
    "TopKAST",
    "TrainingMethod",
    "Wanda",
    "WandaPlus",
    "get_method",
    "get_training_method",
    "is_calibrated",
    "is_gradient_method",
    "is_training_method",
    "method_names",
    "register_method",
    "training_method_names",
]

"""Fixtures of all tests, and Triton's interpreter where there is no GPU.

The environment variable has to be set before the first ``triton.jit`` runs, hence here.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch

CUDA = torch.cuda.is_available()

if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def _repair_interpreter() -> None:
    """Let Triton 3.6's interpreter take a loop bound from a tensor under NumPy >= 2.4.

    It calls ``int()`` on an array of shape (1,), which NumPy 2.4 refuses; fixed in Triton 3.7:
    https://github.com/triton-lang/triton/issues/9171
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_repair


if not CUDA:
    # no Triton: its tests skip; another Triton: it has the repair
    with contextlib.suppress(ImportError, AttributeError):
        _repair_interpreter()


def _register_backend() -> None:
    """Make ``backend="resu"`` known where the package runs from a checkout, not installed."""
    from torch._dynamo import list_backends, register_backend

    from resu_compile.backend import resu

    if "resu" not in list_backends():
        register_backend(resu, name="resu")


_register_backend()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if CUDA else "cpu")

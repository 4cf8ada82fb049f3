"""The run-time compiler: what it does where it cannot compile."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

from resu_compile.errors import KernelUnavailableError
from resu_compile.kernels import _nvrtc
from resu_compile.kernels._nvrtc import FOLDER, _checked, load_module

KEY = (("radix_select.cu",), (("MODULE", 0), ("KEY_KIND", 0), ("BLOCKS_PER_SM", 2)), 512, 0)


@pytest.fixture
def capability(monkeypatch):
    """A device of this compute capability, whatever is there."""

    def pretend(value):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: value)

    return pretend


def test_sources_are_beside_the_kernels():
    assert {path.name for path in FOLDER.glob("*.cu")} >= {"radix_select.cu", "selective_step.cu"}


def test_an_old_device_takes_triton(capability, monkeypatch):
    capability((7, 5))
    monkeypatch.setattr(_nvrtc, "_compile", lambda *_: pytest.fail("has to be refused before"))
    assert load_module.__wrapped__(*KEY) is None


def test_missing_bindings_are_said_once_and_take_triton(capability, monkeypatch, caplog):
    capability((9, 0))

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with caplog.at_level(logging.WARNING):
        assert load_module.__wrapped__(*KEY) is None
    assert "radix_select.cu: not compiled, Triton runs instead: No module" in caplog.text


def test_a_failed_call_raises():
    assert _checked((0, "value")) == "value"
    assert _checked((0,)) is None
    with pytest.raises(KernelUnavailableError, match="expected status 0, got 201"):
        _checked((201,))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_compiles_once_for_a_device():
    first = load_module(*KEY)
    assert first is not None
    assert load_module(*KEY) is first

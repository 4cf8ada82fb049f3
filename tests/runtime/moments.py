"""A layer whose mean squares of gradients are tracked, and the same by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.runtime.gradient_moments import DECAY

CPU = torch.device("cpu")


def make(sparsity=0.0, dtype=None, seed=0, decay=DECAY):
    torch.manual_seed(seed)
    model = nn.Linear(6, 4)
    if dtype is not None:
        model.to(dtype)
    resu.sparsify(model, sparsity, compile=False)
    controller = resu.controller(model)
    controller.track_gradients(decay)
    return model, controller


def backward(model, seed, scale=1.0):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).to(model.weight.dtype)
    (model(x).square().sum() * scale).backward()


def found(controller, name="weight"):
    return controller.moments.mean_square(name, CPU)


class ByHand:
    """One float64 at a time."""

    def __init__(self, decay=DECAY):
        self.decay, self.squares = decay, None

    def observe(self, grad):
        values = grad.double().flatten().tolist()
        before = self.squares or [0.0] * len(values)
        self.squares = [
            self.decay * f + (1 - self.decay) * g * g for f, g in zip(before, values, strict=True)
        ]

    def check(self, controller, rel=1e-5):
        assert found(controller).dtype is torch.float32
        assert found(controller).flatten().tolist() == pytest.approx(self.squares, rel=rel)

"""Who came back: counted by hand on one weight."""

from __future__ import annotations

import torch
from torch import nn

import resu_compile as resu
from resu_compile.training.ever_pruned import EverPruned


def make():
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0))
    resu.sparsify(layer, sparsity=0.0, compile=False)
    return layer, resu.controller(layer)


def test_who_was_pruned_and_came_back():
    layer, control = make()
    ever = EverPruned()
    ever.record(control)
    assert ever.came_back(control) == 0.0
    control.prune(0.5)  # 5, 6, 7 and 8 stay
    ever.record(control)
    assert ever.came_back(control) == 0.0
    with control.resurrect(budget=0.5), torch.no_grad():
        layer.weight[0, :2] = torch.tensor([20.0, 10.0])
    ever.record(control)
    assert control.masks["weight"].tolist() == [[True, True, *[False] * 4, True, True]]
    assert ever.came_back(control) == 2 / 4  # 5 and 6 made room


def test_one_that_came_back_and_went_again_does_not_count():
    layer, control = make()
    ever = EverPruned()
    control.prune(0.5)
    ever.record(control)
    with control.resurrect(budget=0.25), torch.no_grad():
        layer.weight[0, 0] = 6.5
    ever.record(control)
    assert ever.came_back(control) == 1 / 4
    control.prune(0.75)  # 7 and 8 are larger
    ever.record(control)
    assert ever.came_back(control) == 0.0


def test_nothing_recorded_and_nothing_active():
    _, control = make()
    assert EverPruned().came_back(control) == 0.0

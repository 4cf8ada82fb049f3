"""Theta in a few places: those with the largest |g| of the first step; the others stay 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.phase import Phase
from tests.integration.test_invariants import loss_of
from tests.runtime.places import begin, by_sorting, check, chosen_of, dense_gradients, sparse, step


# -- the choice --------------------------------------------------------------------------------
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("places", [0.0, 0.2, 0.31, 100.0])
def test_the_largest_gradients_of_the_first_step_are_chosen(places, freeze):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = begin(model, places=places, freeze_active=freeze)
    masks = controller.masks
    grads = dense_gradients(model, 0)
    assert controller.resurrection.is_choosing
    step(model, optimizer, 0)
    chosen = chosen_of(controller)
    assert not controller.resurrection.is_choosing
    for name, mask in masks.items():
        assert torch.equal(chosen[name], by_sorting(grads[name], mask, places)), name
        weight = controller.weights[name]
        assert int(chosen[name].sum()) == min(int(places * weight.nnz), weight.numel - weight.nnz)
        value = model.get_parameter(name).detach()
        assert torch.equal(value != 0, mask | (chosen[name] & (grads[name] != 0)))
    for seed in range(1, 4):  # they stay the chosen ones
        step(model, optimizer, seed)
    assert all(torch.equal(chosen[n], found) for n, found in chosen_of(controller).items())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sparsity=st.floats(0.0, 0.95),
    places=st.floats(0.0, 3.0),
    levels=st.integers(1, 4),
    freeze=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_and_ties_go_to_the_lower_index(
    rows, columns, sparsity, places, levels, freeze, seed
):
    torch.manual_seed(seed)
    model = resu.sparsify(nn.Linear(columns, rows, bias=False), sparsity, compile=False)
    controller = resu.controller(model)
    controller.resurrect(places=places, freeze_active=freeze, rule="optimizer").__enter__()
    mask = controller.masks["weight"]
    grad = torch.randint(-levels, levels + 1, (rows, columns)).float()  # many are the same
    model.weight.grad = grad.clone()
    before = model.weight.detach().clone()
    optim.SGD(model.parameters(), lr=1.0).step()
    chosen = by_sorting(grad, mask, places)
    assert torch.equal(chosen_of(controller)["weight"], chosen)
    moved = chosen if freeze else chosen | mask
    assert torch.equal(model.weight.detach(), torch.where(moved, before - grad, before))
    assert torch.equal(model.weight.grad, torch.where(moved, grad, torch.zeros_like(grad)))


def test_none_lets_all_of_them_hold_theta():
    model = sparse()
    controller = begin(model, places=None)
    grads = dense_gradients(model, 0)
    step(model, optim.SGD(model.parameters(), lr=0.05), 0)
    assert not controller.resurrection.is_choosing
    assert controller.resurrection.chosen == {}
    for name, mask in controller.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask | (grads[name] != 0))


def test_accumulated_and_clipped_gradients_choose():
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = begin(model)
    for part in range(3):
        loss_of(model, part).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    grads = {name: model.get_parameter(name).grad.clone() for name in controller.masks}
    optimizer.step()
    chosen = chosen_of(controller)
    for name, mask in controller.masks.items():
        assert torch.equal(chosen[name], by_sorting(grads[name], mask, 0.3))
    check(model, optimizer, chosen)
    optimizer.zero_grad()
    norms = []
    for part in range(3, 6):  # later norms are those of what trains
        loss_of(model, part).backward()
        check(model, optimizer, chosen)
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) == torch.stack(norms).norm()


def test_a_weight_without_a_gradient_chooses_later():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    resu.sparsify(model, 0.5, compile=False)
    controller = resu.controller(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    controller.resurrect(places=0.2).__enter__()
    model[0](torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert set(controller.resurrection.chosen) == {"0.weight"}
    assert (model[1].weight[~controller.masks["1.weight"]] == 0).all()
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert set(controller.resurrection.chosen) == {"0.weight", "1.weight"}
    assert int((model[1].weight[~controller.masks["1.weight"]] != 0).sum()) == 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", ["optimizer", "adam"])
def test_a_step_that_the_scaler_skips_chooses_nothing(fused, rule):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.05, fused=fused)
    controller = begin(model, rule=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, seed) * (math.inf if seed == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert controller.resurrection.is_choosing is (seed == 0)
    check(model, optimizer, chosen_of(controller))


# -- errors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("places", [-0.1, math.nan, "all", True])
def test_a_number_that_cannot_be(places):
    with pytest.raises((ArgumentError, TypeError), match="^places: expected"):
        ResurrectionConfig(places=places)


@pytest.mark.parametrize(
    "terms", [{"init": "normal"}, {"init": "uniform"}, {"rule": "selective"}, {"rule": "subset"}]
)
def test_what_chooses_or_fills_places_itself(terms):
    with pytest.raises(ArgumentError, match="^places: expected None unless theta starts from zero"):
        ResurrectionConfig(places=0.2, **terms)
    ResurrectionConfig(places=None, **terms)
    model = sparse()
    with pytest.raises(ArgumentError, match="^places: expected None unless"):
        resu.controller(model).resurrect(places=0.2, **terms)
    assert resu.controller(model).phase is Phase.SPARSE

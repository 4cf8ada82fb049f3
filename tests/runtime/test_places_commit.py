"""Theta in a few places: how its phase ends, and goes on elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.phase import Phase
from resu_compile.runtime.optimizer_state import same_shaped_state
from tests.integration.test_invariants import build
from tests.runtime.places import (
    RULES,
    begin,
    by_sorting,
    check,
    chosen_of,
    dense_gradients,
    sparse,
    step,
)


# -- the end of the phase ----------------------------------------------------------------------
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
@pytest.mark.parametrize("kind", ["quota", "ceiling"])
def test_only_the_chosen_can_come_back(kind, score):
    model = sparse(method="random")
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    controller = resu.controller(model)
    controller.track_gradients()
    controller = begin(model, kind=kind, budget=0.25, score=score)
    masks = controller.masks
    for seed in range(30):
        step(model, optimizer, seed)
    chosen = chosen_of(controller)
    report = controller.commit()
    for name, mask in controller.masks.items():
        back = mask & ~masks[name]
        assert not (back & ~chosen[name]).any()
        assert int(mask.sum()) == int(masks[name].sum())
        count = int(0.25 * int(mask.sum()))
        assert report.weights[name].resurrected == int(back.sum())
        assert int(back.sum()) == count if kind == "quota" else int(back.sum()) <= count
        parameter = model.get_parameter(name)
        assert (parameter[~mask] == 0).all()
        for value in dict(same_shaped_state(optimizer, parameter)).values():
            assert (value[~mask] == 0).all()
    assert report.resurrected > 0
    assert controller.resurrection is None
    step(model, optimizer, 30)
    for name, mask in controller.masks.items():  # the sparse phase goes by masks again
        assert (model.get_parameter(name).grad[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["quota", "ceiling"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_budget_beyond_the_places_is_not_filled_with_others(kind, pattern):
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    prune = {"sparsity": 0.5} if pattern is None else {"pattern": pattern}
    resu.sparsify(model, **prune, method="random", compile=False)
    controller = resu.controller(model)
    mask = controller.masks["weight"]
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    controller.resurrect(places=0.1, kind=kind, budget=0.9).__enter__()
    for seed in range(9):
        optimizer.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        (model(x) - 3.0).square().mean().backward()
        optimizer.step()
    chosen = chosen_of(controller)["weight"]
    assert int(chosen.sum()) == 6
    controller.commit()
    back = controller.masks["weight"] & ~mask
    assert back.any()
    assert not (back & ~chosen).any()
    assert int(controller.masks["weight"].sum()) == 64
    if kind == "quota" and pattern is None:
        assert torch.equal(back, chosen)


@pytest.mark.parametrize("kind", ["quota", "ceiling"])
def test_a_score_function_does_not_let_others_in(kind):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = begin(model, kind=kind, budget=0.25, score=lambda _, weight: -weight.abs())
    masks = controller.masks
    step(model, optimizer, 0)
    chosen = chosen_of(controller)
    report = controller.commit()
    assert report.resurrected > 0
    for name, mask in controller.masks.items():
        assert not (mask & ~masks[name] & ~chosen[name]).any()


def test_a_phase_without_a_step_brings_nobody_back():
    model = sparse()
    controller = begin(model, budget=0.5)
    masks = controller.masks
    controller.commit()
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks.items())


@pytest.mark.parametrize("freeze", [True, False])
def test_abandoned_theta_leaves_zeros_and_a_later_phase_chooses_anew(freeze):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    controller = begin(model, freeze_active=freeze)
    masks = controller.masks
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    for seed in range(2):
        step(model, optimizer, seed)
    first = chosen_of(controller)
    controller.abandon()
    for name, mask in masks.items():
        value = model.get_parameter(name).detach()
        assert (value[~mask] == 0).all()
        if freeze:
            assert torch.equal(value, before[name])
    begin(model, freeze_active=freeze)
    grads = dense_gradients(model, 7)
    step(model, optimizer, 7)
    second = chosen_of(controller)
    for name, mask in masks.items():
        assert torch.equal(second[name], by_sorting(grads[name], mask, 0.3))
    assert any(not torch.equal(first[name], second[name]) for name in masks)


# -- going on elsewhere ------------------------------------------------------------------------
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", ["AdamW", "Muon", "AdamW with masks"])
def test_a_phase_resumes_bit_by_bit(name, at, rule, freeze):
    terms = {"rule": rule, "freeze_active": freeze, "budget": 0.2}
    model = sparse()
    optimizer = build(name, "loop", model)
    step(model, optimizer, 9)
    controller = begin(model, **terms)
    for seed in range(at):
        step(model, optimizer, seed)
    saved = copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict()))

    other = sparse(seed=1)
    its = resu.controller(other)
    second = build(name, "loop", other)
    other.load_state_dict(saved[0])
    its.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    assert its.phase is Phase.RESU
    assert its.resurrection.config.places == 0.3
    for seed in range(at, 4):
        step(model, optimizer, seed)
        step(other, second, seed)
    held = {"fc.weight", "row.weight"} if name == "Muon" else set(controller.weights)
    for n in held:
        first, again = controller.resurrection.chosen[n], its.resurrection.chosen[n]
        assert torch.equal(first, again)
    controller.commit()
    its.commit()
    for n, mask in controller.masks.items():
        assert torch.equal(mask, its.masks[n])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_by_themselves(way):
    model = sparse()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = begin(model)
    step(model, optimizer, 0)
    other = way(model)
    second = optim.SGD(other.parameters(), lr=0.05)
    for seed in range(1, 3):
        step(model, optimizer, seed)
        step(other, second, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    check(other, second, chosen_of(controller))


def test_a_state_of_before_there_were_places_loads():
    model = sparse()
    controller = begin(model, places=None)
    step(model, optim.SGD(model.parameters(), lr=0.05), 0)
    saved = controller.state_dict()
    del saved["resurrection"]["chosen"]
    del saved["resurrection"]["config"]["places"]
    other = sparse(seed=1)
    its = resu.controller(other)
    its.load_state_dict(saved)
    assert its.resurrection.config.places is None
    assert its.resurrection.chosen == {}

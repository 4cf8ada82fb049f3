"""Mean squares of gradients: switched on and off, saved, copied."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.runtime.gradient_moments import GradientMoments
from tests.runtime.moments import CPU, backward, found, make


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def test_it_is_off_until_it_is_asked_for_and_a_later_call_keeps_it():
    model = resu.sparsify(nn.Linear(6, 4), 0.5, compile=False)
    controller = resu.controller(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    assert controller.moments is None
    assert controller.state_dict()["moments"] is None
    controller.track_gradients(0.5)
    train(model, optimizer, 1)
    moments = controller.moments
    controller.track_gradients(0.9)
    assert controller.moments is moments
    assert moments.decay == 0.5
    controller.forget_gradients()
    assert controller.moments is None
    train(model, optimizer, 1)
    controller.forget_gradients()


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range(decay):
    model = resu.sparsify(nn.Linear(6, 4), 0.5, compile=False)
    with pytest.raises(ArgumentError, match="^decay: expected"):
        resu.controller(model).track_gradients(decay)


def test_a_saved_state_goes_on_bit_by_bit():
    model, controller = make(0.5, decay=0.9)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    saved = controller.state_dict()
    kept = found(controller).clone()
    train(model, optimizer, 2, start=3)
    assert torch.equal(saved["moments"]["squares"]["weight"], kept)  # a copy

    other, its = make(0.5, seed=1, decay=0.5)
    second = optim.SGD(other.parameters(), lr=0.01)
    its.load_state_dict(saved)
    other.load_state_dict(states[0])
    second.load_state_dict(states[1])
    assert its.moments.decay == 0.9
    train(other, second, 2, start=3)
    assert torch.equal(found(its), found(controller))
    assert torch.equal(saved["moments"]["squares"]["weight"], kept)


def test_a_state_without_means_takes_them_away_and_old_states_load():
    model, controller = make(0.5)
    train(model, optim.SGD(model.parameters(), lr=0.1), 1)
    saved = resu.controller(resu.sparsify(nn.Linear(6, 4), 0.5, compile=False)).state_dict()
    controller.load_state_dict(saved)
    assert controller.moments is None
    del saved["moments"]
    controller.load_state_dict(saved)
    assert controller.moments is None


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_means_of_their_own(way):
    model, controller = make(0.5)
    train(model, optim.SGD(model.parameters(), lr=0.01), 2)
    before = found(controller).clone()
    other = way(model)
    its = resu.controller(other)
    assert torch.equal(found(its), before)
    train(other, optim.SGD(other.parameters(), lr=0.01), 2, start=2)
    assert torch.equal(found(controller), before)
    train(model, optim.SGD(model.parameters(), lr=0.01), 2, start=2)
    assert torch.equal(found(controller), found(its))


def test_in_inference_mode_and_out_of_it():
    """A mean that was begun in inference mode is an ordinary tensor."""
    moments = GradientMoments()
    with torch.inference_mode():
        moments.observe([("w", torch.ones(3))])
    moments.observe([("w", torch.ones(3))])
    assert not moments.mean_square("w", CPU).is_inference()


def test_a_compiled_model():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    plain = copy.deepcopy(model)
    runs = []
    for net, compiled in ((model, True), (plain, False)):
        resu.sparsify(net, 0.5, compile=compiled)
        resu.controller(net).track_gradients()
        train(net, optim.SGD(net.parameters(), lr=0.01), 3)
        runs.append(found(resu.controller(net)))
    torch.testing.assert_close(*runs)

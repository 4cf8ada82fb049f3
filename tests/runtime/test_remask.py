"""Masks and gradient routing that come from outside of the controller."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, MaskChangedError, PhaseError
from resu_compile.phase import Phase, Routing
from tests.compiling import Backend, eager_masking


def sparsified(**options):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    resu.sparsify(model, 0.5, **{"compile": False, **options})
    return model, resu.controller(model)


def train(model, optimizer):
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def flipped(controller):
    return {name: mask.flip(0) for name, mask in controller.masks.items()}


# -- remask --------------------------------------------------------------------------------------
def test_survivors_stay_and_all_else_is_zero():
    model, controller = sparsified()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer)
    old, values = controller.masks, {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    new = flipped(controller)
    report = controller.remask(new, "flip")
    assert report.strategy == "flip"
    for name, weight in controller.weights.items():
        stayed = old[name] & new[name]
        assert torch.equal(weight.mask, new[name])
        assert report.weights[name].kept == int(stayed.sum()) > 0
        moment = optimizer.state[weight.parameter]["exp_avg"]
        for value, before in ((weight.parameter, values[name]), (moment, moments[name])):
            assert torch.equal(value[stayed], before[stayed])
            assert not value[~stayed].any()
    train(model, optimizer)
    for name, weight in controller.weights.items():
        assert weight.parameter[new[name] & ~old[name]].any()
        assert not weight.parameter[~new[name]].any()


def test_of_the_dense_phase_all_values_stay():
    model, controller = sparsified()
    controller.set_phase("dense")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    values = {
        name: weight.parameter.detach().clone() for name, weight in controller.weights.items()
    }
    new = flipped(controller)
    controller.remask(new)
    assert controller.phase is Phase.SPARSE
    for name, weight in controller.weights.items():
        assert torch.equal(weight.parameter, torch.where(new[name], values[name], 0.0))


def test_wrong_masks_change_nothing():
    _, controller = sparsified()
    before = controller.masks
    good = flipped(controller)
    first = next(iter(good))
    wrong = [
        ({first: good[first]}, "^masks: expected one for each of"),
        ({**good, "more": good[first]}, "^masks: expected one for each of"),
        (
            {**good, first: good[first].float()},
            "expected a bool tensor of shape .* got torch.float",
        ),
        ({**good, first: good[first][1:]}, "expected a bool tensor of shape"),
    ]
    for masks, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            controller.remask(masks)
    assert all(torch.equal(before[name], mask) for name, mask in controller.masks.items())
    controller.set_phase("resu")
    with pytest.raises(PhaseError, match="^remask: expected phase dense or sparse, got resu"):
        controller.remask(good)


# -- dense gradients -----------------------------------------------------------------------------
def test_the_gradient_reaches_everything_and_the_optimizer_sees_the_active():
    model, controller = sparsified()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    controller.set_dense_gradients(True)
    assert controller.dense_gradients
    assert controller.routing is Routing.ALL
    inputs = torch.randn(3, 6)
    model(inputs).square().sum().backward()
    twin = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    twin.load_state_dict(model.state_dict())
    twin(inputs).square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    optimizer.step()
    for weight in controller.weights.values():
        assert not weight.parameter[~weight.mask].any()
        assert not optimizer.state[weight.parameter]["exp_avg"][~weight.mask].any()
    optimizer.zero_grad()
    controller.set_dense_gradients(False)
    model(inputs).square().sum().backward()
    for weight in controller.weights.values():
        assert not weight.parameter.grad[~weight.mask].any()


def test_not_between_forward_and_backward():
    model, controller = sparsified()
    loss = model(torch.randn(3, 6)).sum()
    controller.set_dense_gradients(True)
    with pytest.raises(MaskChangedError):
        loss.backward()
    controller.set_dense_gradients(True)  # nothing changes
    model(torch.randn(3, 6)).sum().backward()


def test_a_resurrection_has_a_routing_of_its_own():
    _, controller = sparsified()
    controller.set_dense_gradients(True)
    controller.set_phase("resu")
    assert not controller.dense_gradients
    with pytest.raises(PhaseError, match="^set_dense_gradients: expected phase dense or sparse"):
        controller.set_dense_gradients(True)
    controller.set_dense_gradients(False)


def test_a_compiled_model_has_one_graph_for_each_routing(monkeypatch):
    torch._dynamo.reset()
    model, controller = sparsified()
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    inputs = torch.randn(3, 6)
    with eager_masking(monkeypatch) as masked:
        for on in (False, True, False, True):
            controller.set_dense_gradients(on)
            model.zero_grad()
            compiled(inputs).square().sum().backward()
            for weight in controller.weights.values():
                assert bool(weight.parameter.grad[~weight.mask].any()) is on
    assert backend.counts == [2]
    assert masked == []

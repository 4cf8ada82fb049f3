"""Theta in a few places: whatever writes a step, the others stay 0."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.kernels.mask_bits import unpack_mask
from resu_compile.runtime.optimizer_hooks import LOOK_EVERY
from resu_compile.runtime.optimizer_state import same_shaped_state
from tests.integration.test_invariants import FORMS, OPTIMIZERS, Net, build, loss_of
from tests.runtime.places import RULES, begin, check, chosen_of, sparse, step


# -- every optimizer ---------------------------------------------------------------------------
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_the_others_at_zero(name, form, freeze):
    model = sparse()
    optimizer = build(name, form, model)
    for seed in range(2):  # with a state of before
        step(model, optimizer, seed)
    controller = begin(model, freeze_active=freeze, rule="optimizer", places=0.6)
    held = {
        id(parameter) for group in optimizer.param_groups for parameter in group["params"]
    }  # Muon takes matrices alone
    masks = controller.masks
    before = {n: model.get_parameter(n).detach().clone() for n in masks}
    for seed in range(2, 6):
        step(model, optimizer, seed)
        for n, weight in controller.weights.items():
            parameter = weight.parameter
            if id(parameter) not in held:
                continue
            bits = controller.resurrection.chosen[n]
            chosen = unpack_mask(bits, weight.shape)
            idle = ~masks[n] & ~chosen
            tensors = {"value": parameter.detach(), **dict(same_shaped_state(optimizer, parameter))}
            for key, value in tensors.items():
                assert (value[idle] == 0).all(), f"{key} of {n}"
            assert (parameter[chosen] != 0).any()
            same = parameter[masks[n]] == before[n][masks[n]]
            assert same.all() if freeze else not same.all()


@pytest.mark.parametrize("state", ["full", "active"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("freeze", [True, False])
def test_the_optimizers_of_this_package(state, rule, freeze):
    model = sparse()
    optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, state=state)
    for seed in range(2):
        step(model, optimizer, seed)
    controller = begin(model, rule=rule, freeze_active=freeze)
    for seed in range(2, 5):
        step(model, optimizer, seed)
        check(model, optimizer, chosen_of(controller))
    controller.commit(budget=0.2)
    for seed in range(5, 7):
        step(model, optimizer, seed)
        for name, mask in controller.masks.items():
            assert (model.get_parameter(name)[~mask] == 0).all()


@pytest.mark.parametrize("storage", ["inplace", "compact"])
@pytest.mark.parametrize("optimizer", ["SGD momentum", "AdamW", "Adamax", "Muon", "Adafactor"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("freeze", [True, False])
def test_rules_of_theta_move_the_chosen_alone(rule, freeze, optimizer, storage):
    def run(places):
        model = sparse()
        steps = build(optimizer, "loop", model)
        for seed in range(2):
            step(model, steps, seed)
        controller = begin(
            model, rule=rule, freeze_active=freeze, places=places, lr=0.01, storage=storage
        )
        step(model, steps, 2)
        return model, steps, controller

    model, steps, controller = run(0.3)
    every, *_ = run(None)
    for name, bits in controller.resurrection.chosen.items():
        mask = controller.masks[name]
        chosen = unpack_mask(bits, mask.shape)
        value, other = model.get_parameter(name), every.get_parameter(name)
        assert torch.equal(value[chosen], other[chosen])  # their first step is the same
        if optimizer != "Muon":  # which mixes rows
            assert torch.equal(value[mask], other[mask])
        assert (value[~mask & ~chosen] == 0).all()
    for seed in range(3, 6):
        step(model, steps, seed)
    for name, bits in controller.resurrection.chosen.items():
        mask = controller.masks[name]
        idle = ~mask & ~unpack_mask(bits, mask.shape)
        parameter = model.get_parameter(name)
        for value in (parameter, *dict(same_shaped_state(steps, parameter)).values()):
            assert (value[idle] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "Adamax", "AdamW with masks"])
def test_16_bits(name, dtype):
    model = nn.Linear(16, 8).to(dtype)
    resu.sparsify(model, 0.6, compile=False)
    optimizer_class, arguments = OPTIMIZERS[name]
    optimizer = optimizer_class(model.parameters(), **arguments)
    controller = resu.controller(model)
    controller.resurrect(places=0.3).__enter__()
    for seed in range(4):
        optimizer.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
    check(model, optimizer, chosen_of(controller))
    if dtype is torch.bfloat16:  # in float16 Adam's eps is 0, and 0 / 0 is NaN where g is 0
        assert torch.isfinite(model.weight).all()


# -- other ways to write a step ----------------------------------------------------------------
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "Muon"])
@pytest.mark.parametrize("write", ["noise", "assigned", "closure"])
def test_gradients_that_are_written_after_backward(name, write, freeze):
    model = sparse(targets=["fc.weight"])
    optimizer = build(name, "loop", model)
    controller = begin(model, freeze_active=freeze)
    for seed in range(4):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        if write == "closure":
            optimizer.step(closure)
        else:
            closure()
            for parameter in model.parameters():
                if write == "noise":
                    parameter.grad.add_(0.1)
                else:
                    parameter.grad = parameter.grad + 0.1
            optimizer.step()
        check(model, optimizer, chosen_of(controller))


def test_a_compiled_model_ends_in_the_same_weights():
    def run(compiled, freeze):
        torch.manual_seed(0)
        model = resu.sparsify(Net(), 0.6, compile=False)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        controller = begin(model, freeze_active=freeze)
        for seed in range(3):
            step(call, optimizer, seed)
        check(model, optimizer, chosen_of(controller))
        return model

    for freeze in (True, False):
        first, second = run(True, freeze), run(False, freeze)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


def test_sparsify_with_compile():
    torch.manual_seed(0)
    model = resu.sparsify(Net(), 0.6)
    plain = sparse()
    plain.load_state_dict(model.state_dict())
    results = []
    for net in (model, plain):
        optimizer = optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        step(net, optimizer, 9)
        controller = begin(net)
        for seed in range(2):
            step(net, optimizer, seed)
        check(net, optimizer, chosen_of(controller))
        results.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*results)


# -- writes that no version counter sees -------------------------------------------------------
def noise_on_the_gradient(parameter):
    parameter.grad.data.add_(torch.randn_like(parameter))


def noise_on_the_weight(parameter):
    parameter.data.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", ["optimizer", "adam"])
@pytest.mark.parametrize("write", [noise_on_the_gradient, noise_on_the_weight])
def test_writes_through_data_are_found(write, rule, freeze):
    model = sparse(targets=["fc.weight"])
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    controller = begin(model, freeze_active=freeze, rule=rule)
    weight = controller.weights["fc.weight"]

    def squares():
        """E[g^2] of theta, with the optimizer's state or beside it."""
        beside = controller.resurrection.theta_of(weight).buffers
        means = {**dict(same_shaped_state(optimizer, weight.parameter)), **beside}
        return means["exp_avg_sq"][chosen["fc.weight"]].clone()

    for seed in range(LOOK_EVERY + 3):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        if seed > 1:
            write(weight.parameter)
        before = squares() if seed == LOOK_EVERY else 0.0
        optimizer.step()
        chosen = chosen_of(controller)
        if seed < 2 or seed >= LOOK_EVERY:
            check(model, optimizer, chosen)
        assert (squares() >= 0.94 * before).all()  # they decay by 0.95 or 0.999 a step
    assert not weight.trusts_versions


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_found_where_nothing_was_written(rule, freeze):
    model = sparse()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    controller = begin(model, freeze_active=freeze, rule=rule)
    for seed in range(LOOK_EVERY + 1):
        step(model, optimizer, seed)
    assert all(weight.trusts_versions for weight in controller.weights.values())

"""Theta in a few places: those with the largest |g| of the first step; the others stay 0."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.mask_bits import unpack_mask
from resu_compile.phase import Phase
from resu_compile.runtime.optimizer_state import same_shaped_state
from tests.integration.test_invariants import FORMS, OPTIMIZERS, Net, build, loss_of

RULES = ["optimizer", "sgd", "momentum", "adam"]


def sparse(sparsity=0.6, seed=0, **arguments):
    torch.manual_seed(seed)
    return resu.sparsify(Net(), sparsity, compile=False, **arguments)


def begin(model, **terms):
    controller = resu.controller(model)
    controller.resurrect(**{"places": 0.3, **terms}).__enter__()
    return controller


def step(model, optimizer, seed):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def by_sorting(grad, mask, places):
    """The places that theta gets, one number at a time."""
    sizes, active = grad.abs().flatten().tolist(), mask.flatten().tolist()
    pruned = [i for i, kept in enumerate(active) if not kept]
    count = min(int(places * (len(active) - len(pruned))), len(pruned))
    best = sorted(pruned, key=lambda i: (-sizes[i], i))[:count]
    return torch.tensor([i in best for i in range(len(active))], dtype=torch.bool).view_as(mask)


def chosen_of(controller):
    """bool mask of the places of theta, of each weight."""
    running = controller.resurrection
    assert set(running.chosen) == set(controller.weights)
    return {
        name: unpack_mask(bits, controller.weights[name].shape)
        for name, bits in running.chosen.items()
    }


def check(model, optimizer, chosen, *, gradients=True):
    """What is neither active nor chosen is 0: value, gradient and optimizer state."""
    for name, weight in resu.controller(model).weights.items():
        parameter = weight.parameter
        idle = ~weight.mask & ~chosen[name]
        assert idle.any()
        tensors = {"value": parameter.detach(), **dict(same_shaped_state(optimizer, parameter))}
        if gradients:
            tensors["gradient"] = parameter.grad
        for key, value in tensors.items():
            assert (value[idle] == 0).all(), f"{key} of {name}"


def dense_gradients(model, seed):
    """Gradients of a plain model with these values."""
    plain = Net()
    plain.load_state_dict(model.state_dict())
    loss_of(plain, seed).backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


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

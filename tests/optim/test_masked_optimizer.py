"""The optimizers that know masks beside torch's own: phases, reloads, copies, nested steps."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.errors import ArgumentError
from tests.optim.test_optim import CLOSE, make, packed, train, weights

NESTEROV = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3}
KINDS = {
    "adamw": (resu.optim.AdamW, optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}, {}),
    "packed": (resu.optim.AdamW, optim.AdamW, {"lr": 0.05}, {"state": "active"}),
    "sgd": (resu.optim.SGD, optim.SGD, NESTEROV, {}),
}
RULES = [
    (rule, storage)
    for rule, storage in product(
        ("optimizer", "adam", "momentum", "sgd", "selective", "subset"), ("inplace", "compact")
    )
    if (rule, storage) != ("optimizer", "compact")
]


@pytest.mark.parametrize("warm", [0, 2], ids=["first step in the phase", "later"])
@pytest.mark.parametrize("freeze", [None, "active", "all"])
@pytest.mark.parametrize(("rule", "storage"), RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_phases_go_as_with_torchs_optimizer(kind, rule, storage, freeze, warm, device):
    ours, theirs, options, more = KINDS[kind]
    results = []
    for make_optimizer, extra in ((ours, more), (theirs, {})):
        model = make(0.6, device)
        controller = resu.controller(model)
        optimizer = make_optimizer(model.parameters(), **options, **extra)
        train(model, optimizer, warm)
        controller.resurrect(rule=rule, freeze=freeze, storage=storage).__enter__()
        train(model, optimizer, 3, start=10)
        controller.commit(budget=0.3)
        train(model, optimizer, 2, start=20)
        controller.resurrect(rule=rule, freeze=freeze, storage=storage).__enter__()
        train(model, optimizer, 2, start=30)
        controller.abandon()
        train(model, optimizer, 2, start=40)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("freeze", [None, "active"])
def test_a_weight_without_pruned_places_goes_as_with_torchs_optimizer(freeze, device):
    results = []
    for kind in (resu.optim.AdamW, optim.AdamW):
        model = make(0.0, device)
        optimizer = kind(model.parameters(), lr=0.05)
        with resu.controller(model).resurrect(rule="optimizer", freeze=freeze):
            train(model, optimizer, 3)
        train(model, optimizer, 3, start=3)  # Adam's corrections count the steps
        results.append(weights(model))
    torch.testing.assert_close(*results, **CLOSE)


# -- checkpoints ---------------------------------------------------------------------------------
def test_packed_moments_load_into_full_ones_and_back():
    """A packed state goes on in an optimizer that keeps all moments, and the other way round."""
    results = []
    for kinds in (["full"] * 3, ["active", "full", "active"]):
        model, saved = make(0.6), None
        for start, kind in enumerate(kinds):
            optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, state=kind)
            if saved is not None:
                optimizer.load_state_dict(saved)
            train(model, optimizer, 3, start=3 * start)
            saved = copy.deepcopy(optimizer.state_dict())
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_torchs_moments_load_into_packed_ones_of_a_vector():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.1, 2.0, 40))

        def forward(self, x):
            return x * self.scale

    results = []
    for options in ({}, {"state": "active"}):
        model = resu.sparsify(Scale(), 0.5, targets=["scale"], compile=False)
        first = optim.AdamW(model.parameters(), lr=0.05)
        second = resu.optim.AdamW(model.parameters(), lr=0.05, **options)
        for optimizer in (first, second):
            if optimizer is second:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            for seed in range(3):
                optimizer.zero_grad()
                x = torch.randn(40, generator=torch.Generator().manual_seed(seed))
                model(x).square().sum().backward()
                optimizer.step()
        results.append(model.scale.detach())
    assert second.state[model.scale]["exp_avg"].shape == (20,)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("state", ["full", "active"])
def test_packed_moments_of_other_masks_are_refused(state):
    model, other = make(0.6), make(0.5)
    optimizer = packed(other)
    train(other, optimizer, 1)
    resumed = resu.optim.AdamW(model.parameters(), lr=0.05, state=state)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ArgumentError, match="packed moments load only beside the masks"):
        train(model, resumed, 1)


def test_masks_that_are_loaded_alone_keep_the_moments_in_their_places():
    """As many places, but others: the moments must not slide to other weights."""
    results = []
    for options in ({}, {"state": "active"}):
        model, other = make(0.6), make()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(parameter.flip(0))
        resu.sparsify(other, 0.6, compile=False)
        optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, **options)
        train(model, optimizer, 3)
        model.load_state_dict(make().state_dict())
        resu.controller(model).load_state_dict(resu.controller(other).state_dict())
        train(model, optimizer, 3, start=3)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [optim.AdamW, resu.optim.AdamW])
@pytest.mark.parametrize("rule", ["optimizer", "adam"])
def test_a_state_loaded_within_a_phase_keeps_thetas_means(kind, rule):
    results = []
    for reloads in (False, True):
        model = make(0.6)
        optimizer = kind(model.parameters(), lr=0.05)
        resu.controller(model).resurrect(rule=rule).__enter__()
        train(model, optimizer, 3)
        if reloads:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 2, start=3)
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [optim.SGD, resu.optim.SGD])
def test_theta_follows_the_learning_rate_after_a_load(kind):
    """``load_state_dict`` puts other parameter groups in the place of those before."""
    model = make(0.6)
    optimizer = kind(model.parameters(), lr=0.05)
    resu.controller(model).resurrect(rule="sgd").__enter__()
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model).clone()
    train(model, optimizer, 1)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("state", ["full", "active"])
def test_the_step_count_is_that_of_a_loaded_state(state, fused, device):
    model = make(0.6, device)
    optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, state=state, fused=fused)
    controller = resu.controller(model)
    if state == "full":
        controller.resurrect(rule="adam").__enter__()
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):  # to the same count from another start, and again
        train(model, optimizer, 3)
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(model, optimizer, 1)
        assert float(optimizer.state[model[0].weight]["step"]) == 3.0
        step = optimizer._active_step(optimizer.param_groups[0], model[0].weight)
        assert step.correction1 == pytest.approx(1 - 0.9**4)


@pytest.mark.parametrize("rule", [None, "adam"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_on_packed(rule, how):
    model = make(0.6)
    optimizer = packed(model)
    train(model, optimizer, 2)
    if rule is not None:
        resu.controller(model).resurrect(rule=rule).__enter__()
        train(model, optimizer, 2, start=2)
    if how == "deepcopy":
        twin, its_optimizer = copy.deepcopy((model, optimizer))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, its_optimizer = torch.load(file, weights_only=False)
    assert its_optimizer.packs_state
    for one, its_own in ((model, optimizer), (twin, its_optimizer)):
        if rule is not None:
            resu.controller(one).commit(budget=0.2)
        train(one, its_own, 3, start=4)
    assert torch.equal(weights(model), weights(twin))


# -- unusual steps -------------------------------------------------------------------------------
class Wrapper(optim.Optimizer):
    """An optimizer whose step is that of another one."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["optimizer", "adam", "momentum"])
@pytest.mark.parametrize("freeze", [None, "active", "all"])
def test_a_step_inside_a_step_moves_theta_once(kind, rule, freeze):
    ours, _, options, more = KINDS[kind]
    results = []
    for wraps in (False, True):
        model = make(0.6)
        optimizer = ours(model.parameters(), **options, **more)
        train(model, optimizer, 1)
        resu.controller(model).resurrect(rule=rule, freeze=freeze).__enter__()
        train(model, Wrapper(optimizer) if wraps else optimizer, 4, start=1)
        assert all(parameter.grad is not None for parameter in model.parameters())
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [optim.AdamW, resu.optim.AdamW])
@pytest.mark.parametrize("rule", ["optimizer", "adam"])
def test_a_step_inside_a_step_leaves_frozen_moments_alone(kind, rule):
    model = make(0.6)
    optimizer = kind(model.parameters(), lr=0.05)
    train(model, optimizer, 2)
    active = resu.controller(model).masks["0.weight"]
    before = optimizer.state[model[0].weight]["exp_avg"][active].clone()
    resu.controller(model).resurrect(rule=rule, freeze="active").__enter__()
    train(model, Wrapper(optimizer), 2, start=2)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"][active], before)


@pytest.mark.parametrize("state", ["full", "active"])
@pytest.mark.parametrize("rule", [None, "adam"])
def test_a_compiled_step_takes_the_masks_along(state, rule):
    results = []
    for compiles in (False, True):
        torch.compiler.reset()
        model = make(0.6)
        optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, state=state)
        train(model, optimizer, 1)
        if rule is not None:
            resu.controller(model).resurrect(rule=rule).__enter__()
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
            model(x).square().sum().backward()
            step()
        results.append(weights(model))
    torch.testing.assert_close(*results)


def test_a_frozen_gradient_of_a_step_that_raised_does_not_come_back():
    model = make(0.6)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    resu.controller(model).resurrect(freeze="all").__enter__()

    def fail(*_):
        raise RuntimeError

    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError):
        train(model, optimizer, 1)
    hook.remove()
    optimizer.zero_grad()
    model(torch.ones(6, 9)).sum().backward()
    grad = model[0].bias.grad
    optimizer.step()
    assert model[0].bias.grad is grad


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_leaves_all_as_it_was(fused):
    for state, rule, freeze in product(
        ("full", "active"), (None, "adam", "optimizer"), (None, "active")
    ):
        model = make(0.6)
        optimizer = resu.optim.AdamW(model.parameters(), lr=0.05, state=state, fused=fused)
        train(model, optimizer, 2)
        controller = resu.controller(model)
        if rule is not None:
            controller.resurrect(rule=rule, freeze=freeze).__enter__()
            train(model, optimizer, 1, start=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = weights(model).clone(), copy.deepcopy(optimizer.state_dict()["state"])
        running = controller.resurrection
        steps = running and {name: theta.step for name, theta in running.thetas.items()}
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(6, 9)).sum()).backward()
        model[2].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights(model), before[0])
        for old, new in zip(
            before[1].values(), optimizer.state_dict()["state"].values(), strict=True
        ):
            assert all(torch.equal(old[key], new[key]) for key in old)
        assert steps == (running and {name: t.step for name, t in running.thetas.items()})


@pytest.mark.parametrize("kind", [optim.AdamW, resu.optim.AdamW])
def test_pruned_places_in_float16_do_not_become_nan(kind):
    """Adam's epsilon of 1e-8 is 0 there."""
    model = nn.Linear(9, 8).half()
    resu.sparsify(model, 0.5, compile=False)
    optimizer = kind(model.parameters(), lr=0.01, foreach=False)
    for seed in range(2):
        optimizer.zero_grad()
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).half()
        model(x).float().square().mean().backward()
        optimizer.step()
    assert (model.weight[~resu.controller(model).masks["weight"]] == 0).all()
    assert torch.isfinite(model.weight).all()

"""The rules of theta against plain float64 arithmetic, one number at a time, over 50 steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn, optim

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.runtime.rules import RULES, choose_subset, state_names

LR = 0.02
STEPS = 50


class PlainTheta:
    """What ``runtime/rules.py`` says in formulas, in loops over Python floats."""

    def __init__(self, theta, config, chosen=None):
        self.theta, self.config, self.chosen = list(theta), config, chosen
        count = len(self.theta)
        self.m, self.v, self.count = [0.0] * count, [0.0] * count, 0

    def move(self, grad, lr):
        self.count += 1
        getattr(self, self.config.rule)(grad, lr)

    def _go(self, i, direction, lr):
        self.theta[i] -= lr * (direction + self.config.weight_decay * self.theta[i])

    def _adam(self, i, g):
        b1, b2 = self.config.betas
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        root = math.sqrt(self.v[i] / (1 - b2**self.count)) + self.config.adam_eps
        return self.m[i] / (1 - b1**self.count) / root

    def sgd(self, grad, lr):
        for i, g in enumerate(grad):
            self._go(i, g, lr)

    def momentum(self, grad, lr):
        for i, g in enumerate(grad):
            self.m[i] = self.config.momentum * self.m[i] + g
            self._go(i, self.m[i], lr)

    def adam(self, grad, lr):
        for i, g in enumerate(grad):
            self._go(i, self._adam(i, g), lr)

    def subset(self, grad, lr):
        for i, g in enumerate(grad):
            direction = self._adam(i, g) if self.config.step == "adam" else g
            if self.chosen[i]:
                self._go(i, direction, lr)

    def selective(self, grad, lr):
        config, count = self.config, len(grad)
        beta = config.betas[0]
        consistency = []
        for i, g in enumerate(grad):
            self.m[i] = beta * self.m[i] + (1 - beta) * g
            self.v[i] = beta * self.v[i] + (1 - beta) * abs(g)
            consistency.append(abs(self.m[i]) / (self.v[i] + config.delta))
        order = sorted(range(count), key=lambda i: (-abs(grad[i]), i))
        screened = order[: int(config.screen * count)]
        both = [i for i in screened if consistency[i] > config.tau]
        for i in both[: int(config.select * count)]:
            u = grad[i] if config.step == "raw" else self.m[i] / (self.v[i] + config.delta)
            self._go(i, consistency[i] * u, lr)


CONFIGS = {
    "sgd": {"rule": "sgd"},
    "sgd decay": {"rule": "sgd", "weight_decay": 0.3},
    "momentum": {"rule": "momentum", "momentum": 0.8, "weight_decay": 0.1},
    "adam": {"rule": "adam"},
    "adam decay": {"rule": "adam", "betas": (0.5, 0.9), "adam_eps": 1e-3, "weight_decay": 0.3},
    "selective raw": {"rule": "selective", "step": "raw", "weight_decay": 0.1},
    "selective adam": {"rule": "selective", "step": "adam", "screen": 0.9, "tau": 0.1},
    "selective few": {"rule": "selective", "step": "raw", "screen": 0.3, "select": 0.05},
    "subset raw": {"rule": "subset", "step": "raw"},
    "subset adam": {"rule": "subset", "step": "adam", "alpha": 0.4, "weight_decay": 0.1},
}


def start(config, seed, count=37):
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(count, generator=generator, dtype=torch.float64)
    state = {name: torch.zeros(count, dtype=torch.float64) for name in state_names(config)}
    if config.rule == "subset":
        state["chosen"] = choose_subset(theta, config, generator)
    # a drift that differs by entry, so that some gradients keep their sign
    drift = torch.linspace(0, 2, count, dtype=torch.float64)

    def gradient():
        return torch.randn(count, generator=generator, dtype=torch.float64) + drift

    return theta, state, gradient


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_plain_float64_step_for_step(name, seed):
    config = ResurrectionConfig(**CONFIGS[name])
    theta, state, gradient = start(config, seed)
    chosen = state["chosen"].tolist() if "chosen" in state else None
    plain = PlainTheta(theta.tolist(), config, chosen)
    before = theta.clone()
    for step in range(1, STEPS + 1):
        grad = gradient()
        plain.move(grad.tolist(), LR)
        RULES[config.rule](theta, grad, state, step, LR, config)
        expected = torch.tensor(plain.theta, dtype=torch.float64)
        torch.testing.assert_close(theta, expected, rtol=1e-11, atol=1e-13)
    moved = theta != before
    assert moved.any()
    if name in ("selective few", "subset raw", "subset adam"):
        assert not moved.all()


@pytest.mark.parametrize("by", ["random", "gradient"])
def test_a_subset_has_the_exact_share(by):
    config = ResurrectionConfig(rule="subset", subset_by=by, alpha=0.3)
    grad = torch.randn(101)
    chosen = choose_subset(grad, config, torch.Generator().manual_seed(0))
    assert int(chosen.sum()) == int(0.3 * 101)
    if by == "gradient":
        assert grad[chosen].abs().min() >= grad[~chosen].abs().max()
    else:
        again = choose_subset(torch.zeros(101), config, torch.Generator().manual_seed(0))
        assert torch.equal(chosen, again)


# -- the same rules in a phase, under either storage -------------------------------------------
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "resu adamw": lambda p: resu.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "resu sgd": lambda p: resu.optim.SGD(p, lr=0.05, momentum=0.9),
}


def run_phase(optimizer, steps=6, dtype=torch.float32, **options):
    """Weights after each step of a RESU phase that follows a few sparse steps."""
    torch.manual_seed(0)
    model = resu.sparsify(nn.Linear(7, 5).to(dtype), 0.6, compile=False)
    made = OPTIMIZERS[optimizer](model.parameters())

    def step(seed):
        made.zero_grad()
        x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
        model(x).square().sum().backward()
        made.step()

    for seed in range(3):
        step(seed)
    phase = resu.controller(model).resurrect(**options)
    phase.__enter__()
    history = []
    for seed in range(3, 3 + steps):
        step(seed)
        history.append(model.weight.detach().clone())
    return model, made, history


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", list(RULES))
def test_both_storages_and_both_doors_make_the_same_steps(rule, optimizer, freeze):
    options = {"rule": rule, "lr": 0.02, "init": "normal", "freeze_active": freeze}
    _, _, inplace = run_phase(optimizer, **options)
    _, _, compact = run_phase(optimizer, storage="compact", **options)
    for one, other in zip(inplace, compact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    plain = optimizer.removeprefix("resu ")
    _, _, hooked = run_phase(plain, **options)
    for one, other in zip(inplace, hooked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_compact_theta_is_finer_than_the_weight_that_shows_it():
    model, _, _ = run_phase("adamw", dtype=torch.bfloat16, storage="compact", lr=1e-4)
    resurrection = resu.controller(model).resurrection
    theta = resurrection.thetas["weight"]
    mask = resu.controller(model).masks["weight"]
    assert theta.vector.dtype == torch.float32
    assert torch.equal(theta.vector.bfloat16(), model.weight.detach()[~mask])
    assert not torch.equal(theta.vector, theta.vector.bfloat16().float())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dropping_compact_theta_leaves_no_trace(optimizer):
    options = {"rule": "adam", "lr": 0.02, "freeze_active": True, "storage": "compact"}
    model, made, _ = run_phase(optimizer, steps=4, **options)
    untouched, same, _ = run_phase(optimizer, steps=0, **options)
    resu.controller(model).abandon()
    resu.controller(untouched).abandon()
    assert torch.equal(model.weight, untouched.weight)
    for key, value in same.state[untouched.weight].items():
        if value.dim():  # the step count goes on
            assert torch.equal(value, made.state[model.weight][key]), key


def test_the_means_live_in_the_optimizers_own_state():
    for optimizer in ("adamw", "resu adamw"):
        model, made, _ = run_phase(optimizer, rule="adam", lr=0.02)
        resurrection = resu.controller(model).resurrection
        mask = resu.controller(model).masks["weight"]
        assert resurrection.thetas["weight"].buffers == {}
        state = made.state[model.weight]
        assert (state["exp_avg"][~mask] != 0).all()
        resu.controller(model).commit(budget=0.5)
        new = resu.controller(model).masks["weight"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert (state[key][~mask] == 0).all(), key  # resurrected and pruned alike
            assert (state[key][mask & new] != 0).all(), key


def test_means_without_a_place_of_their_own_stay_beside():
    model, made, _ = run_phase("sgd", rule="adam", lr=0.02)
    mask = resu.controller(model).masks["weight"]
    buffers = resu.controller(model).resurrection.thetas["weight"].buffers
    assert set(buffers) == {"exp_avg", "exp_avg_sq"}
    assert (made.state[model.weight]["momentum_buffer"][~mask] == 0).all()


def test_a_subset_stays_until_it_is_refreshed():
    for refresh, changes in ((0, False), (2, True)):
        options = {"rule": "subset", "step": "raw", "lr": 0.02, "freeze_active": True}
        _, _, history = run_phase("sgd", **options, refresh=refresh, subset_by="gradient")
        moved = [(b != a) for a, b in zip(history[:-1], history[1:], strict=True)]
        sets_differ = any(not torch.equal(a, b) for a, b in zip(moved[:-1], moved[1:], strict=True))
        assert sets_differ is changes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_freeze_all_moves_theta_only(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    resu.sparsify(model, 0.5, compile=False)
    made = OPTIMIZERS[optimizer](model.parameters())
    ids = torch.randint(5, (8,))

    def step():
        made.zero_grad()
        model(ids).square().sum().backward()
        made.step()

    for _ in range(2):
        step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = resu.controller(model).masks["2.weight"]
    with resu.controller(model).resurrect(lr=0.1, freeze="all", budget=0.0):
        step()
        assert model[0].weight.grad is not None
        for name, parameter in model.named_parameters():
            if name == "2.weight":
                assert torch.equal(parameter[mask], before[name][mask])
                assert (parameter[~mask] != 0).all()
            else:
                assert torch.equal(parameter, before[name]), name
    step()
    assert not torch.equal(model[0].weight, before["0.weight"])  # free again


def test_freeze_all_reaches_a_second_optimizer():
    torch.manual_seed(0)
    model = resu.sparsify(nn.Linear(6, 4), 0.5, compile=False)
    first, second = optim.SGD([model.weight], lr=0.1), optim.SGD([model.bias], lr=0.1)
    bias = model.bias.detach().clone()
    resu.controller(model).resurrect(lr=0.1, freeze="all").__enter__()
    model(torch.randn(3, 6)).sum().backward()
    first.step()
    second.step()
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize("storage", ["inplace", "compact"])
def test_theta_that_the_user_writes_is_theta(storage):
    model = resu.sparsify(nn.Linear(6, 5), 0.5, compile=False)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = resu.controller(model)
    controller.resurrect(rule="sgd", lr=0.01, storage=storage).__enter__()
    hole = ~controller.masks["weight"]
    for seed in range(2):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        with torch.no_grad():
            model.weight[hole] = 0.5
        expected = 0.5 - 0.01 * model.weight.grad[hole]
        optimizer.step()
        torch.testing.assert_close(model.weight.detach()[hole], expected)


def test_a_compact_phase_can_begin_in_inference_mode():
    model = resu.sparsify(nn.Linear(6, 5), 0.5, compile=False)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    with torch.inference_mode():
        resu.controller(model).resurrect(rule="sgd", storage="compact").__enter__()
    model(torch.ones(4, 6)).square().sum().backward()
    optimizer.step()
    assert (model.weight[~resu.controller(model).masks["weight"]] != 0).all()


def test_a_model_that_lost_its_hooks_freezes_nobody():
    model = resu.sparsify(nn.Linear(6, 5), 0.5, compile=False)
    resu.controller(model).resurrect(freeze="all").__enter__()
    model._forward_pre_hooks.clear()
    other = nn.Linear(3, 2)
    before = other.bias.detach().clone()
    other(torch.ones(4, 3)).sum().backward()
    optim.SGD(other.parameters(), lr=0.1).step()
    assert not torch.equal(other.bias, before)

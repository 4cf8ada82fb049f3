"""Mean squares of gradients: what optimizers step with, taken in once a step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.runtime.gradient_moments import DECAY, GradientMoments
from tests.runtime.moments import CPU, ByHand, backward, found, make

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": lambda p: optim.SGD(p, lr=0.001, maximize=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "resu adamw": lambda p: resu.optim.AdamW(p, lr=0.1),
    "resu adamw active": lambda p: resu.optim.AdamW(p, lr=0.1, state="active"),
    "resu sgd": lambda p: resu.optim.SGD(p, lr=0.1, momentum=0.9),
}


# -- the formula -------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    steps=st.integers(1, 6),
    decay=st.floats(0.0, 0.999),
    factor=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_observe_is_the_formula(shape, steps, decay, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    moments, by_hand = GradientMoments(decay), ByHand(decay)
    for _ in range(steps):
        grads = torch.randn(shape, generator=generator)
        moments.observe([("a", grads), ("b", 2 * grads)], factor)
        by_hand.observe(grads.double() * factor)
    squares = moments.mean_square("a", CPU)
    assert squares.shape == torch.Size(shape)
    assert squares.flatten().tolist() == pytest.approx(by_hand.squares, rel=1e-4)
    torch.testing.assert_close(moments.mean_square("b", CPU), 4 * squares)


def test_a_newcomer_comes_up_to_one_minus_decay_to_the_n():
    moments = GradientMoments(0.9)
    for n in range(1, 20):
        moments.observe([("w", torch.full((2,), 3.0))])
        assert moments.mean_square("w", CPU)[0].item() == pytest.approx(9 * (1 - 0.9**n), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_in_every_phase(optimizer):
    """Dense, sparse and in a resurrection: the squares of what it steps with."""
    model, controller = make()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    by_hand = ByHand()
    for step in range(9):
        if step == 3:
            controller.prune(0.5)
        if step == 6:
            controller.resurrect().__enter__()
        optimizer.zero_grad()
        backward(model, step)
        by_hand.observe(model.weight.grad)
        optimizer.step()
        by_hand.check(controller)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "optimizer", "selective"])
@pytest.mark.parametrize("freeze", [True, False])
def test_every_rule_of_theta(rule, freeze):
    model, controller = make(0.5)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    controller.resurrect(rule=rule, freeze_active=freeze).__enter__()
    by_hand = ByHand()
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        by_hand.observe(model.weight.grad)
        optimizer.step()
        by_hand.check(controller)


def test_what_is_pruned_fades():
    model, controller = make()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    backward(model, 0)
    optimizer.step()
    controller.prune(0.5)
    hole = ~controller.masks["weight"]
    before = found(controller).clone()
    for step in range(1, 4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    torch.testing.assert_close(found(controller)[hole], before[hole] * DECAY**3)
    assert (found(controller)[~hole] > before[~hole] * DECAY**3).all()


def test_clipped_and_accumulated_gradients_are_seen_as_they_are_stepped_with():
    model, controller = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for part in range(3):
        backward(model, part)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    by_hand = ByHand()
    by_hand.observe(model.weight.grad)
    optimizer.step()
    by_hand.check(controller)


def test_sparse_gradients_and_several_dtypes_in_one_step():
    moments = GradientMoments(0.5)
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    parts = [("a", dense.to_sparse()), ("b", dense.bfloat16()), ("c", dense)]
    for _ in range(2):
        moments.observe(parts)
    for name in "abc":
        assert moments.mean_square(name, CPU).tolist() == [[0.0, 3.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_kept_in_float32(dtype):
    model, controller = make(dtype=dtype)
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    by_hand = ByHand()
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        by_hand.observe(model.weight.grad)
        optimizer.step()
    by_hand.check(controller)


def test_without_a_gradient_nothing_is_seen():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    resu.sparsify(model, 0.0, compile=False)
    controller = resu.controller(model)
    controller.track_gradients()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    for name in ("0.weight", "1.weight"):
        with pytest.raises(ArgumentError, match=f"gradient of {name} to be known"):
            found(controller, name)
    model[0](torch.randn(2, 6)).sum().backward()
    optimizer.step()
    first = found(controller, "0.weight").clone()
    optimizer.zero_grad()
    optimizer.step()  # no gradient: F stays, it does not fade
    assert torch.equal(found(controller, "0.weight"), first)
    with pytest.raises(ArgumentError, match=r"gradient of 1\.weight to be known"):
        found(controller, "1.weight")


def test_an_expanded_gradient():
    model, controller = make()
    model.weight.grad = torch.full((1, 1), 2.0).expand(4, 6)
    optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(found(controller), torch.full((4, 6), 4.0 * (1 - DECAY)))


# -- loss scaling ------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_grad_scaler_changes_nothing_but_the_skips(fused, unscale, sparsity):
    def run(scaled):
        model, controller = make(sparsity)
        optimizer = optim.SGD(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(4):
            overflow = step == 2
            if overflow and not scaled:
                continue
            optimizer.zero_grad()
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            scaler.scale(model(x).square().sum() * (math.inf if overflow else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return found(controller).clone()

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=0)


# -- steps of other shapes ---------------------------------------------------------------------
class Inherited(optim.SGD):
    """Its step calls the real one, so that the hooks run twice."""

    def step(self, closure=None):
        return super().step(closure)


class Clips(optim.SGD):
    """Its step writes the gradient before the real one."""

    def step(self, closure=None):
        for group in self.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1e9)
        return super().step(closure)


class Holds(optim.Optimizer):
    """Steps by another optimizer of the same parameters, as Lookahead does."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.inner = optim.SGD(params, lr=lr)

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("optimizer_class", [Inherited, Clips, Holds])
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("phase", ["dense", "sparse", "resu", "resu sgd", "resu frozen"])
def test_a_step_within_a_step_counts_once(optimizer_class, with_closure, phase):
    def run(optimizer_class):
        optim.SGD(nn.Linear(1, 1).parameters())  # its step has hooks of its own then
        model, controller = make(0.0 if phase == "dense" else 0.5)
        optimizer = optimizer_class(model.parameters(), lr=0.01)
        if phase.startswith("resu"):
            rule = "sgd" if phase == "resu sgd" else "auto"
            controller.resurrect(rule=rule, freeze_active=phase == "resu frozen").__enter__()
        for step in range(3):
            optimizer.zero_grad()
            if with_closure:
                optimizer.step(lambda step=step: backward(model, step))
            else:
                backward(model, step)
                optimizer.step()
        return found(controller).clone()

    torch.testing.assert_close(run(optimizer_class), run(optim.SGD), rtol=1e-6, atol=0)


class Fails(optim.SGD):
    """Raises in its second step."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_that_raised_and_is_tried_again_counts_once():
    def run(optimizer_class):
        model, controller = make()
        optimizer = optimizer_class(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            try:
                optimizer.step()
            except RuntimeError:
                optimizer.step()
        return found(controller).clone()

    assert torch.equal(run(Fails), run(optim.SGD))


def test_two_steps_one_after_the_other_count_twice():
    model, controller = make()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    backward(model, 0)
    by_hand = ByHand()
    for _ in range(2):
        by_hand.observe(model.weight.grad)
        optimizer.step()
    by_hand.check(controller)


def test_every_evaluation_of_a_closure_counts():
    model, controller = make()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    by_hand = ByHand()

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        by_hand.observe(model.weight.grad)
        return loss

    optimizer.step(closure)
    by_hand.check(controller)

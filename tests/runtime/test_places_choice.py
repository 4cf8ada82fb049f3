"""Theta in a few places: the choice between the backward pass and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from resu_compile.config import ResurrectionConfig
from resu_compile.training import Cycle, Trainer, TrainingConfig
from tests.integration.test_invariants import Net, loss_of
from tests.runtime.places import begin, by_sorting, chosen_of, dense_gradients, sparse, step


@pytest.mark.parametrize("freeze", [True, False])
def test_the_choice_is_that_of_the_optimizer_and_clipping_sees_what_trains(freeze):
    early, late = sparse(), sparse()
    first = begin(early, freeze_active=freeze, rule="optimizer")
    second = begin(late, freeze_active=freeze, rule="optimizer")
    loss_of(early, 7).backward()
    whole = nn.utils.get_total_norm([p.grad for p in early.parameters()])
    first.choose_places()
    chosen = chosen_of(first)
    for name, weight in first.weights.items():
        grad = weight.parameter.grad
        trains = chosen[name] if freeze else chosen[name] | weight.mask
        assert (grad[~trains] == 0).all()
        assert (grad[trains] != 0).any() or not trains.any()
    assert nn.utils.clip_grad_norm_(early.parameters(), 1e9) < whole
    kept = {name: weight.parameter.grad.clone() for name, weight in first.weights.items()}
    first.choose_places()  # nothing is left to choose
    assert all(torch.equal(kept[n], w.parameter.grad) for n, w in first.weights.items())
    step(late, optim.SGD(late.parameters(), lr=0.0), 7)
    assert all(torch.equal(chosen[n], c) for n, c in chosen_of(second).items())


def test_overflowed_gradients_choose_nothing():
    model = sparse()
    controller = begin(model)
    loss_of(model, 1).backward()
    next(model.parameters()).grad[0, 0] = torch.inf
    controller.choose_places(loss_scale=1024.0)
    assert controller.resurrection.chosen == {}
    model.zero_grad()
    loss_of(model, 1).backward()
    controller.choose_places(loss_scale=1024.0)
    assert set(controller.resurrection.chosen) == set(controller.weights)


def test_it_does_nothing_in_other_phases():
    model = sparse()
    controller = begin(model, places=None)
    loss_of(model, 1).backward()
    before = [p.grad.clone() for p in model.parameters()]
    controller.choose_places()
    controller.commit()
    controller.choose_places()
    controller.set_phase("dense")
    controller.choose_places()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def _norms(monkeypatch):
    """Norms that clipping saw."""
    seen = []
    clip = nn.utils.clip_grad_norm_

    def watched(parameters, *args, **kwargs):
        seen.append(float(clip(parameters, *args, **kwargs)))
        return seen[-1]

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    return seen


@pytest.mark.parametrize("method", ["magnitude", "resu"])
def test_a_trainer_clips_what_trains(monkeypatch, method):
    """In a cycle of its own and in a training method alike."""
    seen = _norms(monkeypatch)
    torch.manual_seed(0)
    model = Net()
    config = TrainingConfig(
        steps=6,
        warmup=0.2,
        recovery=0.0,
        cycles=1,
        sparsity=0.6,
        method=method,
        clip_norm=1.0,
        schedule="constant",
        compile=False,
        log_every=1,
        resurrection=ResurrectionConfig(places=0.05),
    )
    trainer = Trainer(
        model, optim.SGD(model.parameters(), lr=0.0), lambda m, s: loss_of(m, s), config
    )
    expected = {}

    def loss_fn(model, seed):
        controller = trainer.cycle.controller
        running = controller.resurrection
        if running is not None and running.is_choosing:
            plain = dense_gradients(model, seed)
            for name, weight in controller.weights.items():
                keeps = weight.mask | by_sorting(plain[name], weight.mask, running.config.places)
                plain[name] = plain[name] * keeps
            expected[trainer.cycle.step_index] = float(nn.utils.get_total_norm(plain.values()))
        return loss_of(model, seed)

    trainer.loss_fn = trainer._stepper._loss_fn = loss_fn
    trainer.fit([0, 1, 2, 3, 4, 5])
    assert len(expected) == 1
    for index, norm in expected.items():
        assert seen[index] == pytest.approx(norm, rel=1e-5)


def test_a_loop_of_ones_own_clips_what_trains():
    torch.manual_seed(0)
    model = Net()
    theta = ResurrectionConfig(places=0.05)
    config = TrainingConfig(
        steps=8, cycles=2, sparsity=0.6, method="magnitude", compile=False, resurrection=theta
    )
    cycle, optimizer = Cycle(model, config).start(), optim.SGD(model.parameters(), lr=0.01)
    chosen = 0
    while not cycle.done:
        loss_of(model, cycle.step_index).backward()
        running = cycle.controller.resurrection
        choosing = running is not None and running.is_choosing
        assert cycle.after_backward()
        if choosing:
            chosen += 1
            for name, bits in chosen_of(cycle.controller).items():
                weight = cycle.controller.weights[name]
                assert (weight.parameter.grad[~(bits | weight.mask)] == 0).all()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    assert chosen == 2
    assert cycle.finish() is model

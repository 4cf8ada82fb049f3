"""Top-KAST against a loop in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import TopKAST
from tests.methods.runs import (
    WEIGHTS,
    assert_sparse,
    drive,
    loss_of,
    make_batches,
    make_model,
    make_run,
    one_step,
    state_of,
)


def largest(value, count):
    mask = torch.zeros(value.numel(), dtype=torch.bool)
    mask[value.abs().flatten().argsort(descending=True)[:count]] = True
    return mask.view_as(value)


def plain(model, *, steps, every, extra, penalty, lr, momentum):
    full = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    bias, buffers = model[0].bias, {name: torch.zeros_like(v) for name, v in full.items()}
    bias_buffer = torch.zeros_like(bias)
    batches = make_batches()
    for step in range(steps):
        if step % every == 0:
            forward = {n: largest(v, v.numel() // 4) for n, v in full.items()}
            backward = {n: largest(v, int((1 + extra) * (v.numel() // 4))) for n, v in full.items()}
            buffers = {n: torch.where(backward[n], b, 0.0) for n, b in buffers.items()}
        for name in WEIGHTS:
            model.get_parameter(name).data = torch.where(forward[name], full[name], 0.0)
        model.zero_grad()
        loss_of(model, batches[step % len(batches)]).backward()
        bias_buffer = momentum * bias_buffer + bias.grad
        bias.data -= lr * bias_buffer
        for name in WEIGHTS:
            strength = torch.where(forward[name], penalty, penalty / 0.25)
            grad = model.get_parameter(name).grad + strength * full[name]
            grad = torch.where(backward[name], grad, 0.0)
            buffers[name] = torch.where(backward[name], momentum * buffers[name] + grad, 0.0)
            full[name] = full[name] - lr * buffers[name]
    for name in WEIGHTS:
        model.get_parameter(name).data = torch.where(forward[name], full[name], 0.0)
    return forward, backward, full


@pytest.mark.parametrize("extra", [0.5, 1.0])
def test_equals_the_plain_loop(extra):
    options = {"extra": extra, "penalty": 0.05, "every": 3}
    run = make_run("top_kast", options=options)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.2, momentum=0.9)
    drive(run, optimizer)
    model = make_model()
    forward, backward, full = plain(
        model, steps=20, every=3, extra=extra, penalty=0.05, lr=0.2, momentum=0.9
    )
    for name in WEIGHTS:
        weight = run.controller.weights[name]
        assert torch.equal(weight.mask, forward[name])
        torch.testing.assert_close(run.master.value(name), full[name])
        torch.testing.assert_close(weight.parameter, model.get_parameter(name))
        state = optimizer.state[weight.parameter]["momentum_buffer"]
        assert not state[~backward[name]].any()
        assert state[backward[name] & ~forward[name]].any()
    assert sum(update.grown for update in run.updates) > 0


def test_outside_of_the_superset_nothing_moves():
    run = make_run("top_kast", options={"every": 100})
    model = make_model()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05, weight_decay=0.5)
    drive(run, optimizer)
    for name in WEIGHTS:
        first = model.get_parameter(name).detach()
        outside = ~largest(first, first.numel() // 2)
        assert torch.equal(run.master.value(name)[outside], first[outside])
        assert not torch.equal(run.master.value(name)[~outside], first[~outside])


def test_the_model_is_sparse_between_steps_and_all_is_dropped_at_the_end():
    run = make_run("top_kast", options={"every": 4}).start()
    optimizer = torch.optim.Adam(run.model.parameters(), lr=0.05)
    while not run.done:
        one_step(run, optimizer)
        assert_sparse(run)
        assert run.controller.sparsity == 0.75
    assert any(bool(value[~mask].any()) for mask, value in state_of(optimizer, run))
    run.finish()
    assert_sparse(run, optimizer)
    assert run.stats().training_flops == pytest.approx((0.25 + 0.25 + 0.5) / 3)


def test_a_wrong_setting_is_named():
    for name in ("extra", "penalty", "every"):
        with pytest.raises(ArgumentError, match=f"^{name}: expected"):
            TopKAST(**{name: -1})

"""RigL against a loop in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from resu_compile.methods import RigL
from tests.methods.runs import (
    WEIGHTS,
    assert_sparse,
    drive,
    loss_of,
    make_batches,
    make_model,
    make_run,
    one_step,
)


def plain_rigl(model, masks, *, steps, every, alpha, stop, lr, momentum):
    """Masks by hand: SGD with momentum, everything that is not active set to 0."""
    batches = make_batches()
    weights = {name: model.get_parameter(name) for name in WEIGHTS}
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    for name, weight in weights.items():
        weight.data[~masks[name]] = 0.0
    for step in range(steps):
        model.zero_grad()
        loss_of(model, batches[step % len(batches)]).backward()
        last = int(stop * steps)
        if step > 0 and step % every == 0 and step < last:
            fraction = alpha / 2 * (1 + math.cos(math.pi * min(step, last) / last))
            for name, weight in weights.items():
                old = masks[name]
                n_active = int(old.sum())
                magnitude = torch.where(old, weight.detach().abs(), -1.0).flatten()
                kept = torch.zeros_like(magnitude, dtype=torch.bool)
                kept[magnitude.argsort(descending=True)[: n_active - int(fraction * n_active)]] = 1
                growth = torch.where(kept, -1.0, weight.grad.abs().flatten())
                kept[growth.argsort(descending=True)[: int(fraction * n_active)]] = True
                masks[name] = kept.view_as(weight)
                weight.data[~(old & masks[name])] = 0.0
                buffers[weight][~(old & masks[name])] = 0.0
            continue
        for parameter, buffer in buffers.items():
            grad = parameter.grad.clone()
            for name, weight in weights.items():
                if weight is parameter:
                    grad[~masks[name]] = 0.0
            buffer.mul_(momentum).add_(grad)
            parameter.data -= lr * buffer
    return masks


@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_equals_the_plain_loop(alpha):
    run = make_run("rigl", options={"fraction": alpha, "every": 3}).start()
    model = make_model()
    first = {name: mask.clone() for name, mask in run.controller.masks.items()}
    masks = plain_rigl(
        model, first, steps=20, every=3, alpha=alpha, stop=0.75, lr=0.1, momentum=0.9
    )
    drive(run)
    for name in WEIGHTS:
        assert torch.equal(run.controller.masks[name], masks[name])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value)
    assert [update.step for update in run.updates] == [0, 3, 6, 9, 12]
    assert run.updates[1].grown > 0


def test_dense_gradients_on_update_steps_alone():
    run = make_run("rigl", options={"every": 4}).start()
    optimizer = torch.optim.Adam(run.model.parameters())
    seen = []
    batches = make_batches()
    while not run.done:
        loss_of(run.model, batches[0]).backward()
        weight = run.controller.weights["0.weight"]
        seen.append(bool(weight.parameter.grad[~weight.mask].any()))
        run.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    assert [step for step, dense in enumerate(seen) if dense] == [4, 8, 12]


def test_the_update_takes_the_place_of_the_step():
    run = make_run("rigl", options={"every": 4})
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1, weight_decay=0.5)
    drive(run, optimizer, until=4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    counted = float(optimizer.state[run.model[0].bias]["step"])
    loss_of(run.model, make_batches()[0]).backward()
    assert run.after_backward() is False
    optimizer.step()
    assert torch.equal(run.model[0].bias, before["0.bias"])
    assert float(optimizer.state[run.model[0].bias]["step"]) == counted
    for name in WEIGHTS:
        weight = run.controller.weights[name]
        kept = weight.mask & before[name].ne(0)
        assert torch.equal(weight.parameter[kept], before[name][kept])
    optimizer.zero_grad()
    run.after_step()
    one_step(run, optimizer)
    assert not torch.equal(run.model[0].bias, before["0.bias"])
    assert_sparse(run, optimizer)


def test_defaults_are_those_of_the_source():
    method = RigL()
    assert (method.fraction, method.every, method.stop, method.decay) == (0.3, 100, 0.75, "cosine")
    assert make_run("rigl").config.distribution == "erk"
    assert make_run("rigl", distribution="uniform").config.distribution == "uniform"

"""Gradual magnitude pruning against a loop in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import GMP
from resu_compile.methods.gmp import cubic_sparsity
from resu_compile.phase import Phase
from tests.methods.runs import (
    WEIGHTS,
    assert_sparse,
    drive,
    loss_of,
    make_batches,
    make_model,
    make_run,
)


def ramp(step, **changes):
    values = {"start": 10, "every": 5, "count": 4, "initial": 0.2, "final": 0.9}
    return cubic_sparsity(step, **{**values, **changes})


def test_the_ramp():
    assert ramp(0) == ramp(10) == pytest.approx(0.2)
    assert ramp(20) == pytest.approx(0.9 - 0.7 / 8)
    assert ramp(30) == ramp(99) == 0.9
    assert ramp(10, count=0) == 0.9


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_ramp_never_falls(first, second):
    assert ramp(min(first, second)) <= ramp(max(first, second))


def plain_gmp(model, *, steps, every, start, stop, sparsity, lr, returns):
    """Weights are masked in the forward pass; what is pruned keeps its value, or loses it."""
    batches = make_batches()
    full = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in full.items()}
    came_back = 0
    for step in range(1, steps + 1):
        model.zero_grad()
        for name in WEIGHTS:
            model.get_parameter(name).data = torch.where(masks[name], full[name], 0.0)
        loss_of(model, batches[(step - 1) % len(batches)]).backward()
        with torch.no_grad():
            model[0].bias -= lr * model[0].bias.grad
            for name in WEIGHTS:
                grad = model.get_parameter(name).grad
                full[name] = torch.where(masks[name], full[name] - lr * grad, full[name])
        if start <= step <= stop and (step - start) % every == 0:
            target = sparsity * (1 - (1 - (step - start) / (stop - start)) ** 3)
            for name in WEIGHTS:
                flat = full[name].abs().flatten()
                mask = torch.zeros_like(flat, dtype=torch.bool)
                mask[flat.argsort(descending=True)[: int((1 - target) * flat.numel())]] = True
                came_back += int((mask & ~masks[name].flatten()).sum())
                masks[name] = mask.view_as(masks[name])
                if not returns:
                    full[name] = torch.where(masks[name], full[name], 0.0)
    for name in WEIGHTS:
        model.get_parameter(name).data = torch.where(masks[name], full[name], 0.0)
    return masks, came_back


@pytest.mark.parametrize("returns", [True, False])
def test_equals_the_plain_loop(returns):
    settings = {"every": 2, "start": 4, "stop": 24, "returns": returns}
    run = make_run("gmp", steps=30, options=settings)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    drive(run, optimizer).finish()
    model = make_model()
    masks, came_back = plain_gmp(
        model, steps=30, every=2, start=4, stop=24, sparsity=0.75, lr=0.5, returns=returns
    )
    for name in WEIGHTS:
        assert torch.equal(run.controller.masks[name], masks[name])
        torch.testing.assert_close(run.model.get_parameter(name), model.get_parameter(name))
    assert (came_back > 0) is returns
    assert run.master is None
    assert_sparse(run, optimizer)


def test_counts_follow_the_ramp():
    run = make_run("gmp", steps=40, options={"every": 5, "start": 5, "stop": 35})
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05)
    run.start()
    found = []
    while not run.done:
        drive(run, optimizer, until=run.step + 1)
        found.append(run.controller.sparsity)
        if run.controller.phase is Phase.SPARSE:
            assert_sparse(run, optimizer)
    assert found == sorted(found)
    assert found[8] == 0.0
    assert found[9] > 0.3
    assert found[34] == found[-1] == 0.75
    assert [update.step for update in run.updates] == [10, 15, 20, 25, 30, 35]


def test_ended_early_it_prunes_to_the_end():
    run = drive(make_run("gmp", options={"every": 2}), until=10)
    assert 0.0 < run.controller.sparsity < 0.75
    run.finish()
    assert run.controller.sparsity == 0.75
    fresh = make_run("gmp").start()
    fresh.finish()
    assert fresh.controller.sparsity == 0.75
    assert fresh.controller.phase is Phase.SPARSE


@pytest.mark.parametrize("name", ["every", "start", "stop", "initial"])
def test_a_wrong_setting_is_named(name):
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        GMP(**{name: -1})


def test_returns_is_a_bool():
    with pytest.raises(ArgumentTypeError, match="^returns: expected a bool"):
        GMP(returns=1)

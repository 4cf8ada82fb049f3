"""SR-STE against a loop in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import SRSTE
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


def two_of_four(value):
    groups = value.abs().reshape(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.topk(2, dim=1).indices, True)
    return mask.view_as(value)


def a_quarter(value):
    mask = torch.zeros(value.numel(), dtype=torch.bool)
    mask[value.abs().flatten().topk(value.numel() // 4).indices] = True
    return mask.view_as(value)


@pytest.mark.parametrize(
    ("changes", "choose"),
    [({"pattern": "2:4", "sparsity": 0.5}, two_of_four), ({}, a_quarter)],
    ids=["2:4", "unstructured"],
)
def test_equals_the_plain_loop(changes, choose):
    run = make_run("sr_ste", options={"decay": 0.02}, **changes)
    optimizer = torch.optim.Adam(run.model.parameters(), lr=0.02)
    drive(run, optimizer)
    model, batches = make_model(), make_batches()
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(20):
        full = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
        masks = {name: choose(value) for name, value in full.items()}
        for name in WEIGHTS:
            model.get_parameter(name).data = full[name] * masks[name]
        plain.zero_grad()
        loss_of(model, batches[step % 5]).backward()
        for name in WEIGHTS:
            parameter = model.get_parameter(name)
            parameter.data = full[name]
            parameter.grad += 0.02 * ~masks[name] * full[name]
        plain.step()
    for name in WEIGHTS:
        value = model.get_parameter(name).detach()
        weight = run.controller.weights[name]
        assert torch.equal(weight.mask, choose(value))
        torch.testing.assert_close(run.master.value(name), value)
        torch.testing.assert_close(weight.parameter.detach(), value * choose(value))
    run.finish()
    assert_sparse(run, optimizer)


def test_the_pattern_holds_at_every_step():
    run = make_run("sr_ste", pattern="2:4", sparsity=0.5).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5, momentum=0.9)
    seen = set()
    while not run.done:
        one_step(run, optimizer)
        assert_sparse(run)
        mask = run.controller.masks["0.weight"]
        assert mask.view(-1, 4).sum(1).eq(2).all()
        seen.add(tuple(mask.flatten().tolist()))
    assert len(seen) > 1
    assert run.stats().training_flops == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_a_negative_decay():
    with pytest.raises(ArgumentError, match="^decay: expected"):
        SRSTE(decay=-1.0)

"""Training methods under an N:M pattern."""

from __future__ import annotations

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import get_training_method, training_method_names
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_batches, make_run, one_step

KEEP = [n for n in training_method_names() if get_training_method(n).keeps_pattern]


def test_which_methods_keep_one():
    assert KEEP == ["acdc", "one_shot", "resu", "rigl", "set", "snip", "sr_ste", "static"]


@pytest.mark.parametrize("name", [name for name in KEEP if name != "resu"])
def test_every_group_holds_n_of_m_whenever_it_is_sparse(name):
    options = {"every": 2, "fraction": 0.6} if name in ("rigl", "set") else {}
    run = make_run(name, options=options, pattern="1:4", sparsity=0.75).start()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05)
    while not run.done:
        one_step(run, optimizer)
        if run.controller.sparsity > 0.0:
            for mask in run.controller.masks.values():
                assert mask.view(-1, 4).sum(1).eq(1).all()
    run.finish()
    assert run.controller.sparsity == 0.75
    assert_sparse(run, optimizer)
    if name in ("rigl", "set"):
        assert run.stats().mean_churn > 0.0


def test_rigl_grows_the_largest_gradient_of_each_group():
    run = make_run("rigl", options={"every": 2, "fraction": 1.0}, pattern="1:4")
    drive(run, until=2)
    grads = {}
    after_backward = run.after_backward

    def watched():
        grads.update({name: run.model.get_parameter(name).grad.clone() for name in WEIGHTS})
        return after_backward()

    run.after_backward = watched
    before = run.controller.masks
    one_step(run, torch.optim.SGD(run.model.parameters(), lr=0.1), make_batches())
    for name in WEIGHTS:
        mask = run.controller.masks[name].view(-1, 4)
        lost = ~(before[name].view(-1, 4) & mask).any(1)
        best = grads[name].abs().view(-1, 4).argmax(1)
        assert lost.any()
        assert torch.equal(mask[lost].float().argmax(1), best[lost])


@pytest.mark.parametrize("name", sorted(set(training_method_names()) - set(KEEP)))
def test_the_others_say_so(name):
    with pytest.raises(ArgumentError, match=f"^pattern: expected None with method='{name}'"):
        make_run(name, pattern="1:4")

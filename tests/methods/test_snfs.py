import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.methods.snfs import shared_out
from tests.methods.runs import WEIGHTS, assert_sparse, drive, loss_of, make_batches, make_run


def test_shares_follow_the_claims():
    free = {"a": 100, "b": 100}
    assert shared_out(40, {"a": 3.0, "b": 1.0}, free) == {"a": 30, "b": 10}
    assert shared_out(5, {"a": 1.0, "b": 1.0}, free) == {"a": 3, "b": 2}  # the earlier one first
    assert shared_out(4, {"a": 0.0, "b": 0.0}, free) == {"a": 2, "b": 2}


def test_what_does_not_fit_goes_round_again():
    assert shared_out(120, {"a": 1.0, "b": 0.0}, {"a": 100, "b": 100}) == {"a": 99, "b": 21}
    assert shared_out(200, {"a": 1.0, "b": 0.0}, {"a": 100, "b": 100}) == {"a": 100, "b": 100}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 50)), min_size=1, max_size=6), st.data())
def test_the_sum_is_exact_and_nothing_overflows(layers, data):
    free = {str(i): count for i, (_, count) in enumerate(layers)}
    claims = {str(i): claim for i, (claim, _) in enumerate(layers)}
    total = data.draw(st.integers(0, sum(free.values())))
    found = shared_out(total, claims, free)
    assert sum(found.values()) == total
    assert all(0 <= found[name] <= free[name] for name in free)


def test_masks_follow_the_mean_gradient():
    """One update against the formulas, with the means kept by hand."""
    run = make_run("snfs", options={"every": 3}).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    means = {name: 0.0 for name in WEIGHTS}
    batches = make_batches()
    for step in range(3):
        loss_of(run.model, batches[step]).backward()
        for name in WEIGHTS:
            means[name] = 0.9 * means[name] + 0.1 * run.model.get_parameter(name).grad
            assert run.model.get_parameter(name).grad.ne(0).sum() > run.controller.weights[name].nnz
        run.after_backward()
        for weight in run.controller.weights.values():  # clipping sees what the optimizer gets
            assert not weight.parameter.grad[~weight.mask].any()
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            run.after_step()
    masks = run.controller.masks
    values = {name: run.model.get_parameter(name).detach().clone() for name in WEIGHTS}
    run.after_step()
    fraction = 0.005 + 0.495 * 0.5 * (1 + math.cos(math.pi * 3 / 15))
    counts = {name: math.ceil(fraction * int(masks[name].sum())) for name in WEIGHTS}
    free = {name: int((~masks[name]).sum()) + counts[name] for name in WEIGHTS}
    claims = {name: float(means[name].abs()[masks[name]].mean()) for name in WEIGHTS}
    grown = shared_out(sum(counts.values()), claims, free)
    for name in WEIGHTS:
        active = masks[name].flatten().nonzero().flatten().tolist()
        small = sorted(active, key=lambda i: values[name].flatten()[i].abs().item())
        kept = set(small[counts[name] :])
        others = [i for i in range(values[name].numel()) if i not in kept]
        large = sorted(others, key=lambda i: -means[name].flatten()[i].abs().item())
        expected = kept | set(large[: grown[name]])
        found = run.controller.masks[name].flatten().nonzero().flatten().tolist()
        assert set(found) == expected


@pytest.mark.parametrize("grow", ["momentum", "adam_momentum"])
def test_layers_differ_and_the_total_holds(grow):
    run = make_run("snfs", options={"every": 2, "grow": grow})
    optimizer = torch.optim.Adam(run.model.parameters(), lr=0.05)
    drive(run.start(), optimizer, until=14)
    assert ("square" in run.memory) is (grow == "adam_momentum")  # no more memory than it takes
    drive(run, optimizer)
    assert not {"mean", "square"} & set(run.memory)  # nothing grows any more
    counts = {name: weight.nnz for name, weight in run.controller.weights.items()}
    assert sum(counts.values()) == 48  # a quarter of 128 and of 64
    assert counts["0.weight"] != 32
    assert_sparse(run, optimizer)
    assert not run.controller.dense_gradients

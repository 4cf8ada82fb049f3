import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import MEST
from resu_compile.phase import Phase
from tests.methods.runs import assert_sparse, drive, make_run, one_step


def counts(run):
    return [weight.nnz for weight in run.controller.weights.values()]


def test_em_goes_through_a_sparser_mask_and_comes_back():
    """32 and 16 active: to 0.8 of that and back, then 0.9, then nothing."""
    run = make_run("mest", options={"every": 2}, steps=32).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    while not run.done:
        one_step(run, optimizer)
        assert counts(run) == [32, 16]
        assert_sparse(run, optimizer)
    grown = {update.step: update.grown for update in run.updates}
    # at most what was dropped: 32 - 25 and 16 - 12; of those, some come back at once
    assert 0 < grown[2] <= 11
    assert all(number <= 11 for step, number in grown.items() if 0 < step < 18)
    assert all(number <= 6 for step, number in grown.items() if 18 <= step < 24)
    assert grown[24] == 0


def test_em_and_s_is_denser_first_and_ends_at_the_sparsity():
    run = make_run("mest", options={"every": 2, "mode": "em&s"}, steps=32).start()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    seen = {}
    while not run.done:
        one_step(run, optimizer)
        seen[run.step] = counts(run)
    assert seen[1] == [32, 16]
    assert seen[2] == [32 + 16, 16 + 8]  # (1 - s) 0.5 of 128 and of 64
    assert seen[17] == seen[2]
    assert seen[18] == [32 + 8, 16 + 4]
    assert seen[24] == seen[32] == [32, 16]
    assert run.span.start == 26


def test_the_last_range_begins_even_without_an_update_there():
    run = drive(make_run("mest", options={"every": 7, "mode": "em&s"}, steps=32))
    assert counts(run) == [32, 16]
    assert [update.step for update in run.updates] == [0, 7, 14, 18, 21, 24]


def test_an_early_end_prunes_to_the_sparsity():
    run = drive(make_run("mest", options={"every": 2, "mode": "em&s"}, steps=32), until=10)
    assert counts(run) == [48, 24]
    run.finish()
    assert counts(run) == [32, 16]


def test_the_score_with_the_gradient_needs_no_dense_one():
    run = make_run("mest", options={"every": 2, "drop": "weight_and_gradient"}).start()
    while not run.done:
        assert not run.controller.dense_gradients
        one_step(run, torch.optim.SGD(run.model.parameters(), lr=0.1))
    assert counts(run) == [32, 16]
    assert run.controller.phase is Phase.SPARSE


@pytest.mark.parametrize(
    "changes",
    [{"ranges": (0.2, 0.1)}, {"ranges": (0.2, 0.1, 0.1)}, {"stages": (0.75, 0.5)}],
)
def test_ranges_that_do_not_end_at_the_sparsity(changes):
    with pytest.raises(ArgumentError, match="^ranges: expected one more than the"):
        MEST(**changes)


def test_an_unknown_mode():
    with pytest.raises(ArgumentError, match="^mode: expected one of em, em&s"):
        MEST(mode="ems")

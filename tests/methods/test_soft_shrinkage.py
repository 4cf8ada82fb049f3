import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import SoftShrinkage
from resu_compile.methods.gmp import cubic_sparsity
from resu_compile.phase import Phase
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_model, make_run


def test_the_smallest_lose_a_share():
    run = make_run("soft_shrinkage", options={"every": 5, "start": 5, "stop": 15, "shrink": 0.25})
    plain = make_run("one_shot", make_model(), options={"at": 19})
    drive(run, until=10)
    drive(plain, until=10)
    share = cubic_sparsity(10, start=5, every=5, count=2, initial=0.0, final=0.75)
    assert share == pytest.approx(0.75 * 0.875)  # and 0 at step 5
    for name in WEIGHTS:
        full = plain.model.get_parameter(name).detach()
        small = full.abs().flatten().argsort()[: full.numel() - int((1 - share) * full.numel())]
        expected = full.clone().flatten()
        expected[small] *= 0.75
        torch.testing.assert_close(run.model.get_parameter(name).flatten(), expected)
    assert run.controller.phase is Phase.DENSE


def test_it_ends_pruned():
    run = make_run("soft_shrinkage", options={"every": 2})
    optimizer = torch.optim.Adam(run.model.parameters(), lr=0.05)
    drive(run, optimizer, until=14)
    assert run.controller.phase is Phase.DENSE
    drive(run, optimizer)
    assert run.controller.sparsity == 0.75
    assert_sparse(run, optimizer)
    early = drive(make_run("soft_shrinkage"), until=3)
    early.finish()
    assert early.controller.sparsity == 0.75


def test_shrinking_all_of_it_is_zeroing():
    run = drive(
        make_run("soft_shrinkage", options={"every": 5, "start": 5, "shrink": 1.0}), until=10
    )
    zeros = sum(int((run.model.get_parameter(name) == 0).sum()) for name in WEIGHTS)
    assert zeros > 0


def test_a_wrong_setting_is_named():
    for name in ("shrink", "every", "start", "stop"):
        with pytest.raises(ArgumentError, match=f"^{name}: expected"):
            SoftShrinkage(**{name: -1})

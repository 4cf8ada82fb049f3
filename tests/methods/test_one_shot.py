import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import OneShot
from resu_compile.phase import Phase
from resu_compile.sparsity import topk_mask
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_model, make_run


def test_dense_then_the_largest():
    run = make_run("one_shot")
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05)
    drive(run, optimizer, until=9)
    assert run.controller.phase is Phase.DENSE
    dense = make_model()
    other = make_run("one_shot", dense, options={"at": 0.9})
    drive(other, torch.optim.AdamW(dense.parameters(), lr=0.05), until=10)
    drive(run, optimizer, until=10)
    for name in WEIGHTS:
        value = dense.get_parameter(name).detach()
        expected = topk_mask(value.abs(), value.numel() // 4)
        assert torch.equal(run.controller.masks[name], expected)
        assert torch.equal(run.model.get_parameter(name), torch.where(expected, value, 0.0))
    drive(run, optimizer)
    assert_sparse(run, optimizer)
    assert [update.step for update in run.updates] == [10]


def test_before_the_first_step_and_at_an_early_end():
    assert make_run("one_shot", options={"at": 0}).start().controller.sparsity == 0.75
    run = drive(make_run("one_shot"), until=3)
    run.finish()
    assert run.controller.sparsity == 0.75


def test_other_criteria():
    run = drive(make_run("one_shot", options={"criterion": "random"}))
    assert run.controller.sparsity == 0.75
    with pytest.raises(ArgumentError, match="^method: unknown method 'magnitud'"):
        OneShot(criterion="magnitud")
    with pytest.raises(ArgumentError, match="^at: expected"):
        OneShot(at=2.0)

import pytest
import torch

from resu_compile.distributions import er, erk
from tests.methods.runs import WEIGHTS, assert_sparse, drive, make_run


def test_the_mask_is_random_and_stays():
    run = make_run("static").start()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.05)
    first = run.controller.masks
    assert all(0 < int(first[name].sum()) < first[name].numel() for name in WEIGHTS)
    drive(run, optimizer)
    assert all(torch.equal(first[name], run.controller.masks[name]) for name in WEIGHTS)
    assert_sparse(run, optimizer)
    stats = run.stats()
    assert stats.updates == 1
    assert stats.ever_share == pytest.approx(1.0 - stats.sparsity)


def test_densities_by_distribution():
    shapes = {"0.weight": (16, 8), "2.weight": (4, 16)}
    for name, spread in (("erk", erk), ("er", er)):
        found = make_run("static", distribution=name).start().stats().densities
        expected = spread(shapes, 0.75)
        for weight, density in found.items():
            assert abs(density - (1.0 - expected[weight])) < 1 / 64
        assert found["2.weight"] > found["0.weight"]
    uniform = make_run("static", distribution="uniform").start().stats().densities
    assert set(uniform.values()) == {0.25}

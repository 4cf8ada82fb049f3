"""The tables of the sparse linear layer: what a cell holds, and kernels that are wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, linear_kernels, linear_table
from benchmarks.ceilings import Ceilings
from benchmarks.linear_table import add_rates, best_cells, limit_bytes, measure_cells, tables
from benchmarks.plot_performance import byte_limit, ceilings_of, cells_of
from benchmarks.shapes import SHAPES
from resu_compile.kernels.plan import Kernel

CEILINGS = Ceilings(read=4e9, copy=4e9, flop=1e12)
ITEMSIZE = harness.LINEAR_DTYPE.itemsize


@pytest.fixture
def small(monkeypatch):
    """A weight of a few kilobytes in both CUDA formats, which run anywhere; few repeats."""
    monkeypatch.setitem(SHAPES, "small", (48, 64))
    monkeypatch.setattr(linear_table, "KERNELS", {Kernel.ROWS: 2, Kernel.TILES: 64})
    monkeypatch.setattr(harness, "CPU_BUDGET_S", 0.001)
    return "small"


def cell(sparsity, rows, kernel, us, dense_us=10.0):
    moved = int(48 * 64 * ITEMSIZE * (1 - sparsity))
    shape = {"name": "small", "N": 48, "K": 64}
    measured = {"us": us, "bytes": moved, "speedup": dense_us / us}
    return {**shape, "M": rows, "sparsity": sparsity, "kernel": kernel, **measured}


def test_every_kernel_has_a_cell_where_it_is_timed(small):
    cells, failed = measure_cells(small, (0.5, 0.9), (1, 4))
    assert not failed
    sparse = [(c["M"], c["sparsity"], c["kernel"]) for c in cells if c["sparsity"]]
    assert sorted(sparse) == [
        (1, 0.5, "rows"),
        (1, 0.5, "tiles"),
        (1, 0.9, "rows"),
        (1, 0.9, "tiles"),
        (4, 0.5, "tiles"),  # rows is timed up to 2 rows of x here
        (4, 0.9, "tiles"),
    ]
    dense = [c for c in cells if not c["sparsity"]]
    assert [(c["M"], c["speedup"]) for c in dense] == [(1, 1.0), (4, 1.0)]


def test_a_kernel_that_is_wrong_has_no_cell(small, monkeypatch):
    right = linear_kernels.run_kernel

    def wrong(kernel, x, packed):
        y = right(kernel, x, packed)
        return y * 1.1 if kernel == Kernel.TILES else y

    monkeypatch.setattr(linear_kernels, "run_kernel", wrong)
    cells, failed = measure_cells(small, (0.5,), (1, 4))
    assert {c["kernel"] for c in cells if c["sparsity"]} == {"rows"}
    assert [what.split(":")[0] for what in failed] == [
        "small, M=1, tiles 50%",
        "small, M=4, tiles 50%",
    ]


def test_the_fastest_kernel_is_shown_and_a_missing_one_is_told(small, monkeypatch):
    monkeypatch.setattr(linear_table, "CUDA", True)
    cells = [
        cell(0.0, 1, "dense cublas", 10.0),
        cell(0.5, 1, "rows", 8.0),
        cell(0.5, 1, "tiles", 5.0),
        cell(0.0, 8, "dense cublas", 10.0),
    ]
    add_rates(cells, CEILINGS)
    found = tables(cells, CEILINGS, "command")
    assert found["sparse_linear.json"].rows == [
        [f"{small} 48x64", "dense, us", "10.0", "10.0"],
        ["", "50%", "2.00x T", "failed"],
    ]
    assert found["sparse_linear_bytes.json"].rows[1][2] == f"{ITEMSIZE / 2:.2f} T"
    assert found["sparse_linear_regimes.json"].rows[0] == ["M = 1-4", "2.00 / 2.00 / 2.00"]
    # what the plots read
    result = found["sparse_linear.json"]
    assert len(cells_of(result)) == 4
    assert ceilings_of(result)["read"] == CEILINGS.read
    assert byte_limit(cells, 0.5) == pytest.approx(48 * 64 * ITEMSIZE / limit_bytes(48 * 64, 0.5))


def test_rates_are_those_of_the_bytes_and_of_the_limit():
    one = cell(0.5, 2, "rows", 4.0)
    add_rates([one], CEILINGS)
    assert one["bytes_per_s"] == pytest.approx(one["bytes"] / 4e-6)
    assert one["limit_share"] == pytest.approx(limit_bytes(48 * 64, 0.5) / 4e9 / 4e-6)
    assert one["flop_per_s"] == pytest.approx(2 * 2 * 48 * 64 * 0.5 / 4e-6)


def test_the_best_cell_is_the_fastest():
    cells = [cell(0.5, 1, "rows", 8.0), cell(0.5, 1, "tiles", 5.0), cell(0.9, 1, "rows", 2.0)]
    best = best_cells(cells)
    assert {key[1]: found["kernel"] for key, found in best.items()} == {0.5: "tiles", 0.9: "rows"}


def test_a_product_is_checked():
    x, weight = torch.randn(3, 8).double(), torch.randn(4, 8).double()
    harness.check_product(x @ weight.t(), x, weight, "right")
    with pytest.raises(AssertionError, match="wrong: relative error"):
        harness.check_product(x @ weight.t() * 1.01, x, weight, "wrong")
    with pytest.raises(AssertionError, match="nan"):
        harness.check_product(torch.full((3, 4), float("nan")).double(), x, weight, "empty")

"""The sweep of random points: what it draws, what it counts, and one run of each mode."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_dispatch
from benchmarks.bench_dispatch import Point, noise_of, quantile, random_points, slower, summary
from resu_compile.kernels.plan import Kernel
from resu_compile.runtime import plan_cache

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes are for the CPU")


def point(plan_ms, kernel="CSR", again_ms=1.0):
    return Point(64, 64, 1, 0.9, kernel, 1.0, again_ms, plan_ms)


def test_random_points_are_in_range_and_repeatable():
    points = list(random_points(300, 7))
    assert points == list(random_points(300, 7)) != list(random_points(300, 8))
    low, high = bench_dispatch.SIZES
    for n, k, rows, sparsity in points:
        assert low <= n <= high
        assert low <= k <= high
        assert n * k <= bench_dispatch.MOST_NUMEL
        assert 1 <= rows <= bench_dispatch.MOST_ROWS
        assert 0.4 <= sparsity <= 0.99
    ragged = sum(n % 8 != 0 for n, *_ in points)
    assert 30 < ragged < 120


def test_only_more_than_noise_is_slower():
    points = [point(0.5), point(1.04), point(1.06)]
    assert slower(points, 0.05) == points[2:]
    assert noise_of([point(1.0, again_ms=1.0 + i / 1000) for i in range(21)]) == pytest.approx(
        0.019
    )


def test_quantiles():
    assert [quantile([4, 1, 3, 2], q) for q in (0, 0.5, 1)] == [1, 2.5, 4]


def test_summary_counts_lost_points_of_sparse_plans_alone():
    points = [point(0.5), point(2.0), point(3.0, "DENSE", again_ms=1.01), point(0.25)]
    text = summary(points)
    assert "4 points, noise" in text
    assert "a sparse kernel at 3, slower than dense by more than noise at 1" in text
    assert "speed-up where sparse: 5% 0.65x, 25% 1.25x, 50% 2.00x" in text


def test_a_sweep_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_dispatch, "CPU_BUDGET_S", 0.0)
    monkeypatch.setattr(
        bench_dispatch, "random_points", lambda *_: [(512, 512, 8, 0.98), (8, 8, 1, 0.5)]
    )
    plan_cache.set_cache_path(tmp_path / "times.json")
    try:
        result = bench_dispatch.sweep(2, 0, cuda_graphs=False)
    finally:
        plan_cache.set_cache_path(None)
    assert len(result.records) == 2
    assert result.records[1]["kernel"] == "DENSE"
    assert all(record["plan_ms"] > 0 for record in result.records)


def test_a_table_is_read_back(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_dispatch, "SHAPES", {"small": (96, 64), "same": (96, 64)})
    monkeypatch.setattr(bench_dispatch, "TABLE_SPARSITIES", (0.9,))
    monkeypatch.setattr("resu_compile.runtime.kernel_times.CPU_BUDGET_S", 0.0)
    path = tmp_path / plan_cache.SHIPPED[1]
    bench_dispatch.make_table(path, ("small", "same"), 60.0, unpack=True)
    monkeypatch.setattr(plan_cache, "DATA_FOLDER", tmp_path)
    plan_cache._shipped.cache_clear()
    plan_cache.set_cache_path(tmp_path / "none.json")
    try:
        cpu = torch.device("cpu")
        key = plan_cache.TimesKey.of(cpu, 96, 64, 0.9, torch.float32, cuda_graphs=False)
        found, sources = plan_cache.find(key, {1: {Kernel.DENSE, Kernel.CSR, Kernel.UNPACK}})
        assert found[1].keys() == {Kernel.DENSE, Kernel.CSR, Kernel.UNPACK}
        assert sources == ["shipped"]
        bench_dispatch.make_table(path, (), 60.0, unpack=True)  # entries that are there stay
        assert len(plan_cache.parse(path.read_text())) == 1
    finally:
        plan_cache.set_cache_path(None)
        plan_cache._shipped.cache_clear()

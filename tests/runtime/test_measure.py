"""Measured times: the cache in memory and on disk, the modes around a measurement, the buckets."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.kernels.sparse_linear import ALL_BUCKETS, BUCKET_ROWS, csr_unpack, has_sparse_path
from resu_compile.runtime import measure, stopwatch
from resu_compile.runtime.measure import (
    LinearTimes,
    clear_cache,
    linear_times,
    set_cache_path,
    sparse_buckets,
)
from tests.tolerances import EXACT

CPU = torch.device("cpu")
cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
pytestmark = pytest.mark.skipif(
    not has_sparse_path(CPU, torch.float32), reason="torch without MKL has no sparse path to time"
)


@pytest.fixture(autouse=True)
def cache_file(tmp_path):
    path = tmp_path / "folder" / "times.json"
    set_cache_path(path)
    yield path
    set_cache_path(None)


@pytest.fixture
def measured(monkeypatch):
    """Replaces the stopwatch; the list grows by one row count for each measurement."""
    rows_measured = []

    def fake(*key, **_):
        rows = key[-1]
        rows_measured.append(rows)
        return LinearTimes(1.0, rows / 32)  # sparse is faster below 32 rows

    monkeypatch.setattr(measure, "measure_linear", fake)
    return rows_measured


def times_of(rows=1, *, shape=(64, 96), sparsity=0.7, dtype=torch.float32, device=CPU):
    return linear_times(device, *shape, sparsity, dtype, rows)


# -- LinearTimes -----------------------------------------------------------------------------
def test_a_margin_for_noise():
    assert LinearTimes(1.0, 0.94).sparse_is_faster
    assert not LinearTimes(1.0, 0.96).sparse_is_faster
    assert not measure.NOT_MEASURED.sparse_is_faster


# -- measuring -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_measures(rows, dtype):
    times = times_of(rows, dtype=dtype)
    assert 0 < times.dense_ms < math.inf
    assert 0 < times.sparse_ms < math.inf


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 70000), (1000, 40)])
def test_sample_is_a_weight_and_its_csr(shape):
    weight, csr = stopwatch._sample(*shape, 0.8, torch.float32, CPU)
    assert weight.shape == shape
    assert_close(csr_unpack(csr, shape), weight, **EXACT)
    if weight.numel() > 10000:
        assert abs((weight == 0).float().mean() - 0.8) < 0.02


def test_large_weights_are_measured_on_their_first_rows(monkeypatch):
    monkeypatch.setattr(stopwatch, "CPU_MAX_FLOP", 2 * 16 * 64 * 512)
    monkeypatch.setattr(stopwatch, "wall_ms", lambda _: 1.0)
    sampled = []
    sample = stopwatch._sample
    monkeypatch.setattr(stopwatch, "_sample", lambda n, *a: sampled.append(n) or sample(n, *a))
    assert times_of(16, shape=(2048, 64)) == LinearTimes(4.0, 4.0)
    assert sampled == [512]


def test_the_fastest_counts_on_the_cpu(monkeypatch):
    clock = iter([5.0, 9.0, 1.0, 2.0, 7.0, 8.0] * 100)
    monkeypatch.setattr(stopwatch, "wall_ms", lambda _: next(clock))
    assert times_of() == LinearTimes(1.0, 2.0)


def test_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    times_of()
    assert_close(torch.get_rng_state(), before, **EXACT)


def test_under_fake_tensors_autocast_and_a_default_device():
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        times = times_of()
        assert type(torch.empty(1)).__name__ == "FakeTensor"  # the mode is back
    assert times.sparse_ms > 0


def test_under_a_trace():
    times = []

    def f(x):
        times.append(times_of())
        return x + 1

    graph = make_fx(f, tracing_mode="symbolic")(torch.ones(2))
    assert times[0].sparse_ms > 0
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_function", "output"]


def test_inside_a_backend():
    times = []

    def backend(gm, _):
        times.append(times_of())
        return gm.forward

    with torch.inference_mode():
        y = torch.compile(lambda x: x * 2, backend=backend)(torch.ones(3))
    assert y.tolist() == [2.0, 2.0, 2.0]
    assert times[0].sparse_ms > 0


@pytest.mark.parametrize(
    ("device", "dtype"),
    [(torch.device("meta"), torch.float32), (CPU, torch.int8), (CPU, torch.complex64)],
)
def test_no_sparse_kernel_is_not_measured(device, dtype, measured):
    times = times_of(dtype=dtype, device=device)
    assert math.isnan(times.dense_ms)
    assert not times.sparse_is_faster
    assert not measured


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (2**16, 2**15)])
def test_empty_and_huge_weights_are_not_measured(shape, measured):
    assert math.isnan(times_of(shape=shape).dense_ms)
    assert not measured


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_means_dense(error, monkeypatch, caplog, cache_file):
    def fake(*_, **__):
        raise error

    monkeypatch.setattr(measure, "measure_linear", fake)
    assert not times_of().sparse_is_faster
    assert "no memory to measure" in caplog.text
    assert not cache_file.exists()


def test_other_errors_are_not_hidden(monkeypatch):
    def fake(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(measure, "measure_linear", fake)
    with pytest.raises(RuntimeError, match="a bug"):
        times_of()


# -- the cache -------------------------------------------------------------------------------
def test_measured_once_per_key(measured):
    for rows in (4, 2, 7):  # one bucket
        times_of(rows)
    times_of(4, sparsity=0.7049)
    assert measured == [4]
    times_of(8)
    times_of(4, sparsity=0.71)
    times_of(4, shape=(96, 64))
    times_of(4, dtype=torch.float64)
    assert measured == [4, 16, 4, 4, 4]


def test_threads_are_part_of_the_key(measured, monkeypatch):
    times_of()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    times_of()
    assert len(measured) == 2


def test_full_sparsity_counts_as_99_percent(measured):
    times_of(sparsity=1.0)
    times_of(sparsity=0.99)
    assert len(measured) == 1


def test_kept_on_disk(measured, cache_file):
    first = times_of()
    set_cache_path(cache_file)  # as the next process: nothing in memory
    assert times_of() == first
    assert len(measured) == 1
    assert [p.name for p in cache_file.parent.iterdir()] == [cache_file.name]  # no temporary left
    content = json.loads(cache_file.read_text())
    assert list(content["times_ms"].values()) == [[1.0, 1 / 32]]


def test_two_processes_keep_both_entries(measured, cache_file):
    other = measure._Cache()
    other.move(cache_file)
    times_of()  # this process has read the file before the other writes
    other.put("theirs", LinearTimes(3.0, 4.0))
    times_of(16)
    set_cache_path(cache_file)
    times_of()
    times_of(16)
    assert measured == [1, 16]
    content = json.loads(cache_file.read_text())["times_ms"]
    assert len(content) == 3
    assert content["theirs"] == [3.0, 4.0]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"",
        b'{"format": "resu_compile linear ti',
        b"[1, 2]",
        b'{"a": 1}',
        json.dumps({"format": measure.FORMAT, "version": 99, "times_ms": {}}).encode(),
        json.dumps({"format": measure.FORMAT, "version": 1, "times_ms": []}).encode(),
        json.dumps({"format": measure.FORMAT, "version": 1, "times_ms": {"k": [1]}}).encode(),
        json.dumps({"format": measure.FORMAT, "version": 1, "times_ms": {"k": ["a", 1]}}).encode(),
        b'{"format": "resu_compile linear times", "version": 1, "times_ms": {"k": [NaN, 1]}}',
    ],
)
def test_a_corrupt_or_foreign_file_is_rebuilt(content, measured, cache_file, caplog):
    cache_file.parent.mkdir()
    cache_file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        times = times_of()
    assert f"{cache_file}: not usable, will be rebuilt" in caplog.text
    set_cache_path(cache_file)
    assert times_of() == times
    assert len(measured) == 1


def test_a_folder_that_cannot_be_written(measured, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    set_cache_path(tmp_path / "file" / "times.json")
    assert times_of() == times_of()
    assert len(measured) == 1
    assert "cannot keep measured times there" in caplog.text


def test_clear_cache(measured, cache_file):
    times_of()
    clear_cache()
    assert not cache_file.exists()
    times_of()
    assert len(measured) == 2


def test_default_path_is_the_users_cache():
    set_cache_path(None)
    assert measure._cache.path.parts[-2:] == ("resu_compile", "linear_times.json")


# -- buckets ---------------------------------------------------------------------------------
def buckets(threshold, *, rows=1, sparsity=0.7, shape=(128, 128), device=CPU):
    return sparse_buckets(device, *shape, sparsity, torch.float32, rows, threshold)


@pytest.mark.parametrize(
    ("threshold", "sparsity", "expected"),
    [
        (0.7, 0.7, ALL_BUCKETS),
        (0.71, 0.7, 0),
        (0.0, 0.0, ALL_BUCKETS),
        (0, 0.2, ALL_BUCKETS),
        (1.0, 0.99, 0),
        (1.0, 1.0, 0),
        (1, 1.0, 0),
    ],
)
def test_a_number_forces(threshold, sparsity, expected, measured):
    assert buckets(threshold, sparsity=sparsity) == expected
    assert buckets(threshold, sparsity=sparsity, rows=None) == expected
    assert not measured


def test_a_number_forces_nothing_where_there_is_no_kernel():
    assert buckets(0.5, device=torch.device("meta")) == 0
    assert buckets(0.5, shape=(2**16, 2**15)) == 0  # more entries than int32 counts


def test_auto_static_rows(measured):
    assert buckets("auto", rows=5) == 1 << 1
    assert buckets("auto", rows=40) == 0
    assert measured == [BUCKET_ROWS[1], BUCKET_ROWS[3]]


def test_auto_dynamic_rows(measured):
    assert buckets("auto", rows=None) == 0b111
    assert measured == [1, 4, 16, 64, 256]


def test_auto_measures_nothing_that_cannot_gain(measured):
    assert buckets("auto", sparsity=0.39) == 0
    assert buckets("auto", shape=(63, 64)) == 0
    assert not measured


@pytest.mark.parametrize(
    ("threshold", "error"),
    [("always", ArgumentError), (1.5, ArgumentError), (None, ArgumentTypeError)],
)
def test_bad_threshold(threshold, error):
    with pytest.raises(error, match=r"sparse_threshold: expected 'auto' or a number in \[0, 1\]"):
        buckets(threshold)


# -- CUDA ------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [pytest.param(rows, marks=cuda) for rows in (1, 16)])
def test_cuda_measures(rows):
    times = times_of(rows, shape=(1024, 4096), dtype=torch.bfloat16, device=torch.device("cuda"))
    assert 0 < times.dense_ms < 1
    assert 0 < times.sparse_ms < 1


@pytest.mark.parametrize("known", [pytest.param(known, marks=cuda) for known in (False, True)])
def test_cuda_launches_nothing_during_capture(known):
    device, x = torch.device("cuda"), torch.ones(8, device="cuda")
    before = times_of(device=device) if known else None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        times = times_of(device=device)
    assert times == before if known else math.isnan(times.dense_ms)

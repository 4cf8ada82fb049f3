"""Measuring: random weights as each kernel reads them, modes around a measurement, CUDA graphs."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from resu_compile.kernels.csr_linear import csr_unpack
from resu_compile.kernels.packed_linear import PackedLinear
from resu_compile.kernels.plan import Kernel
from resu_compile.runtime import kernel_times, stopwatch
from resu_compile.runtime.kernel_times import measure_kernels
from tests.tolerances import EXACT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DENSE, CSR, ROWS, TILES, UNPACK, SEMI = Kernel
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def times_of(wanted=None, *, shape=(64, 96), sparsity=0.7, dtype=torch.float32, **options):
    options = {"cuda_graphs": False, "pattern": None, "unpacked_from": CSR} | options
    return measure_kernels(CPU, *shape, sparsity, dtype, wanted or {1: {DENSE, CSR}}, **options)


def products(sparsity=0.8, dtype=torch.float32, pattern=None, in_features=96):
    return kernel_times._Products(in_features, sparsity, dtype, CPU, pattern, CSR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_measures_all_at_once(dtype):
    wanted = {1: {DENSE, CSR}, 300: {DENSE, CSR, UNPACK}, 9: {DENSE}}
    times = times_of(wanted, dtype=dtype)
    assert {rows: set(own) for rows, own in times.items()} == wanted
    assert all(0 < ms < math.inf for own in times.values() for ms in own.values())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (50, 70000), (1000, 40), (20000, 96)])
def test_every_kernel_multiplies_by_the_same_weight(shape):
    own = products(in_features=shape[1])
    (dense,) = own._make(DENSE, shape[0], copies=False)
    (csr,) = own._make(CSR, shape[0], copies=False)
    weight = dense.tensors[0]
    packed = PackedLinear.from_tensors(csr.tensors, csr.layout, tuple(csr.shape))
    assert weight.shape == shape
    assert_close(csr_unpack(packed.weights[CSR]), weight, **EXACT)
    if weight.numel() > 10000:
        assert abs((weight == 0).float().mean() - 0.8) < 0.02
    x = own.x(3)
    runs = {k: own.calls(k, x, shape[0], copies=False)[0]() for k in (DENSE, CSR, UNPACK)}
    assert_close(runs[CSR], runs[DENSE], rtol=1e-4, atol=1e-4)
    assert_close(runs[UNPACK], runs[DENSE], **EXACT)


def test_a_pattern_keeps_n_of_each_m():
    (dense,) = products(pattern=(2, 4))._make(DENSE, 32, copies=False)
    assert (dense.tensors[0].view(-1, 4) != 0).sum(1).unique().tolist() == [2]


def test_large_weights_are_measured_on_their_first_rows(monkeypatch):
    monkeypatch.setattr(kernel_times, "CPU_MAX_FLOP", 2 * 16 * 64 * 512)
    monkeypatch.setattr(stopwatch, "wall_ms", lambda _: 1.0)
    times = times_of({16: {DENSE, CSR}}, shape=(2048, 64))
    assert times == {16: {DENSE: 4.0, CSR: 4.0}}  # 512 of 2048 rows


def test_the_fastest_counts_on_the_cpu(monkeypatch):
    clock = iter([5.0, 9.0, 1.0, 2.0, 7.0, 8.0] * 100)
    monkeypatch.setattr(stopwatch, "wall_ms", lambda _: next(clock))
    assert times_of() == {1: {DENSE: 1.0, CSR: 2.0}}


@pytest.mark.parametrize(
    ("one_ms", "copies", "number"), [(0.01, 5, 20), (0.01, 64, 64), (0.5, 5, 4), (9.0, 2, 1)]
)
def test_short_products_run_often_and_long_ones_few_times(one_ms, copies, number, monkeypatch):
    monkeypatch.setattr(stopwatch, "device_ms", lambda _: one_ms)
    calls = [lambda: None for _ in range(copies)]
    enough = kernel_times.enough_calls(calls)
    assert len(enough) == number
    assert enough[: len(calls)] == calls[:number]  # no copy twice before the last


@pytest.mark.parametrize(("pattern", "sparsity"), [(None, 0.7), ((2, 4), 0.5)])
def test_random_weights_are_drawn_in_parts(monkeypatch, pattern, sparsity):
    monkeypatch.setattr(kernel_times, "RANDOM_AT_ONCE", 5 * 128)
    drawn = []
    own = products(sparsity, torch.bfloat16, pattern, in_features=128)
    uniform = own._uniform
    own._uniform = lambda rows: drawn.append(rows) or uniform(rows)
    mask, values = own._mask(64), own._random(64)
    assert drawn == 2 * [*12 * [5], 4]
    assert mask.dtype == torch.bool
    assert mask.logical_not().float().mean().item() == pytest.approx(sparsity, abs=0.02)
    assert values.dtype == torch.bfloat16
    assert len(values.unique(dim=0)) == len(mask.unique(dim=0)) == 64  # none is drawn twice
    if pattern:
        assert mask.view(-1, 4).sum(1).eq(2).all()


def test_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    times_of()
    assert_close(torch.get_rng_state(), before, **EXACT)


def test_under_fake_tensors_autocast_and_a_default_device():
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        times = times_of()
        assert type(torch.empty(1)).__name__ == "FakeTensor"  # the mode is back
    assert times[1][CSR] > 0


def test_under_a_trace():
    times = []

    def f(x):
        times.append(times_of())
        return x + 1

    graph = make_fx(f, tracing_mode="symbolic")(torch.ones(2))
    assert times[0][1][CSR] > 0
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_function", "output"]


def test_inside_a_backend():
    times = []

    def backend(gm, _):
        times.append(times_of())
        return gm.forward

    with torch.inference_mode():
        y = torch.compile(lambda x: x * 2, backend=backend)(torch.ones(3))
    assert y.tolist() == [2.0, 2.0, 2.0]
    assert times[0][1][CSR] > 0


# -- CUDA ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "graphs", [pytest.param(graphs, marks=needs_cuda) for graphs in (True, False)]
)
def test_cuda_measures(graphs):
    wanted = {rows: {DENSE, TILES, UNPACK} for rows in (1, 3, 64)}
    wanted[1] = {DENSE, ROWS, TILES, UNPACK}
    times = measure_kernels(
        CUDA, 1024, 4096, 0.8, torch.bfloat16, wanted,
        cuda_graphs=graphs, pattern=None, unpacked_from=TILES,
    )  # fmt: skip
    assert {rows: set(own) for rows, own in times.items()} == wanted
    assert all(0 < ms < 10 for own in times.values() for ms in own.values())


@pytest.mark.parametrize("rows", [pytest.param(8, marks=needs_cuda)])
def test_cuda_copies_are_beyond_l2(rows):
    own = kernel_times._Products(1024, 0.7, torch.float16, CUDA, None, TILES)
    calls = own.calls(DENSE, own.x(rows), 1024, copies=True)
    l2_bytes = torch.cuda.get_device_properties(CUDA).L2_cache_size
    assert len(calls) * 1024 * 1024 * 2 > l2_bytes
    assert len({call.func.tensors[0].data_ptr() for call in calls}) == len(calls)

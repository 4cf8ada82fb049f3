"""Plans: the rule on given times, what is measured at all, forced and released plans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.runtime import kernel_choice, kernel_times, plan_cache
from resu_compile.runtime.kernel_choice import fastest, smallest_batch, uncertain, worthwhile
from resu_compile.runtime.plans import Plan, choose_plan

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
DENSE, CSR, ROWS, TILES, UNPACK, SEMI = Kernel
NUMBER = len(BUCKET_ROWS)
ALL = frozenset({CSR, ROWS, TILES, SEMI})


@pytest.fixture(autouse=True)
def cache_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "times.json"
    plan_cache.set_cache_path(path)
    monkeypatch.setattr(plan_cache, "_shipped", dict)
    monkeypatch.setattr(plan_cache, "device_name", lambda device: f"some {device.type}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernel_choice, "has_csr_kernel", lambda *_: True)
    monkeypatch.setattr("resu_compile.kernels.semi_linear.is_supported", lambda *_: True)
    yield path
    plan_cache.set_cache_path(None)


@pytest.fixture
def measured(monkeypatch):
    """In place of the stopwatch: a table of rows -> kernel -> time; the list of what was asked."""
    asked = []

    def fake(device, n, k, sparsity, dtype, wanted, **_):  # noqa: ARG001
        asked.append({rows: set(kernels) for rows, kernels in wanted.items()})
        return {
            rows: {kernel: fake.time_of(rows, kernel) for kernel in kernels}
            for rows, kernels in wanted.items()
        }

    # cost by entries, by tiles, by bytes and FLOP: each kernel is best somewhere
    slopes = {DENSE: (10, 0.05), CSR: (1, 0.5), ROWS: (2, 1.5), TILES: (5, 0.1), UNPACK: (15, 0.05)}
    slopes[SEMI] = (7, 0.03)
    fake.time_of = lambda rows, kernel: slopes[kernel][0] + slopes[kernel][1] * rows
    monkeypatch.setattr(kernel_times, "measure_kernels", fake)
    fake.asked = asked
    return fake


def plan_of(rows=None, threshold="auto", *, device=CUDA, shape=(256, 128), sparsity=0.7, **options):
    dtype = options.pop("dtype", torch.bfloat16)
    return choose_plan(device, *shape, sparsity, dtype, rows, threshold, **options)


def by_rows(plan):
    return dict(zip(BUCKET_ROWS, plan.kernels, strict=True))


# -- Plan ------------------------------------------------------------------------------------
def test_formats_of_a_plan():
    kernels = [DENSE] * NUMBER
    assert Plan(tuple(kernels)).is_dense
    assert Plan(tuple(kernels)).needed == frozenset()
    kernels[3] = UNPACK
    plan = Plan(tuple(kernels), unpacked_from=CSR)
    assert not plan.is_dense
    assert plan.needed == {CSR}
    kernels[0] = ROWS
    assert Plan(tuple(kernels), unpacked_from=TILES).needed == {ROWS}  # any format unpacks


def test_wrong_plans():
    with pytest.raises(ArgumentError, match="kernels: expected one for each of the 10 batch"):
        Plan((DENSE,))
    with pytest.raises(ArgumentError, match="unpacked_from: expected a kernel with a packed"):
        Plan((DENSE,) * NUMBER, unpacked_from=UNPACK)


# -- the rule --------------------------------------------------------------------------------
def test_fastest_needs_the_margin():
    times = {DENSE: 1.0, ROWS: 0.98, TILES: 0.96}
    assert fastest(times, DENSE, ALL, 0.03) is TILES
    assert fastest(times, DENSE, ALL, 0.05) is DENSE
    assert fastest(times, DENSE, frozenset({ROWS}), 0.03) is DENSE
    assert fastest({}, DENSE, ALL, 0.03) is DENSE


def test_a_format_is_left_out_where_another_does_nearly_as_well():
    times = {0: {DENSE: 10, ROWS: 4.95, TILES: 5.0}, 5: {DENSE: 10, TILES: 8.0}}
    assert worthwhile(times, DENSE, 0.03) == {TILES}
    assert worthwhile(times, DENSE, 0.005) == {ROWS, TILES}
    assert worthwhile(times, DENSE, 0.03, frozenset({ROWS})) == {ROWS, TILES}
    times[5][TILES] = 9.9  # no gain there: the rows are enough
    assert worthwhile(times, DENSE, 0.03) == {ROWS}
    assert worthwhile({0: {DENSE: 1.0, ROWS: 0.99}}, DENSE, 0.03) == frozenset()
    assert worthwhile({}, DENSE, 0.03) == frozenset()


def test_a_format_is_needed_where_nothing_else_runs():
    assert worthwhile({0: {ROWS: 4.0, TILES: 5.0}}, UNPACK, 0.03) == {ROWS}
    assert worthwhile({0: {UNPACK: 9.0, ROWS: 4.0, TILES: 5.0}}, UNPACK, 0.03) == {ROWS}


TIMES = st.dictionaries(
    st.integers(0, NUMBER - 1),
    st.fixed_dictionaries(
        {DENSE: st.floats(0.1, 10)},
        optional={k: st.floats(0.1, 10) for k in (ROWS, TILES, SEMI)},
    ),
    min_size=1,
)


@settings(deadline=None, max_examples=200)
@given(TIMES, st.sampled_from([0.0, 0.03, 0.2]))
def test_no_format_is_packed_for_less_than_the_margin(times, margin):
    formats = worthwhile(times, DENSE, margin)

    def total(allowed):
        return {b: own[fastest(own, DENSE, allowed, margin)] for b, own in times.items()}

    chosen = total(formats)
    for bucket, own in times.items():
        kernel = fastest(own, DENSE, formats, margin)
        assert kernel is DENSE or own[kernel] < own[DENSE] * (1 - margin)
        assert chosen[bucket] <= own[DENSE]
    for kernel in formats:
        without = total(formats - {kernel})
        assert any(chosen[b] < without[b] * (1 - margin) for b in times)


# -- auto ------------------------------------------------------------------------------------
def test_auto_takes_the_fastest_at_every_batch_size(measured):
    plan = plan_of()
    assert by_rows(plan) == {
        1: ROWS, 2: ROWS, 4: TILES, 8: TILES, 16: TILES, 32: TILES, 64: TILES,
        128: DENSE, 256: DENSE, 512: DENSE,
    }  # fmt: skip
    assert plan.needed == {ROWS, TILES}
    assert plan.source == "measured"
    assert plan.times_ms[batch_bucket(2)] == {DENSE: 10.1, ROWS: 5.0, TILES: 5.2}
    few, many = {DENSE, ROWS, TILES}, {DENSE, TILES}
    assert measured.asked == [dict.fromkeys((1, 2, 4, 8), few) | dict.fromkeys((16, 32, 64), many)]


def test_auto_static_rows(measured):
    plan = plan_of(5)
    assert by_rows(plan) == {rows: TILES if rows == 8 else DENSE for rows in BUCKET_ROWS}
    assert plan.needed == {TILES}
    assert plan.times_ms == {batch_bucket(5): {DENSE: 10.25, ROWS: 9.5, TILES: 5.5}}
    assert [set(asked) for asked in measured.asked] == [{5}]  # at that very batch size
    large = plan_of(300)
    assert large.is_dense
    assert large.source == "not measured: no sparse kernel for 300 rows of x"
    assert len(measured.asked) == 1


def test_a_kernel_must_win_at_both_ends_of_a_bucket(measured):
    # tiles take a step at 17 rows, where dense has only begun to grow
    measured.time_of = lambda rows, kernel: {
        DENSE: 0.5 * rows, TILES: 6.0 if rows <= 16 else 9.0, ROWS: 99.0
    }[kernel]  # fmt: skip
    plan = plan_of()
    assert by_rows(plan) == {rows: TILES if rows == 64 else DENSE for rows in BUCKET_ROWS}
    assert measured.asked[1:] == [{9: {DENSE, TILES}, 17: {DENSE, TILES}}]
    assert plan.times_ms[batch_bucket(16)] == {DENSE: 8.0, TILES: 6.0}
    assert plan_of().source == "cache"
    assert len(measured.asked) == 2
    assert plan_of(16).kernels[batch_bucket(16)] is TILES


def test_nothing_more_is_measured_where_a_kernel_is_sure_to_win(measured):
    measured.time_of = lambda rows, kernel: 10.0 if kernel is DENSE else 5.0 + rows / 100
    plan_of()
    assert len(measured.asked) == 1


def test_what_cannot_be_measured_at_the_smallest_batch_is_dense(measured, monkeypatch):
    measured.time_of = lambda rows, kernel: rows if kernel is DENSE else 0.9 * rows
    measure = kernel_times.measure_kernels

    def fail_later(*args, **options):
        if measured.asked:
            raise MemoryError
        return measure(*args, **options)

    monkeypatch.setattr(kernel_times, "measure_kernels", fail_later)
    plan = plan_of()
    assert set(plan.kernels[:2]) == {ROWS}  # one row count each
    assert set(plan.kernels[2:]) == {DENSE}
    assert plan.source == "measured, not measured: out of memory"


def test_uncertain_kernels():
    times = {
        1: {DENSE: 4.0},
        2: {DENSE: 6.0, ROWS: 3.9, TILES: 4.1, CSR: 5.9},
        3: {DENSE: 9.0, ROWS: 8.9},
    }
    assert uncertain(times, DENSE, 0.03) == {2: {TILES}}
    assert uncertain({0: {DENSE: 2.0, ROWS: 1.0}, 1: {DENSE: 2.0, ROWS: 1.0}}, DENSE, 0.03) == {}
    assert [smallest_batch(bucket) for bucket in range(4)] == [1, 2, 3, 5]


def test_auto_on_the_cpu(measured):
    plan = plan_of(device=CPU, dtype=torch.float32)
    assert by_rows(plan) == {rows: CSR if rows <= 16 else DENSE for rows in BUCKET_ROWS}
    assert set(measured.asked[0]) == set(BUCKET_ROWS)
    assert plan.needed == {CSR}


def test_auto_with_2_of_4(measured):
    plan = plan_of(sparsity=0.5, pattern=(2, 4))
    assert by_rows(plan)[512] is SEMI
    assert SEMI in measured.asked[0][1]
    measured.asked.clear()
    plan_of(sparsity=0.25, pattern=(3, 4))  # no tensor core knows it
    plan_of(sparsity=0.5, pattern=(2, 4), dtype=torch.float32)
    assert not any(SEMI in kernels for asked in measured.asked for kernels in asked.values())
    plan_of(sparsity=0.75, pattern=(1, 4))  # which is a 2:4 mask too
    assert SEMI in measured.asked[-1][1]


def test_a_shape_without_a_2_of_4_kernel_is_measured_as_any_other(measured, monkeypatch):
    monkeypatch.setattr("resu_compile.kernels.semi_linear.is_supported", lambda *_: False)
    plan_of(pattern=(2, 4))
    assert not any(SEMI in kernels for kernels in measured.asked[0].values())
    assert plan_of().source == "cache"


def test_fp32_is_not_measured_on_tensor_core_tiles(measured):
    plan_of(dtype=torch.float32, sparsity=0.9)
    assert not any(TILES in kernels for kernels in measured.asked[0].values())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"sparsity": 0.39}, "not measured: less than 40% pruned"),
        ({"shape": (63, 64)}, "not measured: fewer than 64 * 64 elements"),
        ({"shape": (0, 64)}, "not measured: no sparse kernel"),
        ({"shape": (2**16, 2**15)}, "not measured: no sparse kernel"),
        ({"device": META}, "not measured: no sparse kernel"),
        ({"dtype": torch.float64}, "not measured: no sparse kernel"),
    ],
)
def test_not_measured(options, why, measured):
    plan = plan_of(**options)
    assert plan.is_dense
    assert plan.source.startswith(why)
    assert not plan.times_ms
    assert not measured.asked


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
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(kernel_times, "measure_kernels", fail)
    plan = plan_of()
    assert plan.is_dense
    assert plan.source == "not measured: out of memory"
    assert "no memory to measure the sparse kernels, it stays DENSE" in caplog.text
    assert not cache_file.exists()


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(kernel_times, "measure_kernels", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        plan_of()


def test_nothing_is_measured_during_capture(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan = plan_of()
    assert plan.is_dense
    assert plan.source == "not measured: the stream is being captured"
    assert not measured.asked


# -- the dense weight released ---------------------------------------------------------------
def test_released_weights_never_run_dense(measured):
    plan = plan_of(release_dense=True)
    assert by_rows(plan) == {
        1: ROWS, 2: ROWS, 4: TILES, 8: TILES, 16: TILES, 32: TILES, 64: TILES,
        128: UNPACK, 256: UNPACK, 512: UNPACK,
    }  # fmt: skip
    assert plan.times_ms[batch_bucket(128)] == {DENSE: 16.4, UNPACK: 21.4}
    assert measured.asked[0][128] == {DENSE, UNPACK}


def test_a_kernel_slower_than_dense_is_taken_if_it_beats_unpacking(measured):
    times = {DENSE: 1.0, ROWS: 2.0, TILES: 3.0, UNPACK: 4.0}
    measured.time_of = lambda _, kernel: times[kernel]
    assert by_rows(plan_of(release_dense=True))[4] is ROWS
    static = plan_of(4, release_dense=True)
    assert by_rows(static) == {rows: ROWS if rows == 4 else UNPACK for rows in BUCKET_ROWS}
    assert static.needed == {ROWS}
    assert plan_of(release_dense=True).needed == {ROWS, TILES}  # large batches expand the tiles


@pytest.mark.parametrize("threshold", [1.0, 0.8])
def test_released_weights_are_unpacked_where_the_threshold_says_dense(threshold, measured):
    plan = plan_of(threshold=threshold, release_dense=True)
    assert set(plan.kernels) == {UNPACK}
    assert plan.needed == {TILES}
    assert not measured.asked


def test_released_on_the_cpu(measured):
    plan = plan_of(device=CPU, dtype=torch.float32, release_dense=True, sparsity=0.6)
    assert set(plan.kernels) == {CSR, UNPACK}
    assert plan.needed == {CSR}
    assert measured.asked[0][1] == {DENSE, CSR, UNPACK}


@pytest.mark.parametrize(
    ("device", "sparsity", "dtype", "saved"),
    [
        (CPU, 0.49, torch.float32, False),  # 8 bytes an entry
        (CPU, 0.51, torch.float32, True),
        (CPU, 0.6, torch.bfloat16, False),  # 6 bytes an entry
        (CUDA, 0.15, torch.bfloat16, False),
        (CUDA, 0.25, torch.bfloat16, True),
    ],
)
@pytest.mark.usefixtures("measured")
def test_released_only_where_that_saves_memory(device, sparsity, dtype, saved):
    plan = plan_of(threshold=1.0, device=device, sparsity=sparsity, dtype=dtype, release_dense=True)
    assert plan.is_dense is not saved


def test_small_weights_are_not_released(measured):
    assert plan_of(shape=(63, 64), release_dense=True).is_dense
    assert not measured.asked


# -- a number --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("threshold", "sparsity", "is_dense"),
    [(0.7, 0.7, False), (0.71, 0.7, True), (0, 0.2, False), (1.0, 1.0, True), (1, 0.99, True)],
)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_number_forces(device, threshold, sparsity, is_dense, measured):
    assert plan_of(threshold=threshold, sparsity=sparsity, device=device).is_dense is is_dense
    assert not measured.asked


def test_what_a_number_forces():
    low, high = plan_of(threshold=0.5, sparsity=0.7), plan_of(threshold=0.5, sparsity=0.8)
    assert by_rows(low) == {rows: TILES if rows <= 64 else DENSE for rows in BUCKET_ROWS}
    assert by_rows(high)[4] is ROWS
    assert by_rows(high)[8] is TILES
    assert plan_of(3, 0.5, sparsity=0.8).needed == {ROWS}
    assert plan_of(100, 0.5).is_dense
    assert set(plan_of(threshold=0.5, device=CPU).kernels) == {CSR}
    assert plan_of(threshold=0.5).source == "forced by sparse_threshold=0.5"
    assert by_rows(plan_of(threshold=0.5, release_dense=True))[128] is UNPACK


def test_a_number_forces_nothing_where_there_is_no_kernel():
    assert plan_of(threshold=0.5, device=META).is_dense
    assert plan_of(threshold=0.5, shape=(2**16, 2**15)).is_dense


def test_why_a_number_leaves_dense():
    assert plan_of(threshold=1.0).source == "sparse_threshold=1.0 turns the sparse kernels off"
    assert plan_of(threshold=0.9).source == "sparsity 70.00% is under sparse_threshold=0.9"


@pytest.mark.parametrize(
    ("threshold", "error"),
    [
        ("fast", ArgumentError),
        (1.5, ArgumentError),
        (float("nan"), ArgumentError),
        (None, ArgumentTypeError),
        (True, ArgumentTypeError),
    ],
)
def test_wrong_thresholds(threshold, error):
    with pytest.raises(error, match=r"sparse_threshold: expected 'auto' or a number in \[0, 1\]"):
        plan_of(threshold=threshold)


# -- where times come from -------------------------------------------------------------------
def test_measured_once_then_from_the_cache(measured, cache_file):
    first = plan_of()
    assert first.source == "measured"
    plan_cache.set_cache_path(cache_file)  # as the next process
    again = plan_of()
    assert (again.kernels, again.times_ms) == (first.kernels, first.times_ms)
    assert again.source == "cache"
    assert plan_of(4).source == "cache"
    assert plan_of(dtype=torch.float16).source == "measured"
    assert len(measured.asked) == 2


def test_only_what_no_table_has_is_measured(measured, monkeypatch):
    key = plan_cache.TimesKey.of(CUDA, 256, 128, 0.7, torch.bfloat16, cuda_graphs=False)
    shipped = {rows: {DENSE: 9.0, ROWS: 8.0, TILES: 1.0, UNPACK: 9.5} for rows in (1, 2)}
    entries = {f"{key.device}|{key.text}": plan_cache.to_stored(key, shipped)}
    monkeypatch.setattr(plan_cache, "_shipped", lambda: entries)
    plan = plan_of()
    assert set(measured.asked[0]) == {4, 8, 16, 32, 64}
    assert plan.source == "shipped, measured"
    assert by_rows(plan)[1] is TILES
    assert plan.times_ms[0] == {DENSE: 9.0, ROWS: 8.0, TILES: 1.0}  # what was no candidate is left
    static = plan_of(1, release_dense=True)
    assert static.source == "shipped"
    assert static.times_ms == {0: shipped[1]}
    assert len(measured.asked) == 1


@pytest.mark.parametrize(("sparse_ms", "asked"), [(7.0, 0), (8.9, 1)])
def test_unpacking_is_measured_only_where_it_might_win(measured, monkeypatch, sparse_ms, asked):
    key = plan_cache.TimesKey.of(CUDA, 256, 128, 0.7, torch.bfloat16, cuda_graphs=False)
    known = {1: {DENSE: 9.0, ROWS: sparse_ms, TILES: 8.95}}
    entries = {f"{key.device}|{key.text}": plan_cache.to_stored(key, known)}
    monkeypatch.setattr(plan_cache, "_shipped", lambda: entries)
    plan = plan_of(1, release_dense=True)
    assert by_rows(plan)[1] is ROWS
    assert len(measured.asked) == asked
    assert plan.source == ("measured" if asked else "shipped")
    assert (plan.times_ms == {0: known[1]}) is (not asked)


def test_launches_are_part_of_what_is_measured(measured):
    assert plan_of(1, cuda_graphs=True).source == "measured"
    assert plan_of(1, cuda_graphs=False).source == "measured"
    assert len(measured.asked) == 2

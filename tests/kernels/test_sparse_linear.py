"""Sparse linear layer: storage, every path against the reference, buckets, autograd, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from resu_compile.errors import ArgumentError, ArgumentTypeError, WeightError
from resu_compile.kernels import sparse_linear as module
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.sparse_linear import (
    ALL_BUCKETS,
    BUCKET_ROWS,
    LaunchConfig,
    batch_bucket,
    csr_pack,
    csr_unpack,
    launch_config,
    pack_rows,
    sparse_linear,
    sparse_linear_autocast,
    sparse_linear_reference,
    sparse_linear_triton,
)
from tests.tolerances import EXACT, matmul_tolerance

CUDA = torch.cuda.is_available()
cuda = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

SHAPES = [  # (N, K)
    pytest.param((64, 64), id="even"),
    pytest.param((1, 1), id="one"),
    pytest.param((37, 101), id="ragged"),
    pytest.param((5, 300), id="long rows"),
    pytest.param((130, 7), id="short rows"),
]
KERNEL_SHAPES = [  # smaller: the interpreter runs a program for each row of the weight
    pytest.param((8, 64), id="even"),
    pytest.param((1, 1), id="one"),
    pytest.param((7, 101), id="ragged"),
    pytest.param((3, 300), id="long rows"),
    pytest.param((11, 7), id="short rows"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [  # of pack_rows: CPU, CUDA, CUDA with more than 65536 columns
    pytest.param({"row_multiple": 1, "narrow": False}, id="plain"),
    pytest.param({"row_multiple": 8, "narrow": True}, id="narrow"),
    pytest.param({"row_multiple": 8, "narrow": False}, id="wide"),
]
NARROW = {"row_multiple": 8, "narrow": True}


def make_weight(shape, dtype=torch.float32, device="cpu", sparsity=0.7, *, transposed=False):
    """A random weight with one empty row, where there are rows to spare."""
    out_features, in_features = shape
    weight = torch.randn(in_features, out_features, device=device, dtype=dtype)
    weight = weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) < sparsity, 0).t()
    if out_features > 1:
        weight[out_features // 2] = 0
    return weight if transposed else weight.contiguous()


def reference(x, csr, bias, shape):
    """The reference in float64, rounded once."""
    bias = None if bias is None else bias.double()
    y = sparse_linear_reference(x.double(), csr.ptr, csr.col, csr.val.double(), bias, shape)
    return y.to(x.dtype)


def call(x, weight, csr, bias=None, buckets=ALL_BUCKETS):
    return sparse_linear(x, weight, csr.ptr, csr.col, csr.val, bias, buckets)


# -- storage ---------------------------------------------------------------------------------
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_is_exact(shape, form, sparsity, transposed, device):
    weight = make_weight(shape, sparsity=sparsity, device=device, transposed=transposed)
    csr = pack_rows(weight, None, **form)
    assert_close(csr_unpack(csr, shape), weight, **EXACT)
    assert csr.ptr.dtype == torch.int32
    assert csr.col.dtype == (torch.int16 if form["narrow"] else torch.int32)
    assert csr.ptr.shape == (shape[0] + 1,)
    assert not (csr.ptr % form["row_multiple"]).any()
    assert csr.ptr[-1] == csr.col.numel() == csr.val.numel()


def test_pack_by_hand():
    weight = torch.tensor([[0.0, 5.0, 6.0], [0.0, 0.0, 0.0], [7.0, 0.0, 0.0]])
    csr = pack_rows(weight, None, row_multiple=1, narrow=False)
    assert csr.ptr.tolist() == [0, 2, 2, 3]
    assert csr.col.tolist() == [1, 2, 0]
    assert csr.val.tolist() == [5.0, 6.0, 7.0]
    padded = pack_rows(weight, None, row_multiple=2, narrow=True)
    assert padded.ptr.tolist() == [0, 2, 2, 4]
    assert padded.col.tolist() == [1, 2, 0, 0]
    assert padded.val.tolist() == [5.0, 6.0, 7.0, 0.0]


def test_mask_decides_what_is_kept():
    weight = torch.randn(6, 10)
    weight[0, 0] = 0  # active by the mask, though its value is 0
    mask = torch.rand(6, 10) < 0.5
    mask[0, 0] = True
    csr = csr_pack(weight, mask)
    assert csr.val.numel() == mask.sum()
    assert_close(csr_unpack(csr, (6, 10)), weight.where(mask, 0), **EXACT)


def test_sixteen_bit_columns_reach_65535(device):
    weight = torch.zeros(2, 65536, device=device)
    weight[0, 65535], weight[0, 0], weight[1, 40000] = 1.0, 2.0, 3.0
    csr = pack_rows(weight, None, **NARROW)
    assert_close(csr_unpack(csr, (2, 65536)), weight, **EXACT)


def test_size_bytes(device):
    csr = csr_pack(torch.ones(3, 16, device=device))
    entry = 4 + (2 if CUDA else 4)
    assert csr.size_bytes == 4 * 4 + 48 * entry


@pytest.mark.parametrize(
    ("weight", "mask", "error", "message"),
    [
        (torch.ones(4), None, WeightError, "expected a floating point matrix"),
        (torch.ones(2, 2, dtype=torch.int32), None, WeightError, "got torch.int32"),
        (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), ArgumentError, r"shape \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), ArgumentError, "expected torch.bool"),
    ],
)
def test_pack_refuses(weight, mask, error, message):
    with pytest.raises(error, match=message):
        csr_pack(weight, mask)


def test_pack_refuses_more_entries_than_int32_counts(monkeypatch):
    monkeypatch.setattr(module, "MAX_ENTRIES", 6)
    with pytest.raises(WeightError, match="fewer than 6 entries to keep, got 6"):
        csr_pack(torch.ones(2, 3))


# -- buckets ---------------------------------------------------------------------------------
def test_batch_bucket():
    table = {0: 0, 1: 0, 2: 1, 7: 1, 8: 2, 31: 2, 32: 3, 127: 3, 128: 4, 511: 4, 512: 5, 10**6: 5}
    assert {rows: batch_bucket(rows) for rows in table} == table
    assert [batch_bucket(rows) for rows in BUCKET_ROWS] == list(range(len(BUCKET_ROWS)))


@pytest.mark.parametrize("rows", [1, 7, 8, 31, 32, 128, 512])
def test_the_bit_of_the_bucket_picks_the_path(rows, device):
    csr = csr_pack(make_weight((8, 24), device=device))
    other = torch.zeros(8, 24, device=device)  # tells the paths apart: only dense reads it
    x = torch.randn(rows, 24, device=device)
    bit = 1 << batch_bucket(rows)
    assert call(x, other, csr, buckets=bit).any()
    assert not call(x, other, csr, buckets=ALL_BUCKETS & ~bit).any()


def test_without_a_sparse_kernel_it_is_dense(monkeypatch, device):
    monkeypatch.setattr(module, "has_sparse_path", lambda *_: False)
    csr = csr_pack(make_weight((8, 24), device=device))
    other = torch.randn(8, 24, device=device)
    x = torch.randn(2, 24, device=device)
    assert_close(call(x, other, csr), F.linear(x, other))


# -- the op against the reference ------------------------------------------------------------
@pytest.mark.parametrize(
    ("transposed", "with_bias"), [(False, True), (True, False)], ids=["(out, in)", "(in, out)"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_op_matches_reference(shape, dtype, with_bias, transposed, device):
    weight = make_weight(shape, dtype, device, transposed=transposed)
    bias = torch.randn(shape[0], dtype=dtype, device=device) if with_bias else None
    csr = csr_pack(weight)
    for rows in range(1, 41) if dtype == torch.float32 else (1, 2, 3, 8, 37):
        x = torch.randn(rows, shape[1], dtype=dtype, device=device)
        expected = reference(x, csr, bias, shape)
        tolerance = matmul_tolerance(dtype, shape[1])
        assert_close(call(x, weight, csr, bias), expected, **tolerance)
        if rows in (1, 5, 40):
            # the dense path is torch's own product, which may round sums in less than fp32
            dense = F.linear(x, weight, bias)
            assert_close(call(x, weight, csr, bias, buckets=0), dense, **tolerance)


@pytest.mark.parametrize("buckets", [0, ALL_BUCKETS])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(24), id="vector"),
        pytest.param(torch.randn(2, 3, 24), id="3d"),
        pytest.param(torch.randn(3, 2, 24).transpose(0, 1), id="batch transposed"),
        pytest.param(torch.randn(24, 9).t(), id="columns first"),
        pytest.param(torch.randn(1, 24).expand(4, 24), id="expanded"),
        pytest.param(torch.randn(5, 48)[:, ::2], id="strided"),
        pytest.param(torch.randn(0, 24), id="no rows"),
        pytest.param(torch.randn(2, 0, 24), id="no rows 3d"),
    ],
)
def test_leading_dimensions_and_strides(x, buckets, device):
    x = x.to(device)
    weight, bias = make_weight((10, 24), device=device), torch.randn(10, device=device)
    y = call(x, weight, csr_pack(weight), bias, buckets)
    assert y.shape == (*x.shape[:-1], 10)
    assert y.is_contiguous()
    assert_close(y, F.linear(x, weight, bias), **matmul_tolerance(torch.float32, 24))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (4, 8)])
def test_nothing_stored(shape, device):
    weight = torch.zeros(shape, device=device)
    bias = torch.randn(shape[0], device=device)
    x = torch.randn(3, shape[1], device=device)
    assert_close(call(x, weight, csr_pack(weight), bias), bias.expand(3, -1), **EXACT)


def test_formats_of_the_other_device_are_read_too(device):
    weight = make_weight((12, 40), device=device)
    x = torch.randn(5, 40, device=device)
    for form in FORMATS:
        csr = pack_rows(weight, None, **form.values[0])
        assert_close(call(x, weight, csr), F.linear(x, weight), **matmul_tolerance(x.dtype, 40))


def test_csr_is_read_silently(recwarn, device):
    weight = make_weight((4, 8), device=device)
    call(torch.randn(2, 8, device=device), weight, csr_pack(weight))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ArgumentError, r"expected x of shape \(\.\.\., 8\)"),
        ({"x": torch.ones(())}, ArgumentError, r"got \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, ArgumentTypeError, "expected x of a floating"),
        ({"weight": torch.ones(4)}, ArgumentError, r"expected weight of shape \(N, K\)"),
        ({"ptr": torch.zeros(4, dtype=torch.int32)}, ArgumentError, r"shape \(5,\), got"),
        ({"ptr": torch.zeros(5)}, ArgumentError, "expected ptr torch.int32"),
        ({"col": torch.zeros(3)}, ArgumentError, "expected col torch.int16 or torch.int32"),
        ({"val": torch.zeros(3)}, ArgumentError, "like col"),
        ({"bias": torch.zeros(3)}, ArgumentError, r"expected bias of shape \(4,\), got \(3,\)"),
    ],
)
def test_bad_input(change, error, message):
    weight = make_weight((4, 8))
    csr = csr_pack(weight)
    inputs = {"x": torch.ones(2, 8), "weight": weight, "bias": None}
    inputs |= {"ptr": csr.ptr, "col": csr.col, "val": csr.val, "sparse_buckets": 0}
    with pytest.raises(error, match=message):
        sparse_linear(**(inputs | change))


# -- Triton ----------------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_triton_matches_reference(shape, dtype, form, device):
    weight = make_weight(shape, dtype, device)
    bias = torch.randn(shape[0], dtype=dtype, device=device)
    csr = pack_rows(weight, None, **form)
    for rows, b in ((1, bias), (1, None), (2, None), (3, bias), (16, None), (37, bias)):
        x = torch.randn(rows, shape[1], dtype=dtype, device=device)
        y = sparse_linear_triton(x, csr.ptr, csr.col, csr.val, b)
        assert_close(y, reference(x, csr, b, shape), **matmul_tolerance(dtype, shape[1]))


@needs_triton
def test_triton_sixteen_bit_columns_reach_65535(device):
    weight = torch.zeros(2, 65536, device=device)
    weight[0, 65535], weight[0, 0], weight[1, 40000] = 1.0, 2.0, 3.0
    csr = pack_rows(weight, None, **NARROW)
    x = torch.randn(2, 65536, device=device)
    for rows in (1, 2):
        y = sparse_linear_triton(x[:rows], csr.ptr, csr.col, csr.val, None)
        assert_close(y, F.linear(x[:rows], weight))


@needs_triton
@pytest.mark.parametrize("vector_loads", [False, True])
@pytest.mark.parametrize("block_m", [1, 4])
@pytest.mark.parametrize("block_e", [32, 128])
def test_every_launch_config(block_e, block_m, vector_loads, device):
    weight = make_weight((6, 300), device=device)
    csr = pack_rows(weight, None, **NARROW)
    config = LaunchConfig(block_e, block_m, num_warps=2, vector_loads=vector_loads)
    for rows in (1, 4, 6):  # also: several tiles of x, the last one ragged
        x = torch.randn(rows, 300, device=device)
        y = sparse_linear_triton(x, csr.ptr, csr.col, csr.val, None, config=config)
        assert_close(y, F.linear(x, weight), **matmul_tolerance(x.dtype, 300))


@needs_triton
@pytest.mark.parametrize("rows", [1, 3])
def test_triton_writes_only_its_output(rows, device):
    weight, bias = make_weight((5, 20), device=device), torch.randn(5, device=device)
    csr = pack_rows(weight, None, **NARROW)
    x = torch.randn(rows, 20, device=device)
    buffer = torch.full(((rows + 2) * 5,), 7.0, device=device)
    out = buffer[5:-5].view(rows, 5)
    assert sparse_linear_triton(x, csr.ptr, csr.col, csr.val, bias, out) is out
    assert_close(out, F.linear(x, weight, bias), **matmul_tolerance(x.dtype, 20))
    assert_close(buffer[:5], torch.full_like(buffer[:5], 7.0), **EXACT)
    assert_close(buffer[-5:], torch.full_like(buffer[-5:], 7.0), **EXACT)


@needs_triton
def test_triton_reads_only_its_rows(device):
    """Entries before, between and after the rows hold NaN: a bound that is off shows."""
    weight = make_weight((4, 40), device=device)
    csr = pack_rows(weight, None, row_multiple=1, narrow=False)
    nan = torch.full((9,), torch.nan, device=device)
    val = torch.cat([nan, csr.val, nan])
    col = torch.nn.functional.pad(csr.col, (9, 9))
    x = torch.randn(3, 40, device=device)
    for rows in (1, 3):
        y = sparse_linear_triton(x[:rows], csr.ptr + 9, col, val, None)
        assert_close(y, F.linear(x[:rows], weight), **matmul_tolerance(x.dtype, 40))


@pytest.mark.parametrize("path", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_rows_of_x_do_not_touch_each_other(path, device):
    weight = make_weight((6, 40), device=device)
    csr = pack_rows(weight, None, **(NARROW if path == "triton" else FORMATS[0].values[0]))
    x = torch.randn(3, 40, device=device)
    clean = F.linear(x, weight)
    x[1] = torch.nan
    if path == "triton":
        y = sparse_linear_triton(x, csr.ptr, csr.col, csr.val, None)
    else:
        y = call(x, weight, csr)
    assert_close(y[[0, 2]], clean[[0, 2]], **matmul_tolerance(x.dtype, 40))


def test_launch_config_fits_the_row():
    assert launch_config(1, 1229 * 4096, 4096) == LaunchConfig(256, 1, 1, vector_loads=True)
    assert launch_config(1, 102 * 1024, 1024).block_e == 128
    assert launch_config(1, 7168 * 4096, 4096).num_warps == 2
    assert launch_config(5, 1229 * 4096, 4096) == LaunchConfig(128, 8, 1, vector_loads=False)
    assert launch_config(1000, 1229 * 4096, 4096) == LaunchConfig(32, 32, 1, vector_loads=False)
    assert launch_config(1, 0, 0).block_e == 32


# -- operator --------------------------------------------------------------------------------
@pytest.mark.parametrize("with_grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize(
    ("rows", "transposed", "with_bias", "buckets"),
    [(1, False, True, ALL_BUCKETS), (3, True, False, ALL_BUCKETS), (3, True, True, 0)],
)
def test_opcheck(rows, transposed, with_bias, buckets, with_grad, device):
    weight = make_weight((6, 10), device=device, transposed=transposed)
    csr = csr_pack(weight)
    x = torch.randn(10, rows, 2, device=device).permute(2, 1, 0)
    bias = torch.randn(6, device=device) if with_bias else None
    for tensor in (x, weight, bias):
        if tensor is not None:
            tensor.requires_grad_(with_grad)
    inputs = (x, weight, csr.ptr, csr.col, csr.val, bias, buckets)
    torch.library.opcheck(torch.ops.resu_compile.sparse_linear.default, inputs)


def test_gradients_are_those_of_the_dense_product(device):
    weight = make_weight((5, 7), torch.float64, device).requires_grad_()
    csr = csr_pack(weight)
    x = torch.randn(2, 3, 7, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: call(a[0], a[1], csr, a[2], 0), (x, weight, bias))
    out = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    sparse = torch.autograd.grad(call(x, weight, csr, bias), (x, weight, bias), out)
    dense = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), out)
    for ours, theirs in zip(sparse, dense, strict=True):
        assert_close(ours, theirs)


def test_one_graph_serves_every_batch_size():
    weight = make_weight((16, 24))
    csr = csr_pack(weight)
    only_small = 1 << 1  # 2..7 rows
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def model(x, dense):
        return call(x, dense, csr, buckets=only_small)

    zeros = torch.zeros_like(weight)  # tells the paths apart
    with torch.no_grad():
        for rows in (3, 8, 5, 100, 2, 7):
            x = torch.randn(rows, 24)
            torch._dynamo.mark_dynamic(x, 0)
            expected = F.linear(x, weight) if rows < 8 else torch.zeros(rows, 16)
            assert_close(model(x, zeros), expected, **matmul_tolerance(x.dtype, 24))
    assert counter.frame_count == 1


# -- autocast --------------------------------------------------------------------------------
@pytest.mark.parametrize("buckets", [0, ALL_BUCKETS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_as_linear(enabled, dtype, buckets, device):
    weight, bias = make_weight((6, 40), device=device), torch.randn(6, device=device)
    csr = csr_pack(weight)
    x = torch.randn(3, 40, device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        y = sparse_linear_autocast(x, weight, csr.ptr, csr.col, csr.val, bias, buckets)
        expected = F.linear(x, weight, bias)
    assert y.dtype == expected.dtype == (dtype if enabled else torch.float32)
    assert_close(y, expected, **matmul_tolerance(y.dtype, 40))


def test_autocast_leaves_float64_alone(device):
    weight = make_weight((6, 40), torch.float64, device)
    csr = csr_pack(weight)
    x = torch.randn(3, 40, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = sparse_linear_autocast(x, weight, csr.ptr, csr.col, csr.val, None, ALL_BUCKETS)
    assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("buckets", [0, ALL_BUCKETS])
def test_the_op_itself_ignores_autocast(buckets, device):
    weight = make_weight((6, 40), device=device)
    x = torch.randn(3, 40, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = call(x, weight, csr_pack(weight), buckets=buckets)
    assert_close(y, F.linear(x, weight), **matmul_tolerance(torch.float32, 40))


def test_autocast_is_read_while_tracing():
    weight = make_weight((6, 40))
    csr = csr_pack(weight)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def model(x):
        return sparse_linear_autocast(x, weight, csr.ptr, csr.col, csr.val, None, ALL_BUCKETS)

    x = torch.randn(3, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = model(x), F.linear(x, weight)
    assert_close(y, expected, **matmul_tolerance(torch.bfloat16, 40))


# -- CUDA ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param(dtype, shape, marks=cuda)
        for dtype, shape in itertools.product(DTYPES, [(1024, 4096), (333, 14337), (64, 70000)])
    ],
    ids=str,
)
def test_cuda_sizes(dtype, shape):
    weight = make_weight(shape, dtype, "cuda")
    bias = torch.randn(shape[0], dtype=dtype, device="cuda")
    csr = csr_pack(weight)
    assert csr.col.dtype == (torch.int16 if shape[1] <= 65536 else torch.int32)
    for rows in (1, 2, 5, 8, 16, 31, 64, 300):
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
        expected = reference(x, csr, bias, shape)
        assert_close(call(x, weight, csr, bias), expected, **matmul_tolerance(dtype, shape[1]))


@pytest.mark.parametrize("rows", [pytest.param(rows, marks=cuda) for rows in (1, 8)])
def test_cuda_graph_capture(rows):
    weight = make_weight((512, 1024), torch.bfloat16, "cuda")
    csr = csr_pack(weight)
    x = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
    call(x, weight, csr)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, weight, csr)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(y, call(x, weight, csr), **EXACT)

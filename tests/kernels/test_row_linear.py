"""The product with a weight packed by rows: reference, Triton and CUDA C++ against float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import FOLDER
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.row_linear import (
    row_launch,
    row_linear,
    row_linear_cuda,
    row_linear_reference,
)
from resu_compile.kernels.row_linear_triton import row_linear_triton
from resu_compile.kernels.row_weight import pack_rows
from tests.tolerances import matmul_tolerance

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SOURCES = ("row_group", "row_linear")
SHARED = 227 * 1024  # bytes: an H100 or H200

triton_test = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
cuda_test = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")


def make(shape, rows, dtype, sparsity, *, weight_dtype=None, **options):
    """x, weight with zeros, packed weight and bias."""
    out_features, in_features = shape
    weight = torch.randn(shape, device=DEVICE).to(weight_dtype or dtype)
    mask = torch.rand(shape, device=DEVICE) >= sparsity
    mask[out_features // 2] = False
    mask[-1] = True
    packed = pack_rows(weight, mask, **options)
    x = torch.randn(rows, in_features, device=DEVICE).to(dtype)
    bias = torch.randn(out_features, device=DEVICE).to(dtype)
    return x, torch.where(mask, weight, torch.zeros_like(weight)).to(dtype), packed, bias


def assert_product(y, x, weight, bias, activation="none"):
    expected = x.double() @ weight.double().t()
    if bias is not None:
        expected = expected + bias.double()
    expected = apply_activation(expected, activation)
    tolerance = matmul_tolerance(x.dtype, x.shape[1] + 2)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, **tolerance)


# -- reference -------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference_is_the_dense_product(dtype, activation):
    x, weight, packed, bias = make((37, 130), 3, dtype, 0.8)
    assert_product(row_linear_reference(x, packed, bias, activation), x, weight, bias, activation)
    assert_product(row_linear(x, packed, None, activation), x, weight, None, activation)


def test_values_and_bias_are_rounded_to_the_dtype_of_x():
    x, weight, packed, bias = make((9, 64), 2, torch.bfloat16, 0.5, weight_dtype=torch.float32)
    y = row_linear(x, packed, bias.float() + 1e-4, "none")
    assert_product(y, x, weight, (bias.float() + 1e-4).bfloat16())


def test_no_rows_of_x():
    packed = pack_rows(torch.ones(3, 4, device=DEVICE))
    assert row_linear(torch.ones(0, 4, device=DEVICE), packed, None).shape == (0, 3)


def test_bad_arguments():
    packed = pack_rows(torch.ones(3, 4, device=DEVICE))
    for x in (torch.ones(2, 5), torch.ones(4), torch.ones(2, 4).int()):
        with pytest.raises(ArgumentError, match=r"x: expected a floating point matrix \(M, 4\)"):
            row_linear(x.to(DEVICE), packed, None)
    with pytest.raises(ArgumentError, match="activation: expected one of"):
        row_linear(torch.ones(2, 4, device=DEVICE), packed, None, "tanh")
    with pytest.raises(ArgumentError, match="x: expected device"):
        row_linear(torch.ones(2, 4, device="meta"), packed, None)


# -- Triton ----------------------------------------------------------------------------------
@triton_test
@pytest.mark.parametrize(
    ("shape", "rows", "sparsity", "options"),
    [
        pytest.param((9, 200), 1, 0.7, {"blocks": 2, "gap_bits": 4}, id="one"),
        pytest.param((11, 1000), 3, 0.9, {"blocks": 4, "gap_bits": 8}, id="ragged"),
        pytest.param((3, 70_001), 2, 0.999, {"blocks": 1, "gap_bits": 8}, id="wide"),
        pytest.param((5, 40), 9, 0.3, {"blocks": 5, "gap_bits": 4}, id="two-tiles"),
    ],
)
def test_triton_matches_float64(shape, rows, sparsity, options):
    x, weight, packed, bias = make(shape, rows, torch.float32, sparsity, **options)
    poisoned = torch.full((rows + 2, shape[0]), torch.nan, device=DEVICE)
    y = row_linear_triton(x, packed, bias, "none", poisoned[1:-1])
    assert_product(y, x, weight, bias)
    assert poisoned[[0, -1]].isnan().all()


@triton_test
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_dtypes_and_activations(weight_dtype, activation):
    # fp32 to bf16 is cut off, not rounded, by Triton's interpreter: fp16 instead
    dtype = torch.float16 if weight_dtype == torch.float32 else weight_dtype
    x, weight, packed, bias = make((7, 90), 2, dtype, 0.6, blocks=2, weight_dtype=weight_dtype)
    y = row_linear_triton(x, packed, bias, activation)
    assert_product(y, x, weight, bias, activation)


@triton_test
def test_triton_compiles_for_hopper():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_row_linear"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(": sm_90" in line for line in lines)


# -- CUDA C++ --------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64])
def test_launches_fit_the_device(rows):
    for in_features in (1, 100, 4096, 14336, 60_000, 200_000):
        for capacity, room in ((32, 1), (832, 32), (8992, 110), (40_000, 300)):
            launch = row_launch(rows, in_features, 2, capacity, room, SHARED)
            assert launch is not None
            warps = launch.threads // 32
            assert launch.rows in (1, 2, 4, 8)
            assert launch.threads <= 1024
            assert (warps - 1) * launch.steps * 32 < capacity <= warps * launch.steps * 32
            assert launch.sums_at - launch.ends_at > 4 * room
            behind = launch.shared_bytes - launch.sums_at
            assert behind >= (room + warps + 1) * 32 * launch.rows * 4
            assert launch.shared_bytes <= SHARED
            if launch.raw_rows:
                cell = 4 if launch.rows == 1 else 2 * launch.rows
                assert launch.ends_at == 128 << launch.log_q
                assert (1 << launch.log_q) * (128 // cell) >= in_features
                assert behind >= 2 * launch.raw_rows * in_features


def test_more_rows_of_x_share_the_weight_where_they_fit():
    assert [row_launch(m, 4096, 2, 832, 32, SHARED).rows for m in (1, 2, 3, 8, 9)] == [
        1,
        2,
        4,
        8,
        8,
    ]
    wide = row_launch(8, 14336, 2, 832, 32, SHARED)
    assert (wide.rows, wide.raw_rows) == (4, 2)
    assert row_launch(8, 70_001, 2, 832, 32, SHARED).raw_rows == 0


def test_sums_beyond_shared_memory_have_no_launch():
    assert row_launch(1, 64, 2, 32, 5000, SHARED) is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("rows", [1, 4])
def test_sums_stay_in_registers(rows, tmp_path):
    defines = {"X_KIND": 2, "W_KIND": 2, "RM": rows, "RAW_ROWS": rows, "GAP_BITS": 8}
    defines |= {"WIDE_BASE": 0, "STAGED": 1, "MAX_THREADS": 1024}
    source = tmp_path / "row_linear.cu"
    source.write_text("".join((FOLDER / f"{name}.cu").read_text() for name in SOURCES))
    done = subprocess.run(
        ["nvcc", "-arch=sm_90", "-cubin", "-std=c++17", "-Xptxas", "-v"]
        + [f"-D{name}={value}" for name, value in defines.items()]
        + [str(source), "-o", str(source.with_suffix(".cubin"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr


# Few variants of the kernel, since each takes 0.2 to 0.5 s to compile. The number of rows decides
# how many are multiplied at once, and K whether x is in shared memory.
CASES = {
    "one": ((1, 1), 0.0, {"blocks": 1, "gap_bits": 8}, (1, 8)),
    "ragged": ((257, 1001), 0.9, {"blocks": 16, "gap_bits": 8}, range(1, 10)),
    "aligned": ((300, 4096), 0.7, {"gap_bits": 8}, (1, 2, 4, 7)),
    "narrow-gaps": ((40, 4096), 0.5, {"blocks": 1, "gap_bits": 4}, (1, 9)),
    "short-rows": ((700, 96), 0.8, {"blocks": 9, "gap_bits": 4}, (1, 8)),
    "x-in-halves": ((64, 14336), 0.95, {"blocks": 3, "gap_bits": 8}, (1, 8)),
    "x-not-in-shared-memory": ((5, 70_001), 0.99, {"blocks": 2, "gap_bits": 8}, (3,)),
}


@pytest.mark.cuda
@cuda_test
@pytest.mark.parametrize(
    ("case", "rows"), [(case, rows) for case, (*_, many) in CASES.items() for rows in many]
)
def test_cuda_matches_float64(case, rows):
    shape, sparsity, options, _ = CASES[case]
    x, weight, packed, bias = make(shape, rows, torch.bfloat16, sparsity, **options)
    poisoned = torch.full((rows + 2, shape[0]), torch.nan, device=DEVICE, dtype=x.dtype)
    y = row_linear_cuda(x, packed, bias, "none", poisoned[1:-1])
    assert y is not None
    assert_product(y, x, weight, bias)
    assert poisoned[[0, -1]].isnan().all()
    assert torch.equal(y, row_linear_cuda(x, packed, bias, overlap=False))  # the same sums


@pytest.mark.cuda
@cuda_test
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "rows"),
    [
        (torch.float16, torch.float16, 8),
        (torch.float32, torch.float32, 3),
        (torch.bfloat16, torch.float32, 4),
        (torch.float16, torch.bfloat16, 1),
        (torch.float32, torch.float16, 2),
    ],
    ids=str,
)
def test_cuda_rounds_the_weight_to_the_dtype_of_x(dtype, weight_dtype, rows):
    x, weight, packed, bias = make((130, 600), rows, dtype, 0.8, weight_dtype=weight_dtype)
    y = row_linear_cuda(x, packed, bias)
    assert y is not None
    assert_product(y, x, weight, bias)


@pytest.mark.cuda
@cuda_test
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_activations(activation):
    x, weight, packed, bias = make((130, 600), 4, torch.bfloat16, 0.8, gap_bits=8)
    y = row_linear(x.t().contiguous().t(), packed, bias, activation)
    assert_product(y, x, weight, bias, activation)
    assert_product(row_linear(x, packed, None, activation), x, weight, None, activation)


@pytest.mark.cuda
@cuda_test
def test_cuda_takes_x_at_any_address():
    x, weight, packed, bias = make((130, 4096), 2, torch.bfloat16, 0.8, gap_bits=8)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert shifted.data_ptr() % 16
    assert_product(row_linear(shifted, packed, bias), x, weight, bias)


@pytest.mark.cuda
@cuda_test
def test_cuda_graph_follows_its_inputs():
    x, weight, packed, bias = make((512, 2048), 2, torch.bfloat16, 0.9, gap_bits=8)
    row_linear(x, packed, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = row_linear(x * 2, packed, bias, "silu")
        y = row_linear(hidden.repeat(1, 4), packed, None)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        assert_product(hidden, x * 2, weight, bias, "silu")
        assert_product(y, hidden.repeat(1, 4), weight, None)


@pytest.mark.cuda
@cuda_test
def test_triton_is_compiled_and_matches_float64():
    x, weight, packed, bias = make((257, 1001), 3, torch.bfloat16, 0.9, gap_bits=8)
    assert_product(row_linear_triton(x, packed, bias, "gelu"), x, weight, bias, "gelu")

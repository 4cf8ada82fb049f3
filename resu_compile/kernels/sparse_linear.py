"""Sparse linear layer for inference: the weight stored by rows, as its kept entries only.

    y[m, n] = sum_{ptr[n] <= e < ptr[n + 1]} val[e] * x[m, col[e]]  (+ bias[n])

Which of sparse and dense is faster depends on the number of rows of ``x``, so the op carries both
and one bit for each range of rows; a graph compiled once takes the faster path at every batch size.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError, WeightError
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl

BUCKET_ROWS = (1, 4, 16, 64, 256, 1024)  # the row count that stands for each bucket
ALL_BUCKETS = (1 << len(BUCKET_ROWS)) - 1

ROW_MULTIPLE = 8  # entries: 16 bytes of u16 columns, so that a row starts on a 128-bit boundary
NARROW_COLUMNS = 1 << 16  # up to here a column fits 16 bits
MAX_ENTRIES = 2**31 - 2**16  # entry numbers, a tile past the end included, are int32

# Rows of x in one MKL product. Its dense operand, (K, rows), has to stay in L2: on a 2-core Zen 5
# (1 MB of L2 a core), fp32 4096x4096 at 70 % and 256 rows, 70.3 ms in one piece, 35.4 ms by 32,
# 41.9 ms by 16. Row counts that are no multiple of 4 are padded: 3 rows 2.6 ms, as 4 rows 1.9 ms.
CPU_ROWS = 32
CPU_ROW_MULTIPLE = 4


def batch_bucket(rows: int) -> int:
    """Bucket of a row count: 1 -> 0, 2..7 -> 1, 8..31 -> 2, 32..127 -> 3, 128..511 -> 4, more -> 5.

    Bucket ``i`` is the range around ``4 ** i`` that two bits of the row count span. Dense time
    hardly moves below 8 rows and sparse time is near to linear, so a factor of 4 resolves the
    crossing well enough.

    Args:
        rows: product of the leading dimensions of ``x``, >= 0; 0 counts as 1.
    """
    return min(max(rows, 1).bit_length() // 2, len(BUCKET_ROWS) - 1)


@dataclass(frozen=True)
class CsrWeight:
    """Kept entries of an ``(N, K)`` weight, row after row, columns ascending.

    On CUDA a row is padded with column 0, value 0 to a multiple of ``ROW_MULTIPLE`` entries, which
    lets the kernel read 16 bytes at a time. The padding multiplies ``x[:, 0]`` by 0, as the dense
    product does at every pruned place.

    Attributes:
        ptr: int32, ``[N + 1]``; row ``n`` owns the entries ``ptr[n]`` to ``ptr[n + 1] - 1``.
        col: ``[entries]``; int16 holding the bits of a uint16 on CUDA where ``K <= 65536``,
            else int32.
        val: ``[entries]``, dtype of the weight.
    """

    ptr: Tensor
    col: Tensor
    val: Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of the three tensors together."""
        return sum(t.numel() * t.element_size() for t in (self.ptr, self.col, self.val))


def csr_pack(weight: Tensor, mask: Tensor | None = None) -> CsrWeight:
    """Exact row storage of the kept entries of ``weight``, in the format of its device.

    Args:
        weight: floating point, ``(N, K)``, any strides (``[in, out]`` parameters come transposed).
        mask: bool, ``(N, K)``, True = kept; None keeps what is not 0.

    Raises:
        WeightError: if ``weight`` is not a floating point matrix, or has 2**31 - 2**16 entries
            or more to keep.
        ArgumentError: if ``mask`` is not a bool tensor of the shape of ``weight``.
    """
    if weight.is_cuda:
        narrow = weight.dim() == 2 and weight.shape[1] <= NARROW_COLUMNS
        return pack_rows(weight, mask, row_multiple=ROW_MULTIPLE, narrow=narrow)
    return pack_rows(weight, mask, row_multiple=1, narrow=False)


def pack_rows(weight: Tensor, mask: Tensor | None, *, row_multiple: int, narrow: bool) -> CsrWeight:
    """``csr_pack`` with the format spelled out; ``narrow`` stores 16-bit columns."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise WeightError(
            f"weight: expected a floating point matrix (N, K), "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise ArgumentError(
            f"mask: expected torch.bool of shape {tuple(weight.shape)} like weight, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    weight = weight.detach()
    kept = weight != 0 if mask is None else mask
    out_features, in_features = weight.shape
    counts = kept.sum(1)  # (N,), int64
    padded = (counts + (row_multiple - 1)) // row_multiple * row_multiple
    ptr = F.pad(padded.cumsum(0), (1, 0))  # (N + 1,)
    entries = int(ptr[-1])
    if entries >= MAX_ENTRIES:
        raise WeightError(
            f"weight: expected fewer than {MAX_ENTRIES} entries to keep, got {entries}; "
            "leave this weight dense or split it"
        )
    columns = torch.arange(in_features, dtype=torch.int32, device=weight.device)
    col = columns.expand(out_features, in_features)[kept]  # (nnz,), row-major for any strides
    val = weight[kept]
    if entries != col.numel():
        first = ptr[:-1] - F.pad(counts.cumsum(0), (1, 0))[:-1]  # padding before each row
        place = torch.arange(col.numel(), device=weight.device)
        place += first.repeat_interleave(counts, output_size=col.numel())
        col = col.new_zeros(entries).index_copy_(0, place, col)
        val = val.new_zeros(entries).index_copy_(0, place, val)
    return CsrWeight(ptr.to(torch.int32), col.to(torch.int16) if narrow else col, val)


def csr_unpack(csr: CsrWeight, shape: tuple[int, int]) -> Tensor:
    """The dense ``(N, K)`` weight that ``csr`` stores, 0 where nothing was kept."""
    counts = csr.ptr.diff().to(torch.int64)
    row = torch.arange(shape[0], device=csr.val.device).repeat_interleave(counts)
    col, val = _wide(csr.col[: row.numel()]).long(), csr.val[: row.numel()]  # room at the end
    # accumulate: padding adds 0 to column 0 instead of overwriting it
    return val.new_zeros(shape).index_put_((row, col), val, accumulate=True)


def _wide(col: Tensor) -> Tensor:
    """Columns as int32, whatever the format."""
    return col.to(torch.int32) & 0xFFFF if col.dtype == torch.int16 else col


# -- reference -------------------------------------------------------------------------------
def sparse_linear_reference(
    x: Tensor, ptr: Tensor, col: Tensor, val: Tensor, bias: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Plain PyTorch meaning of the sparse path: the dense product with the unpacked weight."""
    weight = csr_unpack(CsrWeight(ptr, col, val), shape).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


# -- CPU -------------------------------------------------------------------------------------
@functools.cache
def _silence_csr_beta_warning() -> None:
    """Use up torch's once-per-process warning that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(2, dtype=torch.int32, device="cpu")
        value = torch.zeros(0, device="cpu")
        torch.sparse_csr_tensor(index, index[:0], value, (1, 1), check_invariants=False)


def sparse_linear_cpu(
    x: Tensor, ptr: Tensor, col: Tensor, val: Tensor, bias: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """The product through MKL, ``(M, K) -> (M, N)``; fp16 and bf16 compute in fp32.

    MKL is several times faster on row-major operands, hence the transposed copies on both sides
    (fp32 4096x4096 at 70 %, 16 rows, 2-core Zen 5: 2.7 ms; with transposed views 15 ms).
    """
    _silence_csr_beta_warning()
    dtype, (out_features, in_features) = x.dtype, shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # val and bias may be wider than x under autocast: round to the dtype of x first, as dense does
    values = val.to(dtype).to(compute)
    bias = None if bias is None else bias.to(dtype).to(compute)
    matrix = torch.sparse_csr_tensor(ptr, _wide(col), values, shape, check_invariants=False)
    rows = x.shape[0]
    y = x.new_empty(rows, out_features)
    if rows == 1:
        product = torch.mv(matrix, x[0].to(compute).contiguous())
        torch.add(product, 0 if bias is None else bias, out=y[0])
        return y
    for start in range(0, rows, CPU_ROWS):
        part = x[start : start + CPU_ROWS]
        count = part.shape[0]
        columns = count if count <= 2 else cdiv(count, CPU_ROW_MULTIPLE) * CPU_ROW_MULTIPLE
        x_t = x.new_empty(in_features, columns, dtype=compute)
        x_t[:, :count].copy_(part.t())
        x_t[:, count:].zero_()  # dropped again, but leftovers may be denormal and slow
        y_t = x.new_empty(out_features, columns, dtype=compute)
        torch.mm(matrix, x_t, out=y_t)
        product = y_t[:, :count].t()
        torch.add(product, 0 if bias is None else bias, out=y[start : start + count])
    return y


# -- Triton ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of one launch, all powers of two.

    Attributes:
        block_e: entries of a row in one step.
        block_m: rows of x in a program; a gather brings that many neighbours of x transposed.
        num_warps: warps that share a row of the weight.
        vector_loads: read columns and values 8 at a time. Needs rows padded to ``ROW_MULTIPLE``,
            which 16-bit columns stand for.
    """

    block_e: int
    block_m: int
    num_warps: int
    vector_loads: bool


def launch_config(rows: int, entries: int, out_features: int) -> LaunchConfig:
    """Tiles for ``rows`` rows of x and ``entries`` stored entries: a warp, or two, for each row.

    A step is as long as an average row, up to 8 entries a lane (one 128-bit load of columns) and up
    to 32 accumulators a lane. With several rows of x the gather wants one entry a lane, where wide
    loads would have to be exchanged between lanes first. Chosen by the code that Triton 3.6 makes
    for sm_90 in bf16 (one row: 128-bit loads, 49 registers, no shared memory; 8 rows: a 128-bit
    gather an entry, 64 registers); ``benchmarks/bench_sparse_linear.py --tune`` times alternatives.
    """
    block_m = min(next_power_of_2(rows), 32)
    row_length = cdiv(max(entries, 1), max(out_features, 1))
    num_warps = 1 if row_length < 4096 else 2
    block_e = min(next_power_of_2(row_length), 256 * num_warps, 1024 * num_warps // block_m)
    return LaunchConfig(max(32, block_e), block_m, num_warps, vector_loads=block_m == 1)


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least ``value``; 1 for what is below 1."""
    return 1 << max(value - 1, 0).bit_length()


@jit
def _load_entries(col_ptr, val_ptr, entry, end, NARROW: tl.constexpr):
    """Columns as int32 and values; column 0 and value 0 past the end of the row."""
    stored = entry < end
    col = tl.load(col_ptr + entry, mask=stored, other=0, eviction_policy="evict_first")
    val = tl.load(val_ptr + entry, mask=stored, other=0.0, eviction_policy="evict_first")
    return col.to(tl.int32) & 0xFFFF if NARROW else col, val


@jit
def _sparse_linear_kernel(
    x_ptr,
    ptr_ptr,
    col_ptr,
    val_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    tiles_m,
    HAS_BIAS: tl.constexpr,
    NARROW: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # One row of the weight in a program: on two dimensions Triton 3.6 gives the gather another
    # layout than the entries and sends every step through shared memory and a barrier.
    # Tiles of x are the fast axis: the entries of a row are read again while they are in L2.
    pid = tl.program_id(0)
    tile_m = (pid % tiles_m).to(tl.int64)
    row = pid // tiles_m
    begin = tl.load(ptr_ptr + row)
    end = tl.load(ptr_ptr + row + 1)
    if VECTOR:  # they are multiples of 8 already; saying so lets the compiler use 128-bit loads
        begin = begin // 8 * 8
        end = end // 8 * 8
    element = x_ptr.dtype.element_ty
    entry = begin + tl.arange(0, BLOCK_E)
    m = tl.arange(0, BLOCK_M)
    # x is (tiles_m, K, BLOCK_M): int64 for the tile, int32 inside it
    x_ptr += tile_m * K * BLOCK_M
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_E,), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_E, BLOCK_M), dtype=tl.float32)
    # the next entries are on their way from memory while x is gathered for these
    col, val = _load_entries(col_ptr, val_ptr, entry, end, NARROW)
    for step in range(BLOCK_E, end - begin + BLOCK_E, BLOCK_E):
        next_col, next_val = _load_entries(col_ptr, val_ptr, entry + step, end, NARROW)
        weight = val.to(element).to(tl.float32)
        if BLOCK_M == 1:
            acc += weight * tl.load(x_ptr + col).to(tl.float32)
        else:
            x = tl.load(x_ptr + (col * BLOCK_M)[:, None] + m[None, :])
            acc += weight[:, None] * x.to(tl.float32)
        col, val = next_col, next_val
    y = tl.sum(acc, 0)  # (BLOCK_M,), or a scalar for one row of x
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(element).to(tl.float32)
    if BLOCK_M == 1:
        tl.store(y_ptr + tile_m * N + row, y.to(element))
    else:
        m = tile_m * BLOCK_M + m
        tl.store(y_ptr + m * N + row, y.to(element), mask=m < M)


def sparse_linear_triton(
    x: Tensor,
    ptr: Tensor,
    col: Tensor,
    val: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Launch the kernel on a matrix; accumulates in fp32.

    Args:
        x: fp32, fp16 or bf16, ``(M, K)``, any strides, M and K at least 1.
        ptr: int32, ``[N + 1]``.
        col: int16 (the format of CUDA, rows padded) or int32 (any rows), ``[entries]``.
        val: floating point, ``[entries]``; rounded to the dtype of x.
        bias: floating point, ``[N]``, contiguous, or None; rounded to the dtype of x.
        out: contiguous ``(M, N)`` of the dtype of x to write into, or None for a new one.
        config: tile sizes; None takes ``launch_config``.
    """
    (rows, in_features), out_features = x.shape, ptr.shape[0] - 1
    if out is None:
        out = x.new_empty(rows, out_features)
    config = config or launch_config(rows, col.numel(), out_features)
    narrow = col.dtype == torch.int16
    tiles_m = cdiv(rows, config.block_m)
    if config.block_m > 1:
        x = F.pad(x, (0, 0, 0, tiles_m * config.block_m - rows))
        x = x.view(tiles_m, config.block_m, in_features).transpose(1, 2)  # (tiles_m, K, BLOCK_M)
    x = x.contiguous()
    grid = (tiles_m * out_features,)
    _sparse_linear_kernel[grid](
        x,
        ptr,
        col,
        val,
        val if bias is None else bias,
        out,
        rows,
        out_features,
        in_features,
        tiles_m,
        HAS_BIAS=bias is not None,
        NARROW=narrow,
        VECTOR=narrow and config.vector_loads,
        BLOCK_E=config.block_e,
        BLOCK_M=config.block_m,
        num_warps=config.num_warps,
    )
    return out


# -- operator --------------------------------------------------------------------------------
def has_sparse_path(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the op has a sparse kernel for ``dtype`` on ``device``; if not it stays dense."""
    if device.type == "cuda":
        return HAS_TRITON and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if device.type == "cpu":
        # without MKL torch has no sparse x dense product that beats its dense one
        return torch.backends.mkl.is_available() and dtype in (
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
        )
    return False


def _check(
    x: Tensor, weight: Tensor, ptr: Tensor, col: Tensor, val: Tensor, bias: Tensor | None
) -> None:
    if weight.dim() != 2:
        raise ArgumentError(
            f"sparse_linear: expected weight of shape (N, K), got {tuple(weight.shape)}"
        )
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ArgumentError(
            f"sparse_linear: expected x of shape (..., {in_features}) for weight "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    for name, tensor in (("x", x), ("weight", weight), ("val", val)):
        if not tensor.is_floating_point():
            raise ArgumentTypeError(
                f"sparse_linear: expected {name} of a floating point dtype, got {tensor.dtype}"
            )
    if ptr.dtype != torch.int32 or ptr.dim() != 1 or ptr.shape[0] != out_features + 1:
        raise ArgumentError(
            f"sparse_linear: expected ptr torch.int32 of shape ({out_features + 1},), "
            f"got {ptr.dtype} of shape {tuple(ptr.shape)}"
        )
    if col.dtype not in (torch.int16, torch.int32) or col.dim() != 1:
        raise ArgumentError(
            f"sparse_linear: expected col torch.int16 or torch.int32 of one dimension, "
            f"got {col.dtype} of shape {tuple(col.shape)}"
        )
    if val.shape != col.shape:
        raise ArgumentError(
            f"sparse_linear: expected val of shape {tuple(col.shape)} like col, "
            f"got {tuple(val.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_features):
        raise ArgumentError(
            f"sparse_linear: expected bias of shape ({out_features},), got {tuple(bias.shape)}"
        )


@torch.library.custom_op("resu_compile::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    ptr: Tensor,
    col: Tensor,
    val: Tensor,
    bias: Tensor | None,
    sparse_buckets: int,
) -> Tensor:
    """``F.linear(x, weight, bias)``, by the sparse kernel at the batch sizes that ask for it.

    Args:
        x: floating point, ``(..., K)``, any strides; its dtype is that of the computation and of
            the result, and accumulation is in fp32 at least.
        weight: floating point, ``(N, K)``, any strides, 0 wherever nothing is stored in ``val``.
            Only the dense path and the backward pass read it.
        ptr: int32, ``[N + 1]``, of ``csr_pack(weight)``.
        col: int16 or int32, ``[entries]``, of ``csr_pack(weight)``.
        val: floating point, ``[entries]``, of ``csr_pack(weight)``. Like weight and bias it may be
            of another dtype than x and is then rounded to it, as autocast does.
        bias: floating point, ``(N,)``, or None.
        sparse_buckets: bit ``batch_bucket(rows of x)`` set takes the sparse kernel; where a device
            or dtype has none the dense product runs.

    Returns:
        Contiguous ``(..., N)`` of the dtype of x. The gradient is that of the dense product.

    Raises:
        ArgumentError: for shapes or integer dtypes that do not fit together.
        ArgumentTypeError: if x, weight or val is not floating point.
    """
    _check(x, weight, ptr, col, val, bias)
    out_features, in_features = weight.shape
    rows = math.prod(x.shape[:-1])
    x2 = x.reshape(rows, in_features)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):  # x has its dtype already; see the docstring
        with torch.autocast(device_type, enabled=False):
            y = _product(x2, weight, ptr, col, val, bias, sparse_buckets)
    else:
        y = _product(x2, weight, ptr, col, val, bias, sparse_buckets)
    return y.view(*x.shape[:-1], out_features)


def _product(
    x: Tensor,
    weight: Tensor,
    ptr: Tensor,
    col: Tensor,
    val: Tensor,
    bias: Tensor | None,
    sparse_buckets: int,
) -> Tensor:
    wanted = sparse_buckets >> batch_bucket(x.shape[0]) & 1
    if wanted and x.numel() and val.numel() and has_sparse_path(x.device, x.dtype):
        if x.is_cuda:
            bias = None if bias is None else bias.contiguous()
            return sparse_linear_triton(x, ptr, col, val, bias)
        return sparse_linear_cpu(x, ptr, col, val, bias, (weight.shape[0], weight.shape[1]))
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias).contiguous()


@sparse_linear.register_fake
def _sparse_linear_fake(
    x: Tensor,
    weight: Tensor,
    ptr: Tensor,
    col: Tensor,
    val: Tensor,
    bias: Tensor | None,
    sparse_buckets: int,
) -> Tensor:
    _check(x, weight, ptr, col, val, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, _, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    out_features, in_features = weight.shape
    rows = math.prod(x.shape[:-1])
    grad = grad.reshape(rows, out_features)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (grad @ weight.to(grad.dtype)).view(x.shape)
    if ctx.needs_input_grad[1]:
        grad_weight = (grad.t() @ x.reshape(rows, in_features)).to(weight.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, None, None, grad_bias, None


sparse_linear.register_autograd(_backward, setup_context=_setup_context)


def sparse_linear_autocast(
    x: Tensor,
    weight: Tensor,
    ptr: Tensor,
    col: Tensor,
    val: Tensor,
    bias: Tensor | None,
    sparse_buckets: int,
) -> Tensor:
    """``sparse_linear`` with the result dtype that ``F.linear`` has under the current autocast.

    For graphs that are traced: whether autocast is on is read while tracing. Only x is cast here;
    the op rounds weight, val and bias where it reads them, so no cast copy of the dense weight is
    made on the sparse path.
    """
    device_type = x.device.type
    if (
        torch.is_autocast_enabled(device_type)
        and x.is_floating_point()
        and x.dtype != torch.float64  # autocast leaves fp64 alone
    ):
        x = x.to(torch.get_autocast_dtype(device_type))
    return torch.ops.resu_compile.sparse_linear(x, weight, ptr, col, val, bias, sparse_buckets)

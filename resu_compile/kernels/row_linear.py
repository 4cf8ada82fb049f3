"""Linear layer on a weight packed by rows: cost by the kept entries, for few rows of x.

    y[m, n] = act(sum_k weight[n, k] * x[m, k] + bias[n])

CUDA C++ (row_linear.cu) where it can be compiled and x fits shared memory, else Triton; plain
PyTorch on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.row_weight import CHUNK, GROUP, RowWeight, unpack_rows

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # X_KIND and W_KIND
WARP = 32


# -- reference -------------------------------------------------------------------------------
def row_linear_reference(
    x: Tensor, packed: RowWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning: the dense product, rounded once after bias and activation."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = unpack_rows(packed).to(x.dtype).to(compute)
    y = F.linear(x.to(compute), weight, None if bias is None else bias.to(x.dtype).to(compute))
    return apply_activation(y, activation).to(x.dtype)


# -- CUDA C++ --------------------------------------------------------------------------------
class _Args(ctypes.Structure):
    """``struct Args`` of row_linear.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "val", "gap", "base", "ends", "first")),
        *((name, ctypes.c_void_p) for name in ("bias", "y")),
        *((name, ctypes.c_uint32) for name in ("rows", "out_features", "in_features", "chunks")),
        *((name, ctypes.c_uint32) for name in ("steps", "inverse", "room", "log_q")),
        ("activation", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class RowLaunch:
    """How row_linear.cu is launched.

    Attributes:
        rows: of x that a block multiplies at once: 1, 2, 4 or 8.
        staged: x is kept in shared memory.
        threads: of a block.
        steps: groups of a lane, one after the other.
        log_q: binary logarithm of the columns of x in one bank of shared memory.
        shared_bytes: dynamic shared memory of a block.
    """

    rows: int
    staged: bool
    threads: int
    steps: int
    log_q: int
    shared_bytes: int


def max_threads(rows: int) -> int:
    """Threads of a block at most: 8 sums and 16 values need more than 64 registers."""
    return 1024 if rows <= 4 else 512


@functools.lru_cache(maxsize=4096)
def row_launch(
    rows: int, in_features: int, x_bytes: int, capacity: int, room: int, shared_limit: int
) -> RowLaunch | None:
    """The launch for ``rows`` rows of x; None if shared memory holds not even the sums of one.

    Args:
        rows: rows of x, >= 1.
        in_features: K.
        x_bytes: of one value of x.
        capacity: groups of a block, as of ``RowWeight``.
        room: rows of the weight of a block, as of ``RowWeight``.
        shared_limit: bytes of shared memory that a block may have.
    """
    most = min(next_power_of_2(rows), 16 // x_bytes)
    chunks = capacity // CHUNK
    for staged in (True, False):
        tile = most if staged else min(most, 4)
        while tile:
            steps = cdiv(chunks, max_threads(tile) // WARP)
            warps = cdiv(chunks, steps)
            cell = 4 if tile == 1 else tile * x_bytes
            log_q = next_power_of_2(cdiv(in_features * cell, 128)).bit_length() - 1
            stride = 40 if tile <= 2 else 32  # STRIDE of row_linear.cu
            sums = (room + warps + 1) * stride * tile * 4
            shared = (room // 32 + 1) * 128 + sums
            if staged:  # the cells, and x as it comes where the sums will be
                pieces = tile * (128 // cell) * ((x_bytes << log_q) + 16)
                shared += (128 << log_q) + max(0, pieces - sums)
            if shared <= shared_limit:
                return RowLaunch(tile, staged, warps * WARP, steps, log_q, shared)
            tile //= 2
    return None


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least ``value``; 1 for what is below 1."""
    return 1 << max(value - 1, 0).bit_length()


@functools.lru_cache(maxsize=64)
def _module(
    x: torch.dtype, weight: torch.dtype, rows: int, gap_bits: int, wide: bool, staged: bool, at: int
) -> CudaModule | None:
    threads = max_threads(rows)
    defines = (
        ("X_KIND", KINDS[x]),
        ("W_KIND", KINDS[weight]),
        ("RM", rows),
        ("GAP_BITS", gap_bits),
        ("WIDE_BASE", int(wide)),
        ("STAGED", int(staged)),
        ("MAX_THREADS", threads),
    )
    module = load_module(("row_linear.cu",), defines, threads, at)
    if module is not None:
        module.allow_shared("row_linear", _shared_limit(at))
    return module


@functools.cache
def _shared_limit(device: int) -> int:
    """Bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def _overlaps(device: int) -> bool:
    """Whether a kernel may be launched before those before it have ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def row_linear_cuda(
    x: Tensor,
    packed: RowWeight,
    bias: Tensor | None,
    activation: str = "none",
    out: Tensor | None = None,
    *,
    overlap: bool = True,
) -> Tensor | None:
    """Launch row_linear.cu on the current stream; None where it cannot run.

    Args:
        x: fp32, fp16 or bf16, ``(M, K)``, contiguous, M at least 1.
        packed: fp32, fp16 or bf16 weight on the device of ``x``, the current one.
        bias: ``[N]``, contiguous, dtype of ``x``; or None.
        activation: one of ``ACTIVATIONS``.
        out: contiguous ``(M, N)`` of the dtype of ``x`` to write into; None makes one.
        overlap: start before the kernel before has ended, where the device can.
    """
    if (packed.val.data_ptr() | packed.gap.data_ptr()) % 16:
        return None
    device = x.device.index
    rows, in_features = x.shape
    launch = row_launch(
        rows, in_features, x.element_size(), packed.capacity, packed.room, _shared_limit(device)
    )
    if launch is None:
        return None
    wide = packed.base.dtype == torch.int32
    module = _module(
        x.dtype, packed.val.dtype, launch.rows, packed.gap_bits, wide, launch.staged, device
    )
    if module is None:
        return None
    if out is None:
        out = x.new_empty(rows, packed.shape[0])
    args = _Args(
        x.data_ptr(),
        packed.val.data_ptr(),
        packed.gap.data_ptr(),
        packed.base.data_ptr(),
        packed.ends.data_ptr(),
        packed.first.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        packed.shape[0],
        in_features,
        packed.capacity // CHUNK,
        launch.steps,
        cdiv(1 << 32, launch.steps) & 0xFFFFFFFF,
        packed.room,
        launch.log_q,
        ACTIVATIONS.index(activation),
    )
    module.launch(
        "row_linear",
        (packed.blocks, cdiv(rows, launch.rows)),
        args,
        shared_bytes=launch.shared_bytes,
        threads=launch.threads,
        overlap=overlap and _overlaps(device),
    )
    return out


# -- Triton ----------------------------------------------------------------------------------
@jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = tl.where(y < 0.0, 0.0, y)
    elif ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == 4:
        y = y / (1.0 + tl.exp(-y))
    return y


@jit
def _row_linear_kernel(
    x_ptr,
    val_ptr,
    gap_ptr,
    base_ptr,
    ends_ptr,
    first_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    room,
    capacity,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GAP_BITS: tl.constexpr,
    NARROW: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # a program is one place of a run: a row of the weight, or nothing behind the run's last row
    pid = tl.program_id(0)
    block = pid // room
    place = pid % room
    first = tl.load(first_ptr + block)
    row = first + place
    if row >= tl.load(first_ptr + block + 1):
        return
    end = tl.load(ends_ptr + pid)
    begin = tl.load(ends_ptr + pid - 1, mask=place > 0, other=0)
    element = x_ptr.dtype.element_ty
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, 16)
    g = tl.arange(0, BLOCK_G)
    acc = tl.zeros((BLOCK_G * 16, BLOCK_M), dtype=tl.float32)
    start = block.to(tl.int64) * capacity
    for step in range(begin, end, BLOCK_G):
        stored = step + g < end
        group = start + step + g
        base = tl.load(base_ptr + group, mask=stored, other=0).to(tl.int32)
        if NARROW:
            base = base & 0xFFFF
        if GAP_BITS == 8:
            gap = tl.load(
                gap_ptr + (group * 16)[:, None] + j[None, :], mask=stored[:, None], other=0
            )
            gap = gap.to(tl.int32)
        else:
            byte = (group * 8)[:, None] + (j // 8 * 4 + j % 4)[None, :]
            gap = tl.load(gap_ptr + byte, mask=stored[:, None], other=0).to(tl.int32)
            gap = gap >> (j // 4 % 2 * 4)[None, :] & 15
        col = base[:, None] + tl.cumsum(gap, 1)
        within = (group % 32 * VECTOR)[:, None] + (j // VECTOR * (32 * VECTOR) + j % VECTOR)[
            None, :
        ]
        at = (group // 32 * 512)[:, None] + within
        val = tl.load(val_ptr + at, mask=stored[:, None], other=0.0)
        weight = tl.reshape(val.to(element).to(tl.float32), (BLOCK_G * 16,))
        col = tl.reshape(col, (BLOCK_G * 16,))
        x = tl.load(
            x_ptr + m[None, :] * K + col[:, None], mask=(m < M)[None, :] & (col >= 0)[:, None]
        )
        acc += weight[:, None] * x.to(tl.float32)
    y = tl.sum(acc, 0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    y = _activate(y, ACTIVATION)
    tl.store(y_ptr + m * N + row, y.to(element), mask=m < M)


def row_linear_triton(
    x: Tensor,
    packed: RowWeight,
    bias: Tensor | None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """The portable kernel, a program a row of the weight; arguments as ``row_linear_cuda``."""
    rows, in_features = x.shape
    out_features = packed.shape[0]
    if out is None:
        out = x.new_empty(rows, out_features)
    block_m = min(next_power_of_2(rows), 8)
    grid = (packed.blocks * packed.room, cdiv(rows, block_m))
    _row_linear_kernel[grid](
        x,
        packed.val,
        packed.gap,
        packed.base,
        packed.ends,
        packed.first,
        packed.val if bias is None else bias,
        out,
        rows,
        out_features,
        in_features,
        packed.room,
        packed.capacity,
        HAS_BIAS=bias is not None,
        ACTIVATION=ACTIVATIONS.index(activation),
        GAP_BITS=packed.gap_bits,
        NARROW=packed.base.dtype == torch.int16,
        VECTOR=GROUP // packed.val.element_size(),
        BLOCK_G=16 if block_m <= 2 else 8,
        BLOCK_M=block_m,
        num_warps=2 if block_m <= 2 else 4,
    )
    return out


# -- dispatch --------------------------------------------------------------------------------
def row_linear(
    x: Tensor, packed: RowWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """``act(x @ weight.T + bias)``, summed in fp32 and rounded once.

    Args:
        x: floating point, ``(M, K)``, any strides.
        packed: weight ``(N, K)``; its values are rounded to the dtype of ``x``.
        bias: ``[N]`` or None; rounded to the dtype of ``x``.
        activation: one of ``kernels.plan.ACTIVATIONS``.

    Returns:
        ``(M, N)``, contiguous, dtype of ``x``.

    Raises:
        ArgumentError: ``x`` or ``activation`` does not fit.
    """
    _check(x, packed, activation)
    if not x.is_cuda or not {x.dtype, packed.val.dtype} <= KINDS.keys():
        return row_linear_reference(x, packed, bias, activation)
    if not x.numel():
        return x.new_empty(0, packed.shape[0])
    x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    with torch.cuda.device(x.device):
        y = row_linear_cuda(x, packed, bias, activation)
        if y is None and HAS_TRITON:
            y = row_linear_triton(x, packed, bias, activation)
    return row_linear_reference(x, packed, bias, activation) if y is None else y


def _check(x: Tensor, packed: RowWeight, activation: str) -> None:
    """Raise unless ``x`` is a matrix with the columns of the weight, on its device."""
    if x.dim() != 2 or x.shape[1] != packed.shape[1] or not x.is_floating_point():
        raise ArgumentError(
            f"x: expected a floating point matrix (M, {packed.shape[1]}), "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if x.device != packed.val.device:
        raise ArgumentError(f"x: expected device {packed.val.device}, got {x.device}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")

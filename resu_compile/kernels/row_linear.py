"""Linear layer on a weight packed by rows: cost by the kept entries, for few rows of x.

    y[m, n] = act(sum_k weight[n, k] * x[m, k] + bias[n])

CUDA C++ (row_linear.cu) where it can be compiled and x fits shared memory, else Triton; plain
PyTorch on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._triton import HAS_TRITON, cdiv
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.row_linear_triton import row_linear_triton
from resu_compile.kernels.row_order import CHUNK
from resu_compile.kernels.row_weight import RowWeight, unpack_rows

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # X_KIND and W_KIND
WARP = 32
MAX_GRID = 65535  # blocks in y


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
        *((name, ctypes.c_void_p) for name in ("lead", "bias", "y")),
        *((name, ctypes.c_uint32) for name in ("rows", "out_features", "in_features", "chunks")),
        *((name, ctypes.c_uint32) for name in ("steps", "inverse", "room", "log_q")),
        *((name, ctypes.c_uint32) for name in ("activation", "ends_at", "sums_at")),
    )


@dataclass(frozen=True)
class RowLaunch:
    """How row_linear.cu is launched.

    Attributes:
        rows: of x that a block multiplies at once: 1, 2, 4 or 8.
        raw_rows: of those that are brought to shared memory at once; 0: x is read where it is.
        threads: of a block.
        steps: groups of a lane, one after the other.
        log_q: binary logarithm of the columns of x in one bank of shared memory.
        ends_at: bytes of shared memory before ``ends``: x.
        sums_at: bytes before the partial sums.
        shared_bytes: of shared memory.
    """

    rows: int
    raw_rows: int
    threads: int
    steps: int
    log_q: int
    ends_at: int
    sums_at: int
    shared_bytes: int


def max_threads(rows: int) -> int:
    """Threads of a block at most: with 8 rows of x a thread needs more than 64 registers."""
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
    chunks = capacity // CHUNK
    for tile, raw_rows in _tiles(min(next_power_of_2(rows), 16 // x_bytes)):
        steps = cdiv(chunks, max_threads(tile) // WARP)
        warps = cdiv(chunks, steps)
        cell = 4 if tile == 1 else tile * x_bytes
        log_q = next_power_of_2(cdiv(in_features * cell, 128)).bit_length() - 1
        ends_at = (128 << log_q) if raw_rows else 0
        sums_at = ends_at + (room // 32 + 1) * 128
        sums = (room + warps + 1) * WARP * tile * 4
        raw = raw_rows * (128 // cell) * ((x_bytes << log_q) + 16)
        end = sums_at + cdiv(max(sums, raw), 128) * 128
        if end <= shared_limit:
            return RowLaunch(tile, raw_rows, warps * WARP, steps, log_q, ends_at, sums_at, end)
    return None


def _tiles(most: int) -> Iterator[tuple[int, int]]:
    """Rows of x at once, and how many of them are brought at once; the better first."""
    for tile in _halves(most):
        for raw_rows in _halves(tile):
            yield tile, raw_rows
    for tile in _halves(min(most, 4)):
        yield tile, 0


def _halves(value: int) -> Iterator[int]:
    """A power of two, half of it, and so on down to 1."""
    while value:
        yield value
        value //= 2


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least ``value``; 1 for what is below 1."""
    return 1 << max(value - 1, 0).bit_length()


@functools.lru_cache(maxsize=64)
def _module(
    x: torch.dtype,
    weight: torch.dtype,
    rows: int,
    raw_rows: int,
    gap_bits: int,
    wide: bool,
    at: int,
) -> CudaModule | None:
    threads = max_threads(rows)
    defines = (
        ("X_KIND", KINDS[x]),
        ("W_KIND", KINDS[weight]),
        ("RM", rows),
        ("GAP_BITS", gap_bits),
        ("WIDE_BASE", int(wide)),
        ("STAGED", int(raw_rows > 0)),
        ("RAW_ROWS", raw_rows),
        ("MAX_THREADS", threads),
    )
    module = load_module(("row_group.cu", "row_linear.cu"), defines, threads, at)
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
    if (packed.val.data_ptr() | packed.gap.data_ptr() | packed.base.data_ptr()) % 16:
        return None
    device = x.device.index
    rows, in_features = x.shape
    launch = row_launch(
        rows, in_features, x.element_size(), packed.capacity, packed.room, _shared_limit(device)
    )
    if launch is None or cdiv(rows, launch.rows) > MAX_GRID:
        return None
    module = _module(
        x.dtype,
        packed.val.dtype,
        launch.rows,
        launch.raw_rows,
        packed.gap_bits,
        packed.base.dtype == torch.int32,
        device,
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
        packed.lead.data_ptr(),
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
        launch.ends_at,
        launch.sums_at,
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
        if y is None and HAS_TRITON and x.shape[0] <= MAX_GRID:
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

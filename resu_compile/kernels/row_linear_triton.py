"""The portable kernel of the linear layer on a weight packed by rows.

A program is a row of the weight and up to 8 rows of x; see ``row_linear`` for the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.kernels._triton import cdiv, jit, tl
from resu_compile.kernels.plan import ACTIVATIONS
from resu_compile.kernels.row_order import GROUP
from resu_compile.kernels.row_weight import RowWeight


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
    block_m = min(1 << (rows - 1).bit_length(), 8)
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

"""Sparse linear layer on the CPU: torch's CSR storage and the sparse product of MKL.

    y[m, n] = activation(sum_{ptr[n] <= e < ptr[n + 1]} val[e] * x[m, col[e]]  (+ bias[n]))

The number of entries is that of the kept places, so it depends on their count alone.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels._triton import cdiv
from resu_compile.kernels.plan import apply_activation

MAX_ENTRIES = 2**31 - 2**16  # entry numbers are int32

# Rows of x in one MKL product. Its dense operand, (K, rows), has to stay in L2: on a 2-core Zen 5
# (1 MB of L2 a core), fp32 4096x4096 at 70 % and 256 rows, 70.3 ms in one piece, 35.4 ms by 32,
# 41.9 ms by 16. Row counts that are no multiple of 4 are padded: 3 rows 2.6 ms, as 4 rows 1.9 ms.
ROWS = 32
ROW_MULTIPLE = 4


@dataclass(frozen=True)
class CsrWeight:
    """Kept entries of an ``(N, K)`` weight, row after row, columns ascending.

    Attributes:
        ptr: int32, ``[N + 1]``; row ``n`` owns the entries ``ptr[n]`` to ``ptr[n + 1] - 1``.
        col: int32, ``[entries]``.
        val: ``[entries]``, dtype of the weight.
        shape: (N, K).
    """

    ptr: Tensor
    col: Tensor
    val: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Check what a product would read out of bounds by."""
        rows = self.shape[0]
        if self.ptr.dtype != torch.int32 or self.ptr.dim() != 1 or self.ptr.shape[0] != rows + 1:
            raise ArgumentError(
                f"ptr: expected torch.int32 of shape ({rows + 1},), "
                f"got {self.ptr.dtype} of shape {tuple(self.ptr.shape)}"
            )
        if self.col.dtype != torch.int32 or self.col.dim() != 1:
            raise ArgumentError(
                f"col: expected torch.int32 of one dimension, "
                f"got {self.col.dtype} of shape {tuple(self.col.shape)}"
            )
        if self.val.shape != self.col.shape:
            raise ArgumentError(
                f"val: expected shape {tuple(self.col.shape)} like col, got {tuple(self.val.shape)}"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        """``ptr``, ``col`` and ``val``."""
        return self.ptr, self.col, self.val

    @property
    def layout(self) -> tuple[int, ...]:
        """Nothing beside the tensors."""
        return ()

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], layout: Sequence[int], shape: tuple[int, int]
    ) -> CsrWeight:
        """The weight that ``tensors()`` and ``layout`` were taken from."""
        ptr, col, val = tensors
        if layout:
            raise ArgumentError(f"layout: expected () for CSR, got {tuple(layout)}")
        return cls(ptr, col, val, shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the three tensors together."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def csr_pack(weight: Tensor, mask: Tensor | None = None) -> CsrWeight:
    """Exact row storage of the kept entries of ``weight``.

    Args:
        weight: floating point, ``(N, K)``, any strides (``[in, out]`` parameters come transposed).
        mask: bool, ``(N, K)``, True = kept; None keeps what is not 0.

    Raises:
        WeightError: if ``weight`` is not a floating point matrix, or has 2**31 - 2**16 entries
            or more to keep.
        ArgumentError: if ``mask`` is not a bool tensor of the shape of ``weight``.
    """
    check_matrix(weight, mask)
    weight = weight.detach()
    kept = weight != 0 if mask is None else mask
    out_features, in_features = weight.shape
    ptr = F.pad(kept.sum(1).cumsum(0), (1, 0))  # (N + 1,), int64
    entries = int(ptr[-1])
    if entries >= MAX_ENTRIES:
        raise WeightError(
            f"weight: expected fewer than {MAX_ENTRIES} entries to keep, got {entries}; "
            "leave this weight dense or split it"
        )
    columns = torch.arange(in_features, dtype=torch.int32, device=weight.device)
    col = columns.expand(out_features, in_features)[kept]  # (nnz,), row-major for any strides
    return CsrWeight(ptr.to(torch.int32), col, weight[kept], (out_features, in_features))


def check_matrix(weight: Tensor, mask: Tensor | None) -> None:
    """Raise unless ``weight`` is a floating point matrix and ``mask`` fits it."""
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


def csr_unpack(packed: CsrWeight) -> Tensor:
    """The dense ``(N, K)`` weight, bit by bit what was kept, +0 elsewhere."""
    rows, columns = packed.shape
    counts = packed.ptr.diff().to(torch.int64)
    row = torch.arange(rows, device=packed.val.device).repeat_interleave(
        counts, output_size=packed.col.numel()
    )
    place = row.mul_(columns).add_(packed.col)
    return packed.val.new_zeros(rows * columns).index_copy_(0, place, packed.val).view(packed.shape)


# -- reference -------------------------------------------------------------------------------
def csr_linear_reference(
    x: Tensor, packed: CsrWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning: the dense product with the unpacked weight."""
    weight = csr_unpack(packed).to(x.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return apply_activation(y, activation)


# -- MKL -------------------------------------------------------------------------------------
def has_csr_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``csr_linear`` beats the dense product anywhere: without MKL it cannot."""
    return (
        device.type == "cpu"
        and torch.backends.mkl.is_available()
        and dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    )


@functools.cache
def _silence_csr_beta_warning() -> None:
    """Use up torch's once-per-process warning that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(2, dtype=torch.int32, device="cpu")
        value = torch.zeros(0, device="cpu")
        torch.sparse_csr_tensor(index, index[:0], value, (1, 1), check_invariants=False)


def csr_linear(
    x: Tensor, packed: CsrWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """The product through MKL, ``(M, K) -> (M, N)``; fp16 and bf16 compute in fp32.

    MKL is several times faster on row-major operands, hence the transposed copies on both sides
    (fp32 4096x4096 at 70 %, 16 rows, 2-core Zen 5: 2.7 ms; with transposed views 15 ms).

    Args:
        x: floating point, ``(M, K)``, any strides, on the CPU.
        packed: the weight; its values are rounded to the dtype of x.
        bias: floating point, ``(N,)``, rounded to the dtype of x, or None.
        activation: one of ``ACTIVATIONS``, applied before the result is rounded.
    """
    if packed.val.numel() == 0:  # MKL takes no matrix without entries
        return csr_linear_reference(x, packed, bias, activation)
    _silence_csr_beta_warning()
    dtype, (out_features, in_features) = x.dtype, packed.shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # val and bias may be wider than x under autocast: round to the dtype of x first, as dense does
    values = packed.val.to(dtype).to(compute)
    bias = None if bias is None else bias.to(dtype).to(compute)
    matrix = torch.sparse_csr_tensor(
        packed.ptr, packed.col, values, packed.shape, check_invariants=False
    )
    rows = x.shape[0]
    y = x.new_empty(rows, out_features)
    if rows == 1:
        product = torch.mv(matrix, x[0].to(compute).contiguous())
        _finish(product, bias, activation, y[0])
        return y
    for start in range(0, rows, ROWS):
        part = x[start : start + ROWS]
        count = part.shape[0]
        columns = count if count <= 2 else cdiv(count, ROW_MULTIPLE) * ROW_MULTIPLE
        x_t = x.new_empty(in_features, columns, dtype=compute)
        x_t[:, :count].copy_(part.t())
        x_t[:, count:].zero_()  # dropped again, but leftovers may be denormal and slow
        y_t = x.new_empty(out_features, columns, dtype=compute)
        torch.mm(matrix, x_t, out=y_t)
        _finish(y_t[:, :count].t(), bias, activation, y[start : start + count])
    return y


def _finish(product: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """Bias, activation and rounding into ``out``."""
    if activation == "none":
        torch.add(product, 0 if bias is None else bias, out=out)
    else:
        out.copy_(apply_activation(product if bias is None else product + bias, activation))

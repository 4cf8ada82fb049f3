"""Which kernel runs a sparse linear layer at which batch size: the words and the buckets.

A plan is one ``Kernel`` for each bucket of row counts. A graph that is compiled once then takes the
kernel that was measured fastest at every batch size.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

BUCKET_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # the row count that stands for each bucket


class Kernel(IntEnum):
    """How ``x @ weight.T`` is computed. The numbers are stored in files; never reused."""

    DENSE = 0  # the dense weight, by the library's matmul
    CSR = 1  # torch's CSR, on the CPU
    ROWS = 2  # entries by rows, cost by the number of entries: few rows of x
    TILES = 3  # bitmap tiles decoded into tensor-core fragments: up to about 64 rows of x
    UNPACK = 4  # the packed weight expanded into a temporary, then the dense product
    SEMI = 5  # 2:4 semi-structured tensor cores


def batch_bucket(rows: int) -> int:
    """Bucket of a row count: the first whose ``BUCKET_ROWS`` is not below it, else the last.

    Args:
        rows: product of the leading dimensions of ``x``, >= 0; 0 counts as 1.
    """
    return min((max(rows, 1) - 1).bit_length(), len(BUCKET_ROWS) - 1)


# -- activations that a kernel may apply to its result ---------------------------------------
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")  # the position is the kernels' code


def apply_activation(y: Tensor, activation: str) -> Tensor:
    """``y`` through one of ``ACTIVATIONS``, in the dtype of ``y``: plain PyTorch meaning."""
    match activation:
        case "none":
            return y
        case "relu":
            return torch.relu(y)
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case "silu":
            return F.silu(y)
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")

"""``x @ weight.T`` by a 2:4 weight, on the sparse tensor cores.

    y = activation(x W^T + bias)          W keeps at most 2 of each 4 consecutive inputs

float16 and bfloat16 run ``semi_linear.cu`` from compute capability 8.0 on, and from 17 rows on
``semi_wide.cu`` where it is 9.0; all else is unpacked and multiplied as a dense weight.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, KernelUnavailableError
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._triton import cdiv
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.semi_weight import (
    COLUMNS,
    ROWS,
    SemiWeight,
    is_semi_pattern,
    is_semi_structured,
    pack_semi,
    unpack_semi,
)

__all__ = [
    "SemiWeight",
    "SemiConfig",
    "is_available",
    "is_semi_pattern",
    "is_semi_structured",
    "is_supported",
    "pack_semi",
    "semi_linear",
    "semi_linear_cuda",
    "semi_config",
    "semi_linear_reference",
    "unpack_semi",
]

DTYPES = (torch.float16, torch.bfloat16)  # of the sparse tensor cores; float32 is unpacked


def is_supported(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """True if the sparse tensor cores take this weight: 2-byte floats, inputs in eights."""
    return dtype in DTYPES and out_features > 0 and in_features > 0 and in_features % 8 == 0


# -- reference -------------------------------------------------------------------------------
def semi_linear_reference(
    x: Tensor, packed: SemiWeight, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning: the dense product in float32, rounded once, at the end."""
    weight = unpack_semi(packed).to(x.dtype)
    wide = None if bias is None else bias.float()
    y = F.linear(x.float(), weight.float(), wide)
    return apply_activation(y, activation).to(x.dtype)


# -- CUDA ------------------------------------------------------------------------------------
SPLITS = (1, 2, 4, 8)  # blocks of a cluster, which share the columns of a row


@dataclass(frozen=True)
class SemiConfig:
    """How the work of one launch is cut.

    Attributes:
        wide: whether warp groups share ``x`` (``semi_wide.cu``), else warps (``semi_linear.cu``).
        tiles: eights of rows of ``x`` in a block: 1, 2, 4 or 8; wide 4 or 8.
        blocks: sixteens of rows of W that a warp takes.
        warps: of a block.
        split: blocks that share the columns; above 1 they are a cluster.
        ahead: chunks of W that are asked into L2 while the kernel ahead still runs.
        least_blocks: blocks that fit on a multiprocessor at once, which bounds their registers.
    """

    wide: bool
    tiles: int
    blocks: int
    warps: int
    split: int
    ahead: int
    least_blocks: int

    @property
    def name(self) -> str:
        """The kernel, which is the only one of the file of this name."""
        return "semi_wide" if self.wide else "semi_linear"

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: stages of ``x``, and in their place the sums."""
        rows = 8 * self.tiles
        columns = 4 * 128 if self.wide else 3 * (128 if self.tiles > 4 else 256)
        return max(rows * columns * 2, rows * (16 * self.warps * self.blocks + 4) * 4)

    def grid(self, m: int, row_blocks: int) -> int:
        """Number of blocks for ``m`` rows of ``x`` and ``16 * row_blocks`` rows of W."""
        return cdiv(m, 8 * self.tiles) * cdiv(row_blocks, self.warps * self.blocks) * self.split


class _Cut(NamedTuple):
    """All of a ``SemiConfig`` but the split, and how many blocks a multiprocessor is to have."""

    wide: bool
    blocks: int
    warps: int
    ahead: int
    least_blocks: int
    wanted: float


# by eights of rows of x: the best of 24 to 60 cuts over the shapes below
_NARROW = {
    1: _Cut(False, 1, 4, 2, 5, 1.6),
    2: _Cut(False, 1, 4, 2, 4, 1.8),
    4: _Cut(False, 1, 8, 0, 2, 1.0),
    8: _Cut(False, 2, 4, 0, 2, 1.0),
}
_WIDE = {4: _Cut(True, 1, 4, 2, 4, 1.8), 8: _Cut(True, 1, 8, 2, 2, 0.9)}  # for 17 rows and more


def semi_config(
    m: int, row_blocks: int, chunks: int, processors: int, capability: tuple[int, int]
) -> SemiConfig:
    """The cut of a launch: the fewest splits that give every multiprocessor work.

    H200, bfloat16, microseconds, dense (cuBLAS) / this kernel, CUDA graphs over weights beyond L2:

    | N x K | M = 1 | 8 | 16 | 32 | 64 |
    | --- | --- | --- | --- | --- | --- |
    | 4096 x 4096 | 12.7 / 8.0 | 13.3 / 8.3 | 13.9 / 9.2 | 13.5 / 10.5 | 12.5 / 11.9 |
    | 14336 x 4096 | 32.3 / 18.3 | 31.8 / 18.5 | 31.5 / 19.7 | 33.1 / 21.7 | 35.1 / 23.3 |
    | 4096 x 14336 | 33.5 / 19.1 | 33.7 / 18.8 | 33.6 / 20.4 | 34.3 / 25.9 | 37.2 / 29.6 |
    | 8192 x 8192 | 36.2 / 20.7 | 35.7 / 20.9 | 35.3 / 21.9 | 35.6 / 28.2 | 37.7 / 32.3 |

    At 128 rows it is 0.85 to 1.02 times as fast as dense, beyond that slower.

    Args:
        m: rows of ``x``.
        row_blocks: sixteens of rows of W.
        chunks: 256s of columns of W.
        processors: multiprocessors of the device.
        capability: of the device. From 9.0 on, blocks may share columns; ``semi_wide.cu`` is for
            9.0 alone.
    """
    tiles = next((n for n in (1, 2, 4) if m <= 8 * n), 8)
    cut = (_WIDE if capability == (9, 0) and tiles in _WIDE else _NARROW)[tiles]
    config = SemiConfig(cut.wide, tiles, cut.blocks, cut.warps, 1, cut.ahead, cut.least_blocks)
    if capability < (9, 0):
        return config
    for split in SPLITS[1:]:
        if config.grid(m, row_blocks) >= cut.wanted * processors or 2 * split > chunks:
            break
        config = replace(config, split=split)
    return config


class _Args(ctypes.Structure):
    """What the kernel takes, as in semi_linear.cu."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias16", ctypes.c_void_p),
        ("bias32", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("row_blocks", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("activation", ctypes.c_int),
    ]


@functools.cache
def _device_facts(device: int) -> tuple[int, tuple[int, int]]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


@functools.cache
def _module(config: SemiConfig, dtype: torch.dtype, device: int) -> CudaModule | None:
    defines = (
        ("BF16", int(dtype == torch.bfloat16)),
        ("TILES", config.tiles),
        ("BLOCKS", config.blocks),
        ("WARPS", config.warps),
        ("SPLIT", config.split),
        ("AHEAD", config.ahead),
        ("LEAST_BLOCKS", config.least_blocks),
    )
    files = ("semi_common.cu", f"{config.name}.cu")
    module = load_module(files, defines, 32 * config.warps, device, specific=config.wide)
    if module is not None:
        module.allow_shared(config.name, config.shared_bytes)
    return module


def semi_linear_cuda(
    x: Tensor,
    packed: SemiWeight,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    config: SemiConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel; arguments as of ``semi_linear``, in a dtype of ``DTYPES`` on CUDA.

    Args:
        x: (M, K), K a multiple of 8.
        packed: the weight (N, K).
        bias: (N,) or None.
        activation: one of ``ACTIVATIONS``.
        config: how to cut the work; None takes ``semi_config``.
        out: contiguous (M, N) of the dtype of ``x`` to write into.

    Raises:
        KernelUnavailableError: the source cannot be compiled here.
    """
    (m, k), n = x.shape, packed.shape[0]
    y = x.new_empty(m, n) if out is None else out
    if m == 0:
        return y
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()  # copies of 16 bytes
        x = x.clone() if x.data_ptr() % 16 else x
    values = packed.values.to(x.dtype)
    if bias is not None:
        bias = bias.contiguous() if bias.dtype == x.dtype else bias.float().contiguous()
    half = bias is not None and bias.dtype == x.dtype
    with torch.cuda.device(x.device):
        processors, capability = _device_facts(x.device.index)
        row_blocks, chunks = cdiv(n, ROWS), cdiv(k, COLUMNS)
        config = config or semi_config(m, row_blocks, chunks, processors, capability)
        module = _module(config, x.dtype, x.device.index)
        if module is None:
            raise KernelUnavailableError("semi_linear: the kernel could not be compiled")
        args = _Args(
            values.data_ptr(),
            packed.places.data_ptr(),
            x.data_ptr(),
            bias.data_ptr() if bias is not None and half else None,
            bias.data_ptr() if bias is not None and not half else None,
            y.data_ptr(),
            x.stride(0) * x.element_size() if m > 1 else 0,
            m,
            n,
            k,
            row_blocks,
            chunks,
            ACTIVATIONS.index(activation),
        )
        module.launch(
            config.name,
            config.grid(m, row_blocks),
            args,
            shared_bytes=config.shared_bytes,
            overlap=capability >= (9, 0),
        )
    return y


# -- dispatch --------------------------------------------------------------------------------
def semi_linear(
    x: Tensor, packed: SemiWeight, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(x W^T + bias)`` without unpacking where the device has sparse tensor cores.

    Args:
        x: (M, K), float32, float16 or bfloat16, any strides.
        packed: the weight (N, K); its values are rounded to the dtype of ``x``.
        bias: (N,) or None.
        activation: one of ``ACTIVATIONS``, applied before the result is rounded.

    Returns:
        (M, N), contiguous, dtype of ``x``.

    Raises:
        ArgumentError: a shape, a dtype or the activation does not fit.
    """
    _check(x, packed, bias, activation)
    n, k = packed.shape
    if x.is_cuda and is_supported(n, k, x.dtype) and is_available(x.device):
        return semi_linear_cuda(x, packed, bias, activation)
    weight = unpack_semi(packed).to(x.dtype)
    if activation == "none":
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    # rounded once, after the activation
    y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return apply_activation(y, activation).to(x.dtype)


def is_available(device: torch.device) -> bool:
    """True if ``semi_linear.cu`` can be compiled for this device."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return _module(semi_config(1, 1, 1, 1, (8, 0)), torch.bfloat16, index) is not None


def _check(x: Tensor, packed: SemiWeight, bias: Tensor | None, activation: str) -> None:
    n, k = packed.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ArgumentError(
            f"x: expected shape (M, {k}) for a weight of shape {packed.shape}, got {tuple(x.shape)}"
        )
    if x.dtype not in (torch.float32, *DTYPES):
        raise ArgumentError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.device != packed.values.device:
        raise ArgumentError(f"x: expected it on {packed.values.device}, got {x.device}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ArgumentError(f"bias: expected shape ({n},) or None, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")

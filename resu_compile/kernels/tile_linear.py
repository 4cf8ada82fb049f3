"""Linear layer on a packed weight, decoded straight into tensor-core fragments.

    y[m, n] = act(sum_k weight[n, k] * x[m, k] + bias[n])

``tile_linear.cu`` runs on Hopper in fp16 and bf16; elsewhere, and in fp32, the weight is unpacked
into a temporary and the dense product follows.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, check_choice
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._triton import cdiv
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.tile_weight import STEP, TileWeight, unpack_tiles

KINDS = {torch.bfloat16: 1, torch.float16: 2}  # KIND of tile_linear.cu
HOPPER = (9, 0)  # compute capability: wgmma exists on no other
SHARED_BYTES = 232448  # shared memory that one block may have on sm_90
GROUP_ROWS = 64  # rows of the weight that a warpgroup multiplies
SCALES = (ctypes.c_int * 8)(*(128 >> i for i in range(8)))  # see tile_linear.cu


# -- reference -------------------------------------------------------------------------------
def tile_linear_reference(
    x: Tensor, packed: TileWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning: the dense product, rounded once after bias and activation."""
    weight = unpack_tiles(packed).to(x.dtype).float()
    y = F.linear(x.float(), weight, None if bias is None else bias.to(x.dtype).float())
    return apply_activation(y, activation).to(x.dtype)


# -- CUDA C++ --------------------------------------------------------------------------------
@dataclass(frozen=True)
class TileConfig:
    """How one launch is cut.

    Attributes:
        tile_m: rows of x of a block: 8, 16, 32 or 64.
        groups: warpgroups of a block, each with 64 rows of the weight at a time.
        splits: blocks of a cluster, among which the columns are shared out: 1, 2, 4 or 8.
        slots: segments of the weight that a warp holds in shared memory.
        sums: buffers for partial sums, 1 or 2.
    """

    tile_m: int
    groups: int
    splits: int
    slots: int
    sums: int = 2

    def fixed_bytes(self, packed: TileWeight) -> int:
        """Shared memory of a block for all but x."""
        slot_bytes = (packed.segment // STEP // packed.unit + packed.segment_rows) * 128
        sums = self.sums * GROUP_ROWS * (self.tile_m + 4) * 4 + 24
        return self.groups * (sums + 4 * self.slots * (slot_bytes + 8))

    def x_bytes(self, packed: TileWeight) -> int:
        """Shared memory of a block for x of one segment."""
        return self.tile_m * packed.segment * 2

    def held_segments(self, packed: TileWeight) -> int:
        """Segments whose x a block holds at once: all of its own if they fit, 0 if none fits."""
        own = cdiv(packed.flags.shape[1], self.splits)
        room = SHARED_BYTES - self.fixed_bytes(packed)
        fitting = max(room, 0) // self.x_bytes(packed)
        return own if fitting >= own else fitting

    def shared_bytes(self, packed: TileWeight) -> int:
        """Shared memory of a block."""
        return self.fixed_bytes(packed) + self.held_segments(packed) * self.x_bytes(packed)


class _Args(ctypes.Structure):
    """``struct Args`` of tile_linear.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("flags", "offset", "val", "x", "bias", "y")),
        *((name, ctypes.c_int) for name in ("rows", "out_features", "in_features", "x_stride")),
        *((name, ctypes.c_int) for name in ("segments", "strips", "slot_rows")),
        *((name, ctypes.c_int) for name in ("held_segments", "clusters", "activation")),
        ("x_aligned", ctypes.c_int),
        ("scale", ctypes.c_int * 8),
    )


def tile_config(rows: int, packed: TileWeight) -> TileConfig | None:
    """Cut for ``rows`` rows of x; None if shared memory does not suffice."""
    tile_m = 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64
    splits = 8
    while splits > packed.flags.shape[1]:
        splits //= 2
    for groups, slots, sums in ((4, 2, 2), (3, 2, 2), (4, 1, 1), (3, 1, 1), (2, 1, 1), (1, 1, 1)):
        config = TileConfig(tile_m, groups, splits, slots, sums)
        if config.held_segments(packed):
            return config
    return None


@functools.cache
def _module(
    config: TileConfig, unit: int, segment: int, kind: int, device: int
) -> CudaModule | None:
    defines = (
        ("TILE_M", config.tile_m),
        ("GROUPS", config.groups),
        ("SPLITS", config.splits),
        ("SLOTS", config.slots),
        ("SUMS", config.sums),
        ("UNIT", unit),
        ("SEGMENT", segment),
        ("KIND", kind),
    )
    threads = config.groups * 128
    module = load_module(("tile_linear.cu",), defines, threads, device, specific=True)
    if module is not None:
        module.allow_shared("tile_linear", SHARED_BYTES)
    return module


@functools.cache
def _clusters_at_once(module: CudaModule, splits: int, shared_bytes: int) -> int:
    return module.active_clusters("tile_linear", splits, shared_bytes)


def tile_linear_cuda(
    x: Tensor,
    packed: TileWeight,
    bias: Tensor | None,
    activation: str,
    config: TileConfig,
    out: Tensor | None = None,
) -> Tensor | None:
    """Launch the kernel; None where it cannot be compiled.

    Args:
        x: fp16 or bf16, ``(M, K)``, M >= 1.
        packed: weight of the same dtype.
        bias: ``[N]``, contiguous, of the same dtype, or None.
        activation: one of ``ACTIVATIONS``.
        config: how to cut the launch.
        out: contiguous ``(M, N)`` of the same dtype to write into, or None for a new one.
    """
    device = x.device.index
    module = _module(config, packed.unit, packed.segment, KINDS[x.dtype], device)
    if module is None:
        return None
    if x.stride(1) != 1:
        x = x.contiguous()
    (rows, in_features), out_features = x.shape, packed.shape[0]
    if out is None:
        out = x.new_empty(rows, out_features)
    strips, segments = packed.flags.shape[:2]
    x_stride = x.stride(0) if rows > 1 else in_features
    shared_bytes = config.shared_bytes(packed)
    wanted = cdiv(cdiv(out_features, GROUP_ROWS), config.groups)
    clusters = min(wanted, _clusters_at_once(module, config.splits, shared_bytes))
    args = _Args(
        flags=packed.flags.data_ptr(),
        offset=packed.offset.data_ptr(),
        val=packed.val.data_ptr(),
        x=x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=out.data_ptr(),
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        x_stride=x_stride,
        segments=segments,
        strips=strips,
        slot_rows=packed.segment_rows,
        held_segments=config.held_segments(packed),
        clusters=clusters,
        activation=ACTIVATIONS.index(activation),
        x_aligned=int(x.data_ptr() % 16 == 0 and (rows == 1 or x_stride % 8 == 0)),
        scale=SCALES,
    )
    grid = (clusters * config.splits, cdiv(rows, config.tile_m))
    with torch.cuda.device(device):
        module.launch("tile_linear", grid, args, shared_bytes=shared_bytes)
    return out


# -- any device ------------------------------------------------------------------------------
def tile_linear(
    x: Tensor, packed: TileWeight, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """``act(x @ weight.T + bias)``, summed in fp32.

    Args:
        x: fp32, fp16 or bf16, ``(M, K)``, any strides.
        packed: weight ``(N, K)``; its values are rounded to the dtype of ``x``.
        bias: ``[N]`` or None; rounded to the dtype of ``x``.
        activation: one of ``kernels.plan.ACTIVATIONS``.

    Returns:
        ``(M, N)``, contiguous, dtype of ``x``.

    Raises:
        ArgumentError: an argument does not fit the weight.
    """
    check_x(x, packed)
    check_choice(activation, ACTIVATIONS, name="activation")
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if runs_on_tensor_cores(x) and x.shape[0]:
        own = packed
        if packed.val.dtype != x.dtype:
            own = TileWeight.from_tensors(
                (packed.flags, packed.offset, packed.val.to(x.dtype)), packed.layout, packed.shape
            )
        config = tile_config(x.shape[0], own)
        y = None if config is None else tile_linear_cuda(x, own, bias, activation, config)
        if y is not None:
            return y
    y = F.linear(x, unpack_tiles(packed).to(x.dtype), bias)
    return y if activation == "none" else apply_activation(y.float(), activation).to(x.dtype)


def runs_on_tensor_cores(x: Tensor) -> bool:
    """Whether ``tile_linear.cu`` is for the device and dtype of ``x``."""
    if not x.is_cuda or x.dtype not in KINDS or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(x.device) == HOPPER


def check_x(x: Tensor, packed: TileWeight) -> None:
    """Raise unless ``x`` is a matrix with the columns of the weight, on its device."""
    if x.dim() != 2 or x.shape[1] != packed.shape[1] or not x.is_floating_point():
        raise ArgumentError(
            f"x: expected a floating point matrix (M, {packed.shape[1]}), "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if x.device != packed.val.device:
        raise ArgumentError(f"x: expected device {packed.val.device}, got {x.device}")

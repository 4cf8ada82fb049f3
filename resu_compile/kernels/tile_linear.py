"""Linear layer on a packed weight, decoded straight into tensor-core fragments.

    y[m, n] = act(sum_k weight[n, k] * x[m, k] + bias[n])

``tile_linear.cu`` runs on Hopper in fp16 and bf16; elsewhere, and in fp32, the weight is unpacked
into a temporary and the dense product follows.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, check_choice
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._triton import cdiv
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.tile_weight import STEP, TileWeight, unpack_tiles

FILES = ("tile_common.cu", "tile_linear.cu")
KINDS = {torch.bfloat16: 1, torch.float16: 2}  # KIND of tile_linear.cu
HOPPER = (9, 0)  # compute capability: wgmma exists on no other
SHARED_BYTES = 232448  # shared memory that one block may have on sm_90
GROUP_ROWS = 64  # rows of the weight that a warpgroup multiplies
TILE_ROWS = (8, 16, 32, 64)  # rows of x that a block may take
SCALES = (ctypes.c_int * 8)(*(128 >> i for i in range(8)))  # see tile_linear.cu
# Blocks start while the kernel before them still runs. That is safe: all threads wait for it (and
# so for all before it) ahead of their first read or write of global memory, so that a weight or an
# x that it writes is read whole. 23.3 us against 23.9 us on an H200 in a CUDA graph, bf16,
# 14336x4096 at 70 %, 8 rows of x; 0.3 to 1.2 us in most cuts.
OVERLAP = True

# How launches are cut, after the times of tests/kernels/tile_times.json.
# Warpgroups of a block, by rows of x: fewer do not keep a multiprocessor busy, and with more there
# is no room for x.
GROUPS = {8: (1, 2, 3, 4), 16: (1, 2, 3, 4), 32: (2, 3), 64: (1, 2)}
# Blocks of a cluster; fewer where a weight has fewer segments.
SPLITS = {8: (4, 8), 16: (4, 8), 32: (4, 8), 64: (8,)}
# Clusters that run at once on the 132 multiprocessors of an H200, by blocks of a cluster: the
# driver's answer for 4 and 8, which stay in one part (GPC) of the chip. The launch asks again.
CLUSTERS = {8: 15, 4: 30, 2: 66, 1: 132}


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
class TileShape:
    """What the cut of a launch depends on.

    Attributes:
        out_features: rows of the weight.
        segments: segments of a strip.
        unit: see ``TileWeight``.
        segment: see ``TileWeight``.
        segment_rows: see ``TileWeight``.
    """

    out_features: int
    segments: int
    unit: int
    segment: int
    segment_rows: int

    @classmethod
    def of(cls, packed: TileWeight) -> TileShape:
        """The numbers of a weight."""
        return cls(packed.shape[0], packed.flags.shape[1], *packed.layout)


@dataclass(frozen=True)
class TileConfig:
    """How one launch is cut.

    Attributes:
        tile_m: rows of x of a block, one of ``TILE_ROWS``.
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

    def fixed_bytes(self, shape: TileShape) -> int:
        """Shared memory of a block for all but x."""
        slot_bytes = (shape.segment // STEP // shape.unit + shape.segment_rows) * 128
        sums = self.sums * GROUP_ROWS * (self.tile_m + 4) * 4 + 24
        return self.groups * (sums + 4 * self.slots * (slot_bytes + 8))

    def own_segments(self, shape: TileShape) -> int:
        """Segments of a strip that a block has, at most."""
        return cdiv(shape.segments, self.splits)

    def held_segments(self, shape: TileShape) -> int:
        """Segments whose x a block holds at once: all of its own if they fit, 0 if none fits."""
        room = SHARED_BYTES - self.fixed_bytes(shape)
        fitting = max(room, 0) // (self.tile_m * shape.segment * 2)
        return min(fitting, self.own_segments(shape))

    def shared_bytes(self, shape: TileShape) -> int:
        """Shared memory of a block."""
        x_bytes = self.held_segments(shape) * self.tile_m * shape.segment * 2
        return self.fixed_bytes(shape) + x_bytes

    def work(self, shape: TileShape) -> float:
        """Blocks of 64 x 256 places that a warpgroup takes one after the other, to compare cuts.

        What else it does is counted in such blocks: to send and add up the sums of 64 rows, more
        for more rows of x; to bring x, an eighth of the work on 64 rows; and to bring it again and
        again where a block of threads cannot hold its columns of it.
        """
        items = cdiv(cdiv(shape.out_features, GROUP_ROWS), CLUSTERS[self.splits])
        own = self.own_segments(shape)
        blocks = own * shape.segment / 256 + 1 / 4 + self.tile_m / 32  # of 64 rows
        work = (cdiv(items, self.groups) + 1 / 8) * blocks
        return work * (1 + self.tile_m / 40) if self.held_segments(shape) < own else work


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


@functools.cache
def tile_config(tile_m: int, shape: TileShape) -> TileConfig | None:
    """The cut with the least work; None if shared memory suffices for none.

    Among equals the one with the fewest blocks in a cluster, and of these the fewest warps.

    Args:
        tile_m: rows of x of a block.
        shape: of the weight.
    """
    splits = [n for n in SPLITS[tile_m] if n <= shape.segments]
    splits = splits or [next(n for n in (4, 2, 1) if n <= shape.segments)]
    # two slots and two buffers of sums; less only where no cut has room for them
    for groups, slots, sums in ((GROUPS[tile_m], 2, 2), ((1,), 2, 1), ((1,), 1, 1)):
        cuts = itertools.product(splits, groups)
        configs = [TileConfig(tile_m, n, split, slots, sums) for split, n in cuts]
        fitting = [config for config in configs if config.held_segments(shape)]
        if fitting:
            return min(fitting, key=operator.methodcaller("work", shape))
    return None


def tile_rows(rows: int) -> int:
    """Rows of x that a block takes of ``rows``."""
    return next((tile for tile in TILE_ROWS if tile >= rows), TILE_ROWS[-1])


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
    module = load_module(FILES, defines, threads, device, specific=True)
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
    *,
    overlap: bool = OVERLAP,
) -> Tensor | None:
    """Launch the kernel; None where it cannot be compiled.

    Args:
        x: fp16 or bf16, ``(M, K)``, M >= 1.
        packed: weight of the same dtype.
        bias: ``[N]``, contiguous, of the same dtype, or None.
        activation: one of ``ACTIVATIONS``.
        config: how to cut the launch.
        out: contiguous ``(M, N)`` of the same dtype to write into, or None for a new one.
        overlap: start before the kernel before has ended, and wait for it inside.
    """
    shape = TileShape.of(packed)
    held_segments, shared_bytes = config.held_segments(shape), config.shared_bytes(shape)
    if not held_segments:
        raise ArgumentError(
            f"config: expected at most {SHARED_BYTES} bytes of shared memory, got {config}"
        )
    if x.stride(1) != 1:
        x = x.contiguous()
    (rows, in_features), out_features = x.shape, packed.shape[0]
    x_stride = x.stride(0) if rows > 1 else in_features
    with torch.cuda.device(x.device):
        module = _module(config, packed.unit, packed.segment, KINDS[x.dtype], x.device.index)
        if module is None:
            return None
        if out is None:
            out = x.new_empty(rows, out_features)
        blocks = cdiv(out_features, GROUP_ROWS)
        clusters = min(blocks, _clusters_at_once(module, config.splits, shared_bytes))
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
            segments=shape.segments,
            strips=packed.flags.shape[0],
            slot_rows=packed.segment_rows,
            held_segments=held_segments,
            clusters=clusters,
            activation=ACTIVATIONS.index(activation),
            x_aligned=int(x.data_ptr() % 16 == 0 and (rows == 1 or x_stride % 8 == 0)),
            scale=SCALES,
        )
        grid = (clusters * config.splits, cdiv(rows, config.tile_m))
        module.launch("tile_linear", grid, args, shared_bytes=shared_bytes, overlap=overlap)
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
    if bias is not None and bias.shape != (packed.shape[0],):
        raise ArgumentError(f"bias: expected shape ({packed.shape[0]},), got {tuple(bias.shape)}")
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if runs_on_tensor_cores(x) and x.shape[0]:
        own = packed
        if packed.val.dtype != x.dtype:
            own = TileWeight.from_tensors(
                (packed.flags, packed.offset, packed.val.to(x.dtype)), packed.layout, packed.shape
            )
        config = tile_config(tile_rows(x.shape[0]), TileShape.of(own))
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

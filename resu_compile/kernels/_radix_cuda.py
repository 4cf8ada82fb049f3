"""What the kernels of radix_select.cu and selective_step.cu are given: arguments and workspace."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from resu_compile.kernels._triton import cdiv

THREADS, QUAD, BINS, FINE, CU_CHUNKS = 512, 4, 2048, 8192, 2048  # as in radix_select.cu
TILE = THREADS * QUAD
HIST_WORDS, FINE_WORDS, STATE_WORDS = 4 * 2 * BINS, 2 * FINE, 32  # of 4 bytes
BLOCKS_PER_SM = 2
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # KEY_KIND of radix_select.cu


class CudaArgs(ctypes.Structure):
    """``struct Args`` of radix_select.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "source", "ema", "ema_abs", "bits")),
        *((name, ctypes.c_void_p) for name in ("marked", "hist", "fine", "state", "counts")),
        *((name, ctypes.c_void_p) for name in ("lengths", "window", "sure", "mask")),
        ("numel", ctypes.c_uint64),
        ("chunk", ctypes.c_uint64),
        ("want", ctypes.c_uint32 * 2),
        *((name, ctypes.c_uint32) for name in ("segments", "window_room", "sure_room")),
        ("adaptive", ctypes.c_uint32),
        *((name, ctypes.c_float) for name in ("lr", "beta", "rest", "delta", "tau", "decay")),
    )


def start_search(
    args: CudaArgs, source: Tensor, want: tuple[int, int], *, fine: bool, list_words: int
) -> tuple[Tensor, int]:
    """Fill in what every search needs.

    Args:
        args: gets source, counters, sizes and ranks.
        source: contiguous, 16-byte aligned.
        want: ranks among the valid and among the marked places; 0 does not limit.
        fine: with bins for a sample.
        list_words: room for lists, in 32-bit words.

    Returns:
        The workspace, to be kept until all is launched, and the address of the lists.
    """
    numel = source.numel()
    zeroed = STATE_WORDS + HIST_WORDS + (FINE_WORDS if fine else 0)
    counts = 2 * CU_CHUNKS
    words = zeroed + counts + list_words
    workspace = torch.empty(words, dtype=torch.int32, device=source.device)
    workspace[:zeroed].zero_()
    args.source = source.data_ptr()
    args.state = workspace.data_ptr()
    args.hist = args.state + 4 * STATE_WORDS
    args.fine = args.hist + 4 * HIST_WORDS
    args.counts = args.state + 4 * zeroed
    args.numel = numel
    args.chunk = cdiv(cdiv(numel, TILE), CU_CHUNKS // 2) * TILE
    args.want[0], args.want[1] = want
    return workspace, args.counts + 4 * counts


def count_blocks(source: Tensor) -> int:
    """Blocks of the passes that count: all that run at once, fewer for a small tensor."""
    multiprocessors = torch.cuda.get_device_properties(source.device).multi_processor_count
    return min(cdiv(source.numel(), 2 * TILE), BLOCKS_PER_SM * multiprocessors)


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all start at a multiple of 16 bytes, as vector accesses need."""
    return all(x.data_ptr() % 16 == 0 for x in tensors)

"""Exact top-k masks by radix histograms over the floats' bits; no sort and no list of indices.

    key(x)  unsigned, ordered as x:   x < y  <=>  key(x) < key(y),  key(-0) = key(+0)
    mask    key above the threshold, or equal to it and at or before the cut

Each pass counts one digit of the keys that agree with the digits found so far, which gives the next
digit of the k-th largest; when several keys equal it, the cut is the index of the last one taken.
Everything stays on the device, so the passes can be captured in a CUDA graph.

The passes look for two ranks at once, among all valid places and among the marked ones (which
``selective_step`` needs); the higher threshold of the two is the result. A rank of 0, or one that
no place reaches, does not limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._radix_cuda import (
    BLOCKS_PER_SM,
    KINDS,
    THREADS,
    TILE,
    CudaArgs,
    count_blocks,
    is_aligned,
    start_search,
)
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl

MAX_NUMEL = 2**31 - 1  # counts are int32 in Triton


# -- reference -------------------------------------------------------------------------------
def topk_mask_reference(score: Tensor, k: int) -> Tensor:
    """Plain meaning of ``topk_mask``."""
    numel = score.numel()
    if k == numel:
        return torch.ones_like(score, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # float64 stays; all else becomes float32, which is exact for 16 bits and known everywhere
    flat = (score if score.dtype == torch.float64 else score.float()).reshape(-1)
    threshold = torch.kthvalue(flat, numel - k + 1).values
    above = flat > threshold
    ties = flat == threshold
    missing = k - above.sum()  # stays on the device: no synchronisation
    mask = above | (ties & (ties.cumsum(0) <= missing))
    return mask.view(score.shape)


# -- Triton ----------------------------------------------------------------------------------
BLOCK = 2048  # elements of a program in one go
PROGRAMS = 1024  # at most, in the passes that count
DIGIT_BITS = (
    7  # 5 passes; a wider tl.histogram costs more than it saves (H200, 2048^2: 8 is slower)
)
CHUNKS = 1024  # at most, of the search among ties
PREFIX, WANT, CUT = 0, 1, 3  # entries of the state, int64; WANT holds two


@jit
def tile_offsets(tile, BLOCK: tl.constexpr):
    """Elements of a tile; int64, since stacked expert weights come near 2**31 elements."""
    return tl.full((BLOCK,), BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)


@jit
def load_bits(bits_ptr, offs, inside):
    """The mask bit of each element, 0 outside."""
    byte = tl.load(bits_ptr + (offs >> 3), mask=inside, other=0).to(tl.int32)
    return ((byte >> (offs & 7).to(tl.int32)) & 1) == 1


@jit
def load_keys(source_ptr, bits_ptr, marked_ptr, offs, numel, STEP: tl.constexpr):
    """Keys, and which of them are valid and marked.

    STEP: keys of magnitudes, valid where ``bits`` is 0; else of scores, all valid, none marked.
    """
    inside = offs < numel
    x = tl.load(source_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    u = x.to(tl.uint32, bitcast=True)
    if STEP:
        key = u << 1
        valid = inside & (load_bits(bits_ptr, offs, inside) == 0)
        marked = load_bits(marked_ptr, offs, inside)
    else:
        top = tl.full(u.shape, 0x80000000, tl.uint32)
        u = tl.where(u == top, tl.zeros_like(u), u)  # -0 ties with +0
        key = tl.where((u & top) != 0, u ^ 0xFFFFFFFF, u | top)
        valid = inside
        marked = inside & False
    return key, valid, marked


@jit
def _digit_kernel(
    source_ptr,
    bits_ptr,
    marked_ptr,
    state_ptr,
    hist_ptr,
    numel,
    SHIFT: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BINS: tl.constexpr = 1 << DIGIT_BITS
    CELLS: tl.constexpr = BINS * 2 if STEP else BINS
    ABOVE: tl.constexpr = (0xFFFFFFFF << (SHIFT + DIGIT_BITS)) & 0xFFFFFFFF
    wants = tl.load(state_ptr + 1) + tl.load(state_ptr + 2)
    if FIRST or wants > 0:
        prefix = tl.load(state_ptr).to(tl.uint32)
        counts = tl.zeros((CELLS,), tl.int32)
        for tile in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            offs = tile_offsets(tile, BLOCK)
            key, valid, marked = load_keys(source_ptr, bits_ptr, marked_ptr, offs, numel, STEP)
            agrees = valid & (((key ^ prefix) & ABOVE) == 0)
            cell = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
            if STEP:
                cell += marked.to(tl.int32) * BINS
            counts += tl.histogram(cell, CELLS, mask=agrees)
        tl.atomic_add(hist_ptr + tl.arange(0, CELLS), counts, mask=counts > 0)


@jit
def _find_digit(counts, bins, want):
    """Digit in which the rank ``want`` falls (-1: none), keys above it, keys in its bin."""
    reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts >= want  # at or above the bin
    digit = tl.sum(reached.to(tl.int32), 0) - 1
    digit = tl.where(want > 0, digit, -1)
    above = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return digit, above, tl.sum(tl.where(bins == digit, counts, 0), 0)


@jit
def _pick_kernel(
    state_ptr,
    hist_ptr,
    want_all,
    want_marked,
    SHIFT: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
):
    BINS: tl.constexpr = 1 << DIGIT_BITS
    bins = tl.arange(0, BINS)
    if not FIRST:
        want_all = tl.load(state_ptr + 1)
        want_marked = tl.load(state_ptr + 2)
    counts = tl.load(hist_ptr + bins).to(tl.int64)
    marked = tl.zeros_like(counts)
    if STEP:
        marked = tl.load(hist_ptr + BINS + bins).to(tl.int64)
        counts += marked
    digit_all, above_all, inside_all = _find_digit(counts, bins, want_all)
    digit_marked, above_marked, inside_marked = _find_digit(marked, bins, want_marked)
    digit = tl.maximum(digit_all, digit_marked)
    # the lower threshold is dropped; a bin that is taken whole settles the rank
    left_all = tl.where((digit_all == digit) & (digit >= 0), want_all - above_all, 0)
    left_marked = tl.where((digit_marked == digit) & (digit >= 0), want_marked - above_marked, 0)
    tl.store(state_ptr + 1, tl.where(left_all == inside_all, 0, left_all).to(tl.int64))
    tl.store(state_ptr + 2, tl.where(left_marked == inside_marked, 0, left_marked).to(tl.int64))
    digit = tl.maximum(digit, 0).to(tl.int64)
    tl.store(state_ptr, tl.load(state_ptr) | (digit << SHIFT))


@jit
def _count_ties_kernel(
    source_ptr,
    bits_ptr,
    marked_ptr,
    state_ptr,
    counts_ptr,
    numel,
    tiles,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    pid = tl.program_id(0)
    if tl.load(state_ptr + 1) + tl.load(state_ptr + 2) > 0:
        prefix = tl.load(state_ptr).to(tl.uint32)
        count = tl.zeros((BLOCK,), tl.int32)
        count_marked = tl.zeros((BLOCK,), tl.int32)
        for tile in range(pid * tiles, pid * tiles + tiles):
            offs = tile_offsets(tile, BLOCK)
            key, valid, marked = load_keys(source_ptr, bits_ptr, marked_ptr, offs, numel, STEP)
            ties = valid & (key == prefix)
            count += ties.to(tl.int32)
            count_marked += (ties & marked).to(tl.int32)
        tl.store(counts_ptr + pid, tl.sum(count, 0))
        tl.store(counts_ptr + CHUNKS + pid, tl.sum(count_marked, 0))


@jit
def _find_cut(
    source_ptr, bits_ptr, marked_ptr, counts_ptr, prefix, want, numel, chunks, tiles,
    MARKED: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Index of the ``want``-th tie; ``numel`` if ``want`` is 0."""
    cut = want * 0 + numel
    if want > 0:
        each = tl.arange(0, CHUNKS)
        counts = tl.load(counts_ptr + each, mask=each < chunks, other=0).to(tl.int64)
        upto = tl.cumsum(counts, 0)
        chunk = tl.sum((upto < want).to(tl.int32), 0)
        seen = tl.sum(tl.where(each < chunk, counts, 0), 0)
        cut = cut * 0
        for tile in range(chunk * tiles, chunk * tiles + tiles):
            offs = tile_offsets(tile, BLOCK)
            key, valid, marked = load_keys(source_ptr, bits_ptr, marked_ptr, offs, numel, STEP)
            ties = valid & (key == prefix)
            if MARKED:
                ties = ties & marked
            rank = seen + tl.cumsum(ties.to(tl.int32), 0)
            cut += tl.sum(tl.where(ties & (rank == want), offs, 0), 0)
            seen += tl.sum(ties.to(tl.int32), 0)
    return cut


@jit
def _cut_kernel(
    source_ptr,
    bits_ptr,
    marked_ptr,
    state_ptr,
    counts_ptr,
    numel,
    chunks,
    tiles,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    prefix = tl.load(state_ptr).to(tl.uint32)
    cut = _find_cut(
        source_ptr, bits_ptr, marked_ptr, counts_ptr, prefix, tl.load(state_ptr + 1), numel,
        chunks, tiles, False, STEP, BLOCK, CHUNKS,
    )  # fmt: skip
    if STEP:
        cut_marked = _find_cut(
            source_ptr, bits_ptr, marked_ptr, counts_ptr + CHUNKS, prefix,
            tl.load(state_ptr + 2), numel, chunks, tiles, True, STEP, BLOCK, CHUNKS,
        )  # fmt: skip
        cut = tl.minimum(cut, cut_marked)
    tl.store(state_ptr + 3, cut)


@jit
def load_taken(state_ptr, key, offs):
    """Whether each key is above the threshold, or equal to it and at or before the cut."""
    threshold = tl.load(state_ptr).to(tl.uint32)
    return (key > threshold) | ((key == threshold) & (offs <= tl.load(state_ptr + 3)))


@jit
def _topk_write_kernel(score_ptr, state_ptr, mask_ptr, numel, BLOCK: tl.constexpr):
    offs = tile_offsets(tl.program_id(0), BLOCK)
    key, inside, _ = load_keys(score_ptr, score_ptr, score_ptr, offs, numel, False)
    tl.store(mask_ptr + offs, load_taken(state_ptr, key, offs), mask=inside)


def find_threshold_triton(
    source: Tensor, bits: Tensor, marked: Tensor, want: tuple[int, int], *, step: bool
) -> Tensor:
    """State of the search after all passes: threshold and cut, for ``load_taken``.

    Args:
        source: contiguous, float32 or 16 bits; the gradient if ``step``, else the score.
        bits: uint8, packed; valid places are 0. Not read unless ``step``, as ``marked``.
        marked: uint8, packed.
        want: ranks among the valid and among the marked places; 0 does not limit.
        step: keys of magnitudes at the valid places; else keys of all scores.
    """
    numel = source.numel()
    shifts = [max(32 - DIGIT_BITS * (i + 1), 0) for i in range(cdiv(32, DIGIT_BITS))]
    cells = 2 << DIGIT_BITS
    state = torch.zeros(4, dtype=torch.int64, device=source.device)
    hist = torch.zeros(len(shifts), cells, dtype=torch.int32, device=source.device)
    keys = (source, bits, marked, state)
    programs = min(cdiv(numel, BLOCK), PROGRAMS)
    found = 32
    for i, shift in enumerate(shifts):
        digit = {"SHIFT": shift, "DIGIT_BITS": found - shift, "FIRST": i == 0, "STEP": step}
        _digit_kernel[(programs,)](*keys, hist[i], numel, **digit, BLOCK=BLOCK)
        _pick_kernel[(1,)](state, hist[i], *want, **digit)
        found = shift
    tiles = cdiv(cdiv(numel, BLOCK), CHUNKS)
    chunks = cdiv(numel, tiles * BLOCK)
    counts = torch.empty(2, CHUNKS, dtype=torch.int32, device=source.device)
    sizes = {"STEP": step, "BLOCK": BLOCK, "CHUNKS": CHUNKS}
    _count_ties_kernel[(chunks,)](*keys, counts, numel, tiles, **sizes)
    _cut_kernel[(1,)](*keys, counts, numel, chunks, tiles, **sizes)
    return state


def topk_mask_triton(score: Tensor, k: int, mask: Tensor) -> None:
    """Write the mask of a contiguous ``score``; 1 <= k <= numel."""
    state = find_threshold_triton(score, score, score, (k, 0), step=False)
    grid = (cdiv(score.numel(), BLOCK),)
    _topk_write_kernel[grid](score, state, mask, score.numel(), BLOCK=BLOCK)


# -- CUDA C++ --------------------------------------------------------------------------------
def topk_module(score: Tensor) -> CudaModule | None:
    """Kernels for this score on its device, or None."""
    defines = (("MODULE", 0), ("KEY_KIND", KINDS[score.dtype]), ("BLOCKS_PER_SM", BLOCKS_PER_SM))
    device = score.device.index
    return load_module(("radix_select.cu",), defines, THREADS, device)


def topk_mask_cuda(module: CudaModule, score: Tensor, k: int, mask: Tensor) -> None:
    """Write the mask of a contiguous, aligned ``score``; 1 <= k <= numel."""
    args = CudaArgs(mask=mask.data_ptr())
    _workspace, _ = start_search(args, score, (k, 0), fine=False, list_words=0)
    for digit in range(3):
        module.launch(f"topk_digit{digit}", count_blocks(score), args)
    module.launch("topk_ties", count_blocks(score), args)
    module.launch("topk_write", cdiv(args.numel, TILE), args)


# -- operator --------------------------------------------------------------------------------
def check_k(numel: int, k: int) -> None:
    """Raise unless ``k`` of ``numel`` places can be taken."""
    if not 0 <= k <= numel:
        raise ArgumentError(f"k: expected an integer in [0, {numel}], got {k}")


@torch.library.custom_op("resu_compile::topk_mask", mutates_args=())
def topk_mask(score: Tensor, k: int) -> Tensor:
    """True at the ``k`` highest scores; ties fall to the lower row-major index.

    On CUDA, float32 and 16-bit scores take radix histograms: CUDA C++ where it compiles, else
    Triton. Everything else takes the reference.

    Args:
        score: floating point, any shape and strides, free of NaN.
        k: number of True entries, in [0, score.numel()].

    Returns:
        bool, contiguous, shape of ``score``, exactly ``k`` True entries.

    Raises:
        ArgumentError: if ``k`` is out of range.
    """
    numel = score.numel()
    check_k(numel, k)
    fits = score.dtype in KINDS and 0 < k < numel <= MAX_NUMEL
    if not (score.is_cuda and HAS_TRITON and fits):
        return topk_mask_reference(score.contiguous(), k)
    score = score.contiguous()
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    with torch.cuda.device(score.device):
        module = topk_module(score) if is_aligned(score) else None
        if module is not None:
            topk_mask_cuda(module, score, k, mask)
        else:
            topk_mask_triton(score, k, mask)
    return mask


@topk_mask.register_fake
def _topk_mask_fake(score: Tensor, k: int) -> Tensor:
    check_k(score.numel(), k)
    return torch.empty(score.shape, dtype=torch.bool, device=score.device)

"""One step of RESU's selective rule on the pruned places P of a weight, in place.

    m <- b m + (1 - b) g        v <- b v + (1 - b) |g|        C = |m| / (v + delta)
    P_mag    = top k_screen of P by |g|
    P_con    = {C > tau}
    P_select = top k_select of P_mag & P_con by |g|, all of them if fewer
    theta   <- theta - lr (C g + decay theta)                  on P_select   (raw)
    theta   <- theta - lr (C m / (v + delta) + decay theta)    on P_select   (adaptive)

Ties by |g| fall to the lower row-major index. m and v decay alike from zero, so that the bias
corrections of the adaptive step cancel.

Source: https://github.com/huy209vn/RESU, PAPER_METHOD_RESU_SELECTIVE.md
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import CudaModule, load_module
from resu_compile.kernels._radix_cuda import (
    BLOCKS_PER_SM,
    KINDS,
    QUAD,
    THREADS,
    TILE,
    CudaArgs,
    count_blocks,
    is_aligned,
    start_search,
)
from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl
from resu_compile.kernels.mask_bits import check_bits, unpack_mask
from resu_compile.kernels.radix_select import (
    MAX_NUMEL,
    find_threshold_triton,
    load_bits,
    load_keys,
    load_taken,
    tile_offsets,
    topk_mask,
)

UPDATE_BLOCK = 1024  # elements per program: at 4 warps and 4 bytes, two 128-bit accesses per thread


class Rule(NamedTuple):
    """Numbers of a step, named as in ``selective_step_reference``."""

    lr: float
    beta: float
    delta: float
    tau: float
    k_screen: int
    k_select: int
    adaptive: bool
    weight_decay: float


class Places(NamedTuple):
    """Tensors of a step: contiguous, of one shape but for the packed ``bits``; averages float32."""

    weight: Tensor
    grad: Tensor
    ema: Tensor
    ema_abs: Tensor
    bits: Tensor


# -- reference -------------------------------------------------------------------------------
def selective_step_reference(
    theta: Tensor,
    grad: Tensor,
    ema: Tensor,
    ema_abs: Tensor,
    *,
    lr: float,
    beta: float,
    delta: float,
    tau: float,
    k_screen: int,
    k_select: int,
    adaptive: bool,
    weight_decay: float = 0.0,
) -> None:
    """Plain meaning of the step, on vectors gathered at P; changes theta and both averages.

    Args:
        theta: ``[p]``, floating point.
        grad: ``[p]``, gradient at P.
        ema: ``[p]``, average of the gradient (m); its dtype is the dtype of the arithmetic.
        ema_abs: ``[p]``, average of the absolute gradient (v), dtype of ``ema``.
        lr: step size.
        beta: decay of both averages, in [0, 1).
        delta: added to v before the division, > 0.
        tau: least consistency C, in [0, 1].
        k_screen: number of places in P_mag; p and above take all.
        k_select: number of places that move at most.
        adaptive: step along ``C m / (v + delta)`` instead of ``C g``.
        weight_decay: decay of the places that move.
    """
    grad = grad.to(ema.dtype)
    ema.mul_(beta).add_(grad, alpha=1.0 - beta)
    magnitude = grad.abs()
    ema_abs.mul_(beta).add_(magnitude, alpha=1.0 - beta)
    direction = ema / (ema_abs + delta)
    consistency = direction.abs()
    screened = topk_mask(magnitude, min(k_screen, magnitude.numel()))
    eligible = screened & (consistency > tau)
    ranked = magnitude.masked_fill(~eligible, -1.0)  # below every magnitude
    selected = eligible & topk_mask(ranked, min(k_select, magnitude.numel()))
    value = theta.to(ema.dtype)
    update = consistency * (direction if adaptive else grad)
    if weight_decay:
        update.add_(value, alpha=weight_decay)
    theta.copy_(torch.where(selected, value.add(update, alpha=-lr), value))


# -- Triton ----------------------------------------------------------------------------------
@jit
def _averages_kernel(
    grad_ptr,
    ema_ptr,
    ema_abs_ptr,
    bits_ptr,
    marked_ptr,
    numel,
    beta,
    rest,
    delta,
    tau,
    BLOCK: tl.constexpr,
):
    offs = tile_offsets(tl.program_id(0), BLOCK)
    inside = offs < numel
    valid = inside & (load_bits(bits_ptr, offs, inside) == 0)
    grad = tl.load(grad_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    ema = tl.fma(grad, rest, tl.load(ema_ptr + offs, mask=valid, other=0.0) * beta)
    ema_abs = tl.load(ema_abs_ptr + offs, mask=valid, other=0.0) * beta
    ema_abs = tl.fma(tl.abs(grad), rest, ema_abs)
    tl.store(ema_ptr + offs, ema, mask=valid)
    tl.store(ema_abs_ptr + offs, ema_abs, mask=valid)
    marked = valid & (tl.abs(tl.div_rn(ema, ema_abs + delta)) > tau)
    places = tl.reshape(marked.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    packed = tl.sum(places, 1).to(tl.uint8)
    tl.store(marked_ptr + byte, packed, mask=byte * 8 < numel)


@jit
def _update_kernel(
    weight_ptr,
    grad_ptr,
    ema_ptr,
    ema_abs_ptr,
    bits_ptr,
    marked_ptr,
    state_ptr,
    numel,
    lr,
    delta,
    decay,
    ADAPTIVE: tl.constexpr,
    DECAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tile_offsets(tl.program_id(0), BLOCK)
    inside = offs < numel
    # all places, not the chosen alone: whole vectors are loaded and stored, at half the time
    key, _, marked = load_keys(grad_ptr, bits_ptr, marked_ptr, offs, numel, True)
    chosen = marked & load_taken(state_ptr, key, offs)
    ema_abs = tl.load(ema_abs_ptr + offs, mask=inside, other=0.0)
    direction = tl.div_rn(tl.load(ema_ptr + offs, mask=inside, other=0.0), ema_abs + delta)
    stored = tl.load(weight_ptr + offs, mask=inside, other=0.0)
    weight = stored.to(tl.float32)
    if ADAPTIVE:
        update = tl.abs(direction) * direction
    else:
        grad = tl.load(grad_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        update = tl.abs(direction) * grad
    if DECAYS:
        update = tl.fma(weight, decay, update)
    weight = tl.fma(update, -lr, weight).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + offs, tl.where(chosen, weight, stored), mask=inside)


def selective_step_triton(places: Places, rule: Rule) -> None:
    """Launch the step."""
    weight, grad, ema, ema_abs, bits = places
    numel = weight.numel()
    marked = torch.empty_like(bits)
    averages = (grad, ema, ema_abs, bits, marked)
    grid = (cdiv(numel, UPDATE_BLOCK),)
    decays = (rule.beta, 1.0 - rule.beta)
    _averages_kernel[grid](*averages, numel, *decays, rule.delta, rule.tau, BLOCK=UPDATE_BLOCK)
    want = (rule.k_screen, rule.k_select)
    if 0 in want:
        return
    state = find_threshold_triton(grad, bits, marked, want, step=True)
    numbers = (rule.lr, rule.delta, rule.weight_decay)
    flags = {"ADAPTIVE": rule.adaptive, "DECAYS": rule.weight_decay != 0.0}
    _update_kernel[grid](weight, *averages, state, numel, *numbers, **flags, BLOCK=UPDATE_BLOCK)


# -- CUDA C++ --------------------------------------------------------------------------------
SAMPLE_BLOCKS = 16  # of 4096 places: the threshold is then known to 2 % of the places or so


def step_module(weight: Tensor, grad: Tensor) -> CudaModule | None:
    """Kernels for these dtypes on this device, or None."""
    defines = (
        ("MODULE", 1),
        ("KEY_KIND", KINDS[grad.dtype]),
        ("WEIGHT_KIND", KINDS[weight.dtype]),
        ("BLOCKS_PER_SM", BLOCKS_PER_SM),
        ("SAMPLE_BLOCKS", SAMPLE_BLOCKS),
    )
    files = ("radix_select.cu", "selective_step.cu")
    return load_module(files, defines, THREADS, weight.device.index)


def selective_step_cuda(module: CudaModule, places: Places, rule: Rule) -> None:
    """Launch the step on aligned tensors."""
    numel = places.weight.numel()
    marked = torch.empty_like(places.bits)
    args = CudaArgs(
        weight=places.weight.data_ptr(),
        source=places.grad.data_ptr(),
        ema=places.ema.data_ptr(),
        ema_abs=places.ema_abs.data_ptr(),
        bits=places.bits.data_ptr(),
        marked=marked.data_ptr(),
        numel=numel,
        adaptive=rule.adaptive,
        lr=rule.lr,
        beta=rule.beta,
        rest=1.0 - rule.beta,
        delta=rule.delta,
        tau=rule.tau,
        decay=rule.weight_decay,
    )
    want = (rule.k_screen, rule.k_select)
    segments = count_blocks(places.grad)
    if 0 in want:
        args.source = places.grad.data_ptr()
        module.launch("step_averages", segments, args)
        return
    # An eighth of all places for the keys in question, of which there are a few hundredths; for
    # the marked keys above them a quarter more than there can be, since segments differ.
    most = cdiv(cdiv(numel, 2 * TILE), segments) * 2 * TILE
    args.segments = segments
    args.window_room = min(most, cdiv(numel // 8, segments * QUAD) * QUAD + TILE)
    args.sure_room = min(most, cdiv(rule.k_select * 5 // 4, segments * QUAD) * QUAD + TILE)
    window, sure = segments * args.window_room, segments * args.sure_room  # 16 and 8 bytes each
    words = 4 * window + 2 * sure + 2 * segments
    _workspace, lists = start_search(args, places.grad, want, fine=True, list_words=words)
    args.window = lists
    args.sure = args.window + 16 * window
    args.lengths = args.sure + 8 * sure
    module.launch("step_fused", segments, args, cooperative=True)


# -- operator --------------------------------------------------------------------------------
def check_step(
    weight: Tensor,
    grad: Tensor,
    ema: Tensor,
    ema_abs: Tensor,
    bits: Tensor,
    n_pruned: int,
    k_screen: int,
    k_select: int,
) -> None:
    """Raise unless the tensors belong together and the counts are none below 0."""
    check_bits(bits, weight.numel())
    for name, x in (("grad", grad), ("ema", ema), ("ema_abs", ema_abs)):
        if x.shape != weight.shape:
            raise ArgumentError(
                f"{name}: expected shape {tuple(weight.shape)} like weight, got {tuple(x.shape)}"
            )
    if ema.dtype != ema_abs.dtype:
        raise ArgumentError(f"ema_abs: expected dtype {ema.dtype} like ema, got {ema_abs.dtype}")
    if not 0 <= n_pruned <= weight.numel():
        raise ArgumentError(
            f"n_pruned: expected an integer in [0, {weight.numel()}], got {n_pruned}"
        )
    for name, k in (("k_screen", k_screen), ("k_select", k_select)):
        if k < 0:
            raise ArgumentError(f"{name}: expected an integer of at least 0, got {k}")


@torch.library.custom_op("resu_compile::selective_step_", mutates_args=("weight", "ema", "ema_abs"))
def selective_step_(
    weight: Tensor,
    grad: Tensor,
    ema: Tensor,
    ema_abs: Tensor,
    bits: Tensor,
    *,
    n_pruned: int,
    lr: float,
    beta: float,
    delta: float,
    tau: float,
    k_screen: int,
    k_select: int,
    adaptive: bool,
    weight_decay: float = 0.0,
) -> None:
    """One selective step on the pruned places of ``weight``; active places keep every bit.

    On CUDA, float32 averages beside float32 or 16-bit weights and gradients take the kernels: CUDA
    C++ where it compiles, else Triton. They round like PyTorch's own kernels and do not wait for
    the device. Everything else takes the reference.

    Args:
        weight: floating point, any shape and strides; theta at its pruned places.
        grad: gradient, shape of ``weight``.
        ema: average of the gradient (m), shape of ``weight``; dtype of the arithmetic.
        ema_abs: average of the absolute gradient (v), like ``ema``.
        bits: uint8, packed mask; the places with bit 0 are pruned.
        n_pruned: number of those places.
        lr: step size.
        beta: decay of both averages, in [0, 1).
        delta: added to v before the division, > 0.
        tau: least consistency, in [0, 1].
        k_screen: number of places in P_mag; ``n_pruned`` and above take all.
        k_select: number of places that move at most.
        adaptive: step along ``C m / (v + delta)`` instead of ``C g``.
        weight_decay: decay of the places that move.

    Raises:
        ArgumentError: tensors that do not belong together, a negative count, or (off the kernels)
            another number of pruned places.
    """
    check_step(weight, grad, ema, ema_abs, bits, n_pruned, k_screen, k_select)
    if n_pruned == 0:
        return
    k_screen, k_select = min(k_screen, n_pruned), min(k_select, n_pruned)
    rule = Rule(lr, beta, delta, tau, k_screen, k_select, adaptive, weight_decay)
    tensors = (weight, grad, ema, ema_abs)
    known = weight.dtype in KINDS and grad.dtype in KINDS and ema.dtype == torch.float32
    if weight.is_cuda and known and HAS_TRITON and weight.numel() <= MAX_NUMEL:
        places = Places._make((*(x.contiguous() for x in tensors), bits))
        with torch.cuda.device(weight.device):
            module = step_module(weight, grad) if is_aligned(*places[:4]) else None
            if module is not None:
                selective_step_cuda(module, places, rule)
            else:
                selective_step_triton(places, rule)
        for x, y in zip(tensors, places, strict=False):
            if x is not y and x is not grad:
                x.copy_(y)
        return
    pruned = ~unpack_mask(bits, weight.shape)
    vectors = [x[pruned] for x in tensors]
    if vectors[0].numel() != n_pruned:
        raise ArgumentError(f"n_pruned: expected {vectors[0].numel()} by bits, got {n_pruned}")
    selective_step_reference(*vectors, **rule._asdict())
    for x, vector in zip(tensors, vectors, strict=True):
        if x is not grad:
            x.masked_scatter_(pruned, vector)


@selective_step_.register_fake
def _selective_step_fake(
    weight: Tensor,
    grad: Tensor,
    ema: Tensor,
    ema_abs: Tensor,
    bits: Tensor,
    *,
    n_pruned: int,
    lr: float,
    beta: float,
    delta: float,
    tau: float,
    k_screen: int,
    k_select: int,
    adaptive: bool,
    weight_decay: float = 0.0,
) -> None:
    check_step(weight, grad, ema, ema_abs, bits, n_pruned, k_screen, k_select)

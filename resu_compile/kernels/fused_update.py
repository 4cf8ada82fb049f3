"""One pass over a masked weight: the optimizer's step at the active places, theta's at the pruned.

    active   adam   w <- (1 - lr wd) w - lr (m / c1) / (sqrt(v / c2) + eps)
             sgd    d = g + l2 w;  b <- mu b + (1 - damping) d;  w <- w - lr b
                    (nesterov: w <- w - lr (d + mu b); without momentum: w <- w - lr d)
    pruned   adam, momentum, sgd as in runtime/rules.py, on all pruned places or a chosen subset
    either   none   value and state stay as they are, bit for bit

A side that does not move gets back the bits that it had. The state of both sides lies in the same
tensors. ``packed_adam`` is the same Adam step with moments for the active places only, as vectors
in the order of the bit rank (kernels/bit_rank.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resu_compile.kernels._triton import HAS_TRITON, cdiv, jit, tl
from resu_compile.kernels.bit_rank import BLOCK as RANK_BLOCK
from resu_compile.kernels.mask_bits import unpack_mask

BLOCK = 1024  # elements a program: at 4 warps and 4 bytes, two 128-bit accesses per thread


@dataclass(frozen=True)
class Step:
    """What one side of the mask does in one step.

    Attributes:
        kind: ``"adam"``, ``"sgd"`` or ``"none"``.
        lr: learning rate.
        weight_decay: decoupled, times ``lr``, for ``"adam"`` and theta; added to the gradient for
            ``"sgd"`` at the active places.
        beta1: decay of the first mean; of ``"sgd"`` the momentum, 0 for none.
        beta2: decay of the second mean; of ``"sgd"`` 1 - the dampening, 1 at a buffer's first step.
        eps: term added to Adam's denominator.
        correction1: 1 - beta1^t of Adam.
        correction2: 1 - beta2^t of Adam.
        nesterov: of ``"sgd"``.
    """

    kind: Literal["none", "adam", "sgd"]
    lr: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 1.0
    eps: float = 0.0
    correction1: float = 1.0
    correction2: float = 1.0
    nesterov: bool = False


STAY = Step("none")


# -- reference -------------------------------------------------------------------------------
def step_reference(
    weight: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    step: Step,
    *,
    coupled: bool,
) -> None:
    """One side's step on tensors of any one shape, in place.

    Args:
        weight: moved.
        grad: of the dtype of the state.
        first: first mean or momentum; None without.
        second: second mean; None without.
        step: what to do.
        coupled: whether the weight decay of ``"sgd"`` joins the gradient.
    """
    if step.kind == "adam":
        assert first is not None
        assert second is not None
        first.lerp_(grad.to(first.dtype), 1.0 - step.beta1)
        second.mul_(step.beta2).addcmul_(grad, grad, value=1.0 - step.beta2)
        root = (second / step.correction2).sqrt_().add_(step.eps)
        weight.mul_(1.0 - step.lr * step.weight_decay)
        weight.addcdiv_(first, root, value=-step.lr / step.correction1)
    elif step.kind == "sgd":
        if coupled and step.weight_decay:
            grad = grad.add(weight, alpha=step.weight_decay)
        elif step.weight_decay:
            weight.mul_(1.0 - step.lr * step.weight_decay)
        if first is not None and step.beta1 != 0.0:
            first.mul_(step.beta1).add_(grad, alpha=step.beta2)
            grad = grad.add(first, alpha=step.beta1) if step.nesterov else first
        weight.add_(grad, alpha=-step.lr)


def fused_update_reference(
    weight: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    bits: Tensor,
    active: Step,
    theta: Step,
    chosen: Tensor | None = None,
) -> None:
    """Plain meaning of ``fused_update``: a side steps all places, and keeps those that are its."""
    mask = unpack_mask(bits, weight.shape)
    for step, side in ((active, mask), (theta, ~mask)):
        if step.kind == "none":
            continue
        states = [first, second] if step.kind == "adam" else [first if step.beta1 else None, None]
        new_weight = weight.clone()
        new_states = [None if state is None else state.clone() for state in states]
        step_reference(new_weight, grad, new_states[0], new_states[1], step, coupled=side is mask)
        moves = side
        if chosen is not None and side is not mask:
            moves = side & unpack_mask(chosen, weight.shape)
        weight.copy_(torch.where(moves, new_weight, weight))
        for state, new in zip(states, new_states, strict=True):
            if state is not None and new is not None:
                state.copy_(torch.where(side, new, state))


# -- Triton ----------------------------------------------------------------------------------
@jit
def _bit(bits_ptr, offs, inside):
    byte = tl.load(bits_ptr + (offs >> 3), mask=inside, other=0).to(tl.int32)
    return ((byte >> (offs & 7).to(tl.int32)) & 1) == 1


@jit
def _adam(w, g, m, v, lr, decay, beta1, beta2, rest1, rest2, eps, c1, c2):
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * (1.0 - lr * decay) - (lr / c1) * m / (tl.sqrt(v / c2) + eps)
    return w, m, v


@jit
def _sgd(w, g, m, lr, beta1, beta2, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    if MOMENTUM:
        m = beta1 * m + beta2 * g
        g = g + beta1 * m if NESTEROV else m
    return w - lr * g, m


@jit
def _fused_update_kernel(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    bits_ptr,
    chosen_ptr,
    numel,
    grad_factor,
    a_lr,
    a_decay,
    a_beta1,
    a_beta2,
    a_rest1,
    a_rest2,
    a_eps,
    a_c1,
    a_c2,
    t_lr,
    t_decay,
    t_beta1,
    t_beta2,
    t_rest1,
    t_rest2,
    t_eps,
    t_c1,
    t_c2,
    ACTIVE: tl.constexpr,
    THETA: tl.constexpr,
    A_MOMENTUM: tl.constexpr,
    T_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: stacked expert weights pass 2**31 elements
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    # whole vectors are read and written, also where a side stays: a mask by bits would split every
    # 16-byte access into four (fp32 4096x4096 on an H200: 0.130 ms; whole vectors: 0.126 ms)
    active = _bit(bits_ptr, offs, inside)
    w = tl.load(w_ptr + offs, mask=inside, other=0).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=inside, other=0).to(tl.float32) * grad_factor
    FIRST: tl.constexpr = ACTIVE == 1 or THETA == 1 or A_MOMENTUM or T_MOMENTUM
    SECOND: tl.constexpr = ACTIVE == 1 or THETA == 1
    m = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    if FIRST:
        m = tl.load(m_ptr + offs, mask=inside, other=0).to(tl.float32)
    if SECOND:
        v = tl.load(v_ptr + offs, mask=inside, other=0).to(tl.float32)

    a_w, a_m, a_v = w, m, v
    if ACTIVE == 1:
        a_w, a_m, a_v = _adam(
            w, g, m, v, a_lr, a_decay, a_beta1, a_beta2, a_rest1, a_rest2, a_eps, a_c1, a_c2
        )
    if ACTIVE == 2:
        a_w, a_m = _sgd(w, g + a_decay * w, m, a_lr, a_beta1, a_beta2, A_MOMENTUM, NESTEROV)
    t_w, t_m, t_v = w, m, v
    if THETA == 1:
        t_w, t_m, t_v = _adam(
            w, g, m, v, t_lr, t_decay, t_beta1, t_beta2, t_rest1, t_rest2, t_eps, t_c1, t_c2
        )
    if THETA == 2:
        kept = w * (1.0 - t_lr * t_decay)
        t_w, t_m = _sgd(kept, g, m, t_lr, t_beta1, t_beta2, T_MOMENTUM, False)
    if CHOSEN:
        t_w = tl.where(_bit(chosen_ptr, offs, inside), t_w, w)

    new_w = tl.where(active, a_w, t_w)
    tl.store(w_ptr + offs, new_w.to(w_ptr.dtype.element_ty), mask=inside)
    if FIRST:
        new_m = tl.where(active, a_m, t_m)
        tl.store(m_ptr + offs, new_m.to(m_ptr.dtype.element_ty), mask=inside)
    if SECOND:
        new_v = tl.where(active, a_v, t_v)
        tl.store(v_ptr + offs, new_v.to(v_ptr.dtype.element_ty), mask=inside)


_KINDS = {"none": 0, "adam": 1, "sgd": 2}


def fused_update_triton(
    weight: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    bits: Tensor,
    active: Step,
    theta: Step,
    chosen: Tensor | None = None,
    grad_factor: float = 1.0,
) -> None:
    """Launch the kernel on contiguous tensors of one shape."""
    _fused_update_kernel[(cdiv(weight.numel(), BLOCK),)](
        weight,
        grad,
        weight if first is None else first,
        weight if second is None else second,
        bits,
        bits if chosen is None else chosen,
        weight.numel(),
        grad_factor,
        *_scalars(active),
        *_scalars(theta),
        ACTIVE=_KINDS[active.kind],
        THETA=_KINDS[theta.kind],
        A_MOMENTUM=active.kind == "sgd" and active.beta1 != 0.0,
        T_MOMENTUM=theta.kind == "sgd" and theta.beta1 != 0.0,
        NESTEROV=active.nesterov,
        CHOSEN=chosen is not None,
        BLOCK=BLOCK,
    )


def _scalars(step: Step) -> tuple[float, ...]:
    return (
        step.lr,
        step.weight_decay,
        step.beta1,
        step.beta2,
        1.0 - step.beta1,  # in double: 1 - 0.999 in float32 is off by 5e-5 of itself
        1.0 - step.beta2,
        step.eps,
        step.correction1,
        step.correction2,
    )


@jit
def _packed_adam_kernel(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    bits_ptr,
    ranks_ptr,
    numel,
    grad_factor,
    lr,
    decay,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    c1,
    c2,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    active = _bit(bits_ptr, offs, inside) & inside
    place = tl.load(ranks_ptr + pid) + tl.cumsum(active.to(tl.int32), 0) - 1
    old = tl.load(w_ptr + offs, mask=inside, other=0)
    w = old.to(tl.float32)
    g = tl.load(g_ptr + offs, mask=inside, other=0).to(tl.float32) * grad_factor
    m = tl.load(m_ptr + place, mask=active, other=0).to(tl.float32)
    v = tl.load(v_ptr + place, mask=active, other=0).to(tl.float32)
    w, m, v = _adam(w, g, m, v, lr, decay, beta1, beta2, rest1, rest2, eps, c1, c2)
    tl.store(w_ptr + offs, tl.where(active, w.to(w_ptr.dtype.element_ty), old), mask=inside)
    tl.store(m_ptr + place, m.to(m_ptr.dtype.element_ty), mask=active)
    tl.store(v_ptr + place, v.to(v_ptr.dtype.element_ty), mask=active)


# -- what the optimizers call ------------------------------------------------------------------
def fused_update(
    weight: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    bits: Tensor,
    active: Step,
    theta: Step,
    chosen: Tensor | None = None,
    grad_factor: float = 1.0,
) -> None:
    """Step both sides of a masked weight in place.

    Args:
        weight: floating point, any shape.
        grad: gradient, shape of ``weight``.
        first: first mean or momentum, shape of ``weight``; None if no side has one.
        second: second mean, shape of ``weight``; None if no side has one.
        bits: uint8, packed mask of ``weight.numel()`` elements.
        active: what the active places do.
        theta: what the pruned places do.
        chosen: packed mask of the pruned places that move; None moves all.
        grad_factor: multiplies the gradient (-1 to maximise, 1 / scale under a GradScaler).
    """
    if runs_fused(weight, grad, first, second):
        fused_update_triton(weight, grad, first, second, bits, active, theta, chosen, grad_factor)
        return
    grad = grad.to(torch.promote_types(weight.dtype, torch.float32)) * grad_factor
    fused_update_reference(weight, grad, first, second, bits, active, theta, chosen)


def packed_adam(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    bits: Tensor,
    ranks: Tensor,
    step: Step,
    grad_factor: float = 1.0,
) -> None:
    """Adam's step at the active places, with packed moments; the pruned places stay.

    Args:
        weight: floating point, any shape.
        grad: gradient, shape of ``weight``.
        first: first mean at the active places, shape ``[nnz]``.
        second: second mean at the active places, shape ``[nnz]``.
        bits: uint8, packed mask of ``weight.numel()`` elements.
        ranks: ``block_ranks(bits, weight.numel(), True)``.
        step: of kind ``"adam"``.
        grad_factor: multiplies the gradient.
    """
    if runs_fused(weight, grad, first, second):
        _packed_adam_kernel[(cdiv(weight.numel(), RANK_BLOCK),)](
            weight,
            grad,
            first,
            second,
            bits,
            ranks,
            weight.numel(),
            grad_factor,
            *_scalars(step),
            BLOCK=RANK_BLOCK,
        )
        return
    mask = unpack_mask(bits, weight.shape)
    part = weight[mask]
    wide = torch.promote_types(weight.dtype, torch.float32)
    step_reference(part, grad[mask].to(wide) * grad_factor, first, second, step, coupled=False)
    weight[mask] = part


def runs_fused(weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the Triton kernels take these tensors: contiguous, on CUDA, of at most 32 bits."""
    return (
        weight.is_cuda
        and HAS_TRITON
        and weight.dtype != torch.float64
        and all(
            x is None or (x.is_contiguous() and x.device == weight.device)
            for x in (weight, *others)
        )
    )

"""Effective weight of a phase: the weight itself forward, a routed gradient backward.

    forward:   w_eff = w                 (theta, or 0, is stored in the pruned places of w)
    backward:  dw = m * dw_eff           (keep_active=True, SPARSE)
               dw = (1 - m) * dw_eff     (keep_active=False, RESU with the active set frozen)

In eager mode the forward copies, because an op may not return its input. A compiled graph costs
nothing forward: ``passes/effective_weight`` puts the weight itself in place of the op once the
backward is traced. (A lowering that returned its input would not do: AOTAutograd would take the
result, saved for backward, for memory that it may use again, and write over the weight.) The
backward lowers to a pointwise expression that reads ``bits[i >> 3] >> (i & 7) & 1`` and fuses with
the kernel that produces the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resu_compile.kernels.mask_bits import check_bits, unpack_mask


# -- reference -------------------------------------------------------------------------------
def route_gradient_reference(grad: Tensor, bits: Tensor, keep_active: bool) -> Tensor:
    """``grad`` where the mask bit equals ``keep_active``, else 0, also in place of a NaN."""
    mask = unpack_mask(bits, grad.shape)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return torch.where(mask if keep_active else ~mask, grad, zero)


# -- operators -------------------------------------------------------------------------------
@torch.library.custom_op("resu_compile::route_gradient", mutates_args=())
def route_gradient(grad: Tensor, bits: Tensor, keep_active: bool) -> Tensor:
    """Gradient of one part of a masked weight.

    Args:
        grad: gradient of the effective weight, floating point, any shape and strides.
        bits: uint8, packed mask of ``grad.numel()`` elements in row-major order.
        keep_active: True keeps the gradient at the active set, False at the pruned set.

    Returns:
        Tensor like ``grad``, strides included: the parameter's own, as the gradient has them.
    """
    check_bits(bits, grad.numel())
    mask = unpack_mask(bits, grad.shape)
    return grad.clone().masked_fill_(~mask if keep_active else mask, 0)


@route_gradient.register_fake
def _route_gradient_fake(grad: Tensor, bits: Tensor, keep_active: bool) -> Tensor:
    check_bits(bits, grad.numel())
    return torch.empty_like(grad)


def _route_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, ctx.keep_active = inputs
    ctx.save_for_backward(bits)


def _route_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (bits,) = ctx.saved_tensors
    return torch.ops.resu_compile.route_gradient(grad, bits, ctx.keep_active), None, None


route_gradient.register_autograd(_route_gradient_backward, setup_context=_route_gradient_setup)


@torch.library.custom_op("resu_compile::effective_weight", mutates_args=())
def effective_weight(weight: Tensor, bits: Tensor, keep_active: bool) -> Tensor:
    """``weight`` forward; backward the gradient reaches one side of the mask only.

    Args:
        weight: floating point, any shape; pruned places hold 0 or theta.
        bits: uint8, packed mask of ``weight.numel()`` elements. It is saved for backward, so a
            mask changed in between raises autograd's version error.
        keep_active: True routes the gradient to the active set, False to the pruned set.

    Returns:
        Tensor equal to ``weight``.
    """
    check_bits(bits, weight.numel())
    return weight.clone()


@effective_weight.register_fake
def _effective_weight_fake(weight: Tensor, bits: Tensor, keep_active: bool) -> Tensor:
    check_bits(bits, weight.numel())
    return torch.empty_like(weight)


effective_weight.register_autograd(_route_gradient_backward, setup_context=_route_gradient_setup)


# -- Inductor lowering -----------------------------------------------------------------------
def register_lowerings() -> None:
    """Teach Inductor the pointwise op. Called by the backend, so that importing stays light."""
    import sympy  # type: ignore[import-untyped]
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings, register_lowering
    from torch._inductor.virtualized import ops
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    if torch.ops.resu_compile.route_gradient.default in lowerings:
        return

    @register_lowering(torch.ops.resu_compile.route_gradient, type_promotion_kind=None)
    def _lower_route_gradient(grad: Any, bits: Any, keep_active: bool) -> Any:
        size = grad.get_size()
        dtype = grad.get_dtype()
        load_grad = grad.make_loader()
        load_bits = bits.make_loader()
        integers = {torch.float32: torch.int32, torch.float64: torch.int64}
        as_integer = integers.get(dtype) if grad.get_device().type == "cpu" else None

        def inner(index: Any) -> Any:
            flat = sympy.S.Zero
            for position, extent in zip(index, size, strict=True):
                flat = flat * extent + position
            byte = ops.to_dtype(load_bits([FloorDiv(flat, 8)]), torch.int32)
            shift = ops.index_expr(ModularIndexing(flat, 1, 8), torch.int32)
            one = ops.constant(1, torch.int32)
            bit = ops.bitwise_and(ops.bitwise_right_shift(byte, shift), one)
            if as_integer is not None:
                # all ones or all zeros: a random branch an element costs more than the arithmetic
                # (fp32 1024x1024, one thread of a Zen 5: 2.5 ms by where, 1.0 ms like this)
                kept = ops.neg(bit) if keep_active else ops.sub(bit, one)
                value = ops.to_dtype_bitcast(load_grad(index), as_integer, dtype)
                value = ops.bitwise_and(value, ops.to_dtype(kept, as_integer))
                return ops.to_dtype_bitcast(value, dtype, as_integer)
            keep = ops.eq(bit, ops.constant(int(keep_active), torch.int32))
            return ops.where(keep, load_grad(index), ops.constant(0.0, dtype))

        return ir.Pointwise.create(
            device=grad.get_device(), dtype=dtype, inner_fn=inner, ranges=size
        )

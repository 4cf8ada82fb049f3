"""Sparse linear layer: one operator in front of every way to compute it.

    y = activation(x @ W.T (+ bias)),   W: (N, K), dense or packed

Which way is fastest depends on the number of rows of ``x``, so the operator carries a plan, one
``Kernel`` for each bucket of row counts; a graph compiled once takes the fastest at every batch
size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.kernels.csr_linear import has_csr_kernel
from resu_compile.kernels.packed_linear import (
    PackedLinear,
    Part,
    format_of,
    part_to_unpack,
    parts_of,
    unpack_parts,
)
from resu_compile.kernels.plan import (
    ACTIVATIONS,
    BUCKET_ROWS,
    Kernel,
    apply_activation,
    batch_bucket,
)

# dtypes of x that the kernels for CUDA take; others go by the dense product
_CUDA_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_BUCKETS = len(BUCKET_ROWS)
_ACTIVATIONS = frozenset(ACTIVATIONS)
# plain numbers: comparing with members of the enum costs a call at each comparison
_DENSE, _CSR, _UNPACK = int(Kernel.DENSE), int(Kernel.CSR), int(Kernel.UNPACK)


# -- reference -------------------------------------------------------------------------------
def sparse_linear_reference(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """Plain PyTorch meaning of the op: the dense product with the unpacked weight."""
    y = F.linear(x, packed.unpack().to(x.dtype), None if bias is None else bias.to(x.dtype))
    return apply_activation(y, activation)


# -- operator --------------------------------------------------------------------------------
def sparse_linear(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """``activation(F.linear(x, weight, bias))``, by the kernel planned for the rows of ``x``.

    Args:
        x: floating point, ``(..., K)``, any strides; its dtype is that of the computation and of
            the result, and accumulation is in fp32 at least.
        weight: floating point, ``(N, K)``, any strides, or None if only the packed weight is left.
            Read by ``DENSE`` and the backward pass; where it is None they expand the packed one.
        packed: ``PackedLinear.tensors()`` of the weight.
        layout: ``PackedLinear.layout`` of the weight.
        bias: floating point, ``(N,)``, or None. Weight, values and bias may be of another dtype
            than x and are then rounded to it, as autocast does.
        shape: N and K.
        plan: the ``Kernel`` of each bucket of row counts, ``len(BUCKET_ROWS)`` of them. Where one
            cannot run (CSR off the CPU, a dtype that it does not take) the packed weight is
            expanded for the dense product.
        activation: one of ``ACTIVATIONS``; sparse kernels apply it before they round. Only
            ``"none"`` has a gradient.

    Returns:
        Contiguous ``(..., N)`` of the dtype of x. The gradient is that of the dense product.

    Raises:
        ArgumentError: shapes, layout or plan do not fit together, or the plan asks for a format
            that is not there.
        ArgumentTypeError: x, weight or bias is not floating point.
    """
    y: Tensor = torch.ops.resu_compile.sparse_linear.default(
        x, weight, packed, layout, bias, shape, plan, activation
    )
    return y


def _sparse_linear(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str,
) -> Tensor:
    parts = parts_of(tuple(layout))
    _check(x, weight, packed, parts, bias, shape, plan, activation)
    out_features, in_features = shape
    sizes = x.shape
    rows = sizes[0] if len(sizes) == 2 else math.prod(sizes[:-1])
    x2 = x if len(sizes) == 2 else x.reshape(rows, in_features)
    if rows == 0 or out_features == 0:
        return x.new_empty((*sizes[:-1], out_features))
    kernel = plan[batch_bucket(rows)]
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    part = None if kernel in (_DENSE, _UNPACK) else _planned(kernel, parts, plan)
    if part is None or not in_features or not _runs(part.kernel, x):
        if weight is None or kernel == _UNPACK:
            weight = unpack_parts(packed, parts, (out_features, in_features))
        part = None
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):  # x has its dtype already
        with torch.autocast(device_type, enabled=False):
            y = _product(x2, weight, packed, part, (out_features, in_features), bias, activation)
    else:
        y = _product(x2, weight, packed, part, (out_features, in_features), bias, activation)
    return y if len(sizes) == 2 else y.view(*sizes[:-1], out_features)


def _product(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    part: Part | None,
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """By the format ``part``, or densely if there is none."""
    if part is not None:
        form = format_of(part.kernel)
        own = form.from_tensors(packed[part.start : part.stop], part.layout, shape)
        return form.linear(x, own, bias, activation)
    assert weight is not None
    y = F.linear(x, weight.to(x.dtype), bias)
    if activation != "none":
        y = apply_activation(y, activation)
    return y.contiguous()


def _planned(kernel: int, parts: Mapping[int, Part], plan: Sequence[int]) -> Part:
    part = parts.get(kernel)
    if part is None:
        raise ArgumentError(
            f"packed: expected the format of Kernel.{Kernel(kernel).name}, which the plan "
            f"{_names(plan)} asks for, got {_names(parts) or 'none'}; pack the weight with "
            "pack_linear(weight, mask, plan) or take that kernel out of the plan"
        )
    return part


def _runs(kernel: int, x: Tensor) -> bool:
    """Whether ``kernel`` can take ``x``; on the CPU those for CUDA have a plain reference."""
    if kernel == _CSR:
        return has_csr_kernel(x.device, x.dtype)
    return x.dtype in _CUDA_DTYPES


# -- checks ----------------------------------------------------------------------------------
def _check(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    parts: Mapping[int, Part],
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str,
) -> None:
    """Raise unless all fits together; one expression first, since most calls pass."""
    sizes, expected = x.shape, 0
    for part in parts.values():
        expected = part.stop  # ascending
    if (
        len(shape) == 2
        and len(sizes)
        and sizes[-1] == shape[1]
        and x.is_floating_point()
        and (weight is None or (weight.shape == (*shape,) and weight.is_floating_point()))
        and (bias is None or (bias.shape == (shape[0],) and bias.is_floating_point()))
        and (weight is not None or expected)
        and len(packed) == expected
        and len(plan) == _BUCKETS
        and activation in _ACTIVATIONS
    ):
        return
    _explain(x, weight, packed, expected, bias, shape, plan, activation)


def _explain(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    expected: int,
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str,
) -> None:
    if len(shape) != 2:
        raise ArgumentError(f"sparse_linear: expected shape (N, K), got {tuple(shape)}")
    out_features, in_features = shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ArgumentError(
            f"sparse_linear: expected x of shape (..., {in_features}) for weight "
            f"({out_features}, {in_features}), got {tuple(x.shape)}"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ArgumentTypeError(
                f"sparse_linear: expected {name} of a floating point dtype, got {tensor.dtype}"
            )
    if weight is not None and tuple(weight.shape) != tuple(shape):
        raise ArgumentError(
            f"sparse_linear: expected weight of shape {tuple(shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ArgumentError(
            f"sparse_linear: expected bias of shape ({out_features},), got {tuple(bias.shape)}"
        )
    if len(packed) != expected:
        raise ArgumentError(
            f"sparse_linear: expected {expected} packed tensors for this layout, got {len(packed)}"
        )
    if weight is None and not packed:
        raise ArgumentError(
            "sparse_linear: expected a dense weight or a packed one, got neither; "
            "pack_linear(weight, mask, kernels) packs it"
        )
    if len(plan) != _BUCKETS:
        raise ArgumentError(
            f"sparse_linear: expected a plan of {_BUCKETS} kernels, one for each bucket of "
            f"{BUCKET_ROWS} rows, got {len(plan)}"
        )
    raise ArgumentError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def _names(kernels: Sequence[int] | Mapping[int, Part]) -> str:
    return ", ".join(dict.fromkeys(Kernel(kernel).name for kernel in kernels))


# -- registration ----------------------------------------------------------------------------
# torch.library.custom_op would wrap each call in two further Python functions
_library = torch.library.Library("resu_compile", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor? weight, Tensor[] packed, int[] layout, Tensor? bias, "
    "int[] shape, int[] plan, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("resu_compile::sparse_linear", lib=_library)
def _sparse_linear_fake(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str,
) -> Tensor:
    parts = parts_of(tuple(layout))
    _check(x, weight, packed, parts, bias, shape, plan, activation)
    for kernel in plan:
        if kernel not in (_DENSE, _UNPACK):
            _planned(kernel, parts, plan)
    if _UNPACK in plan and part_to_unpack(parts) is None:
        raise ArgumentError(
            f"packed: expected a format to expand for Kernel.UNPACK in the plan {_names(plan)}, "
            "got none; pack_linear(weight, mask, plan) makes one"
        )
    return x.new_empty((*x.shape[:-1], shape[0]))


# opaque, because a backward pass is traced and the kernels that unpack cannot be
@torch.library.custom_op("resu_compile::unpack_linear", mutates_args=())
def unpack_linear(
    packed: Sequence[Tensor], layout: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The dense ``(N, K)`` weight out of ``PackedLinear.tensors()``, in another dtype. No gradient.

    Args:
        packed: ``PackedLinear.tensors()``, of at least one format.
        layout: ``PackedLinear.layout``.
        shape: N and K.
        dtype: of the result.
    """
    dense = unpack_parts(packed, parts_of(tuple(layout)), (shape[0], shape[1]))
    return dense.to(dtype, memory_format=torch.contiguous_format)


@unpack_linear.register_fake
def _unpack_linear_fake(
    packed: Sequence[Tensor], layout: Sequence[int], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return packed[0].new_empty(tuple(shape), dtype=dtype)


class _Gradient(torch.autograd.Function):
    """The dense product's gradient; takes x, weight and bias before the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        keyset: torch._C.DispatchKeySet,
        rest: tuple[Any, ...],
    ) -> Tensor:
        packed, layout, shape, plan, activation = rest
        if activation != "none":
            raise ArgumentError(
                f"activation: expected 'none' where a gradient is needed, got {activation!r}, "
                "which is for inference; call it under torch.no_grad() or apply the activation "
                "afterwards"
            )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.layout, ctx.shape = tuple(layout), tuple(shape)
        ctx.save_for_backward(x, weight, *(packed if weight is None else ()))
        return _below_autograd(keyset, x, weight, packed, layout, bias, shape, plan, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *packed = ctx.saved_tensors
        out_features, in_features = ctx.shape
        rows = math.prod(x.shape[:-1])
        grad = grad.reshape(rows, out_features)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                dense = torch.ops.resu_compile.unpack_linear.default(
                    packed, ctx.layout, ctx.shape, grad.dtype
                )
            else:
                dense = weight.to(grad.dtype)
            grad_x = (grad @ dense).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x.reshape(rows, in_features)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _below_autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = torch.ops.resu_compile.sparse_linear.default.redispatch(
            keyset & torch._C._after_autograd_keyset, *args
        )
        return y


def _autograd(
    keyset: torch._C.DispatchKeySet,
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str,
) -> Tensor:
    """What ``torch.library.register_autograd`` makes, with a short cut for inference.

    Without a gradient, a tracer or a tensor subclass, the kernel is called from here: dispatching
    once more converts all arguments again (5.1 of 12.9 us a call, one thread of an AMD EPYC).
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        rest = (packed, layout, shape, plan, activation)
        y: Tensor = _Gradient.apply(x, weight, bias, keyset, rest)
        return y
    if type(x) in _PLAIN and torch._C._len_torch_dispatch_stack() == 0:
        return _sparse_linear(x, weight, packed, layout, bias, shape, plan, activation)
    return _below_autograd(keyset, x, weight, packed, layout, bias, shape, plan, activation)


_PLAIN = (Tensor, torch.nn.Parameter)
_library.impl("sparse_linear", _autograd, "Autograd", with_keyset=True)


def sparse_linear_autocast(
    x: Tensor,
    weight: Tensor | None,
    packed: Sequence[Tensor],
    layout: Sequence[int],
    bias: Tensor | None,
    shape: Sequence[int],
    plan: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """``sparse_linear`` with the result dtype that ``F.linear`` has under the current autocast.

    For graphs that are traced: whether autocast is on is read while tracing. Only x is cast here;
    the op rounds weight, values and bias where it reads them, so no cast copy of the dense weight
    is made on the sparse path.
    """
    device_type = x.device.type
    if (
        torch.is_autocast_enabled(device_type)
        and x.is_floating_point()
        and x.dtype != torch.float64  # autocast leaves fp64 alone
    ):
        x = x.to(torch.get_autocast_dtype(device_type))
    return sparse_linear(x, weight, packed, layout, bias, shape, plan, activation)

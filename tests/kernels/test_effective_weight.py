from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels.effective_weight import (
    effective_weight,
    register_lowerings,
    route_gradient,
    route_gradient_reference,
)
from resu_compile.kernels.mask_bits import pack_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    pytest.param((16, 32), id="even"),
    pytest.param((1, 1), id="one"),
    pytest.param((5, 7), id="ragged"),
    pytest.param((3,), id="vector"),
    pytest.param((3, 5, 7), id="experts"),
    pytest.param((4, 3, 3, 3), id="convolution"),
    pytest.param((0, 4), id="empty"),
]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape) if t.numel() else t,
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


def make(shape, dtype=torch.float32, layout="contiguous", device="cpu"):
    value = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    mask = torch.rand(shape, device=device) > 0.5
    return value, mask, pack_mask(mask)


# -- reference ---------------------------------------------------------------------------------
@pytest.mark.parametrize("keep_active", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_route_gradient_matches_reference(shape, dtype, layout, keep_active, device):
    grad, mask, bits = make(shape, dtype, layout, device)
    out = route_gradient(grad, bits, keep_active)
    assert_close(out, route_gradient_reference(grad, bits, keep_active), rtol=0, atol=0)
    assert_close(out, grad * (mask if keep_active else ~mask), rtol=0, atol=0)
    assert out.stride() == torch.empty_like(grad).stride()
    assert out.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr() or not grad.numel()


def test_what_is_not_finite_is_zeroed_too():
    grad = torch.full((4, 4), float("nan"))
    grad[0, 0] = float("inf")
    bits = pack_mask(torch.zeros(4, 4, dtype=torch.bool))
    assert not route_gradient(grad, bits, True).any()
    assert_close(route_gradient(grad, bits, False), grad, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_effective_weight_is_a_copy_of_the_weight(layout):
    weight, _, bits = make((4, 3, 3, 3), layout=layout)
    out = effective_weight(weight, bits, True)
    assert_close(out, weight, rtol=0, atol=0)
    assert out.data_ptr() != weight.data_ptr()


# -- autograd ----------------------------------------------------------------------------------
@pytest.mark.parametrize("keep_active", [True, False])
def test_gradients(keep_active):
    weight, mask, bits = make((5, 7), torch.float64)
    weight.requires_grad_()
    effective_weight(weight, bits, keep_active).square().sum().backward()
    assert_close(weight.grad, 2 * weight.detach() * (mask if keep_active else ~mask))
    grad = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda g: route_gradient(g, bits, keep_active), (grad,))


def test_a_mask_changed_before_backward_raises():
    weight, _, bits = make((5, 7))
    out = effective_weight(weight.requires_grad_(), bits, True)
    bits.bitwise_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- operators ---------------------------------------------------------------------------------
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("op", ["effective_weight", "route_gradient"])
def test_opcheck(op, shape, layout, requires_grad, device):
    value, _, bits = make(shape, layout=layout, device=device)
    overload = getattr(torch.ops.resu_compile, op).default
    torch.library.opcheck(overload, (value.requires_grad_(requires_grad), bits, True))


@pytest.mark.parametrize("op", [effective_weight, route_gradient])
def test_masks_that_do_not_fit_raise(op):
    with pytest.raises(ArgumentError, match=r"bits: expected uint8 of shape \(5,\) for 35"):
        op(torch.randn(5, 7), torch.zeros(4, dtype=torch.uint8), True)
    with pytest.raises(ArgumentError, match=r"got torch.bool of shape \(5,\)"):
        op(torch.randn(5, 7), torch.zeros(5, dtype=torch.bool), True)
    with FakeTensorMode(), pytest.raises(ArgumentError, match="bits"):  # while tracing, too
        op(torch.randn(5, 7), torch.zeros(4, dtype=torch.uint8), True)


# -- Inductor ----------------------------------------------------------------------------------
def test_route_gradient_is_fused(device):
    """One compile for all: layouts, ragged sizes, both sides of the mask."""
    register_lowerings()
    shapes = [(5, 7), (3, 5, 7), (4, 3, 3, 3)]
    made = [make(shape, layout=layout, device=device) for shape in shapes for layout in LAYOUTS]
    made += [make((6, 9), dtype, device=device) for dtype in DTYPES for _ in range(2)]
    made[-1][0][0] = float("nan")  # zeroed at the dropped places, like everything else

    def call(grads, bits):
        return [
            route_gradient(grad.sin(), packed, i % 2 == 0)
            for i, (grad, packed) in enumerate(zip(grads, bits, strict=True))
        ]

    grads, bits = [grad for grad, _, _ in made], [bits for _, _, bits in made]
    results, codes = run_and_get_code(torch.compile(call, fullgraph=True), grads, bits)
    for i, (grad, mask, _) in enumerate(made):
        keep = mask if i % 2 == 0 else ~mask
        expected = grad.sin().where(keep, torch.zeros_like(grad))
        assert results[i].dtype == grad.dtype
        assert_close(results[i], expected, equal_nan=True)
        assert not results[i][~keep].any()
    lines = [line for line in "".join(codes).splitlines() if not line.lstrip().startswith("#")]
    assert "torch.ops.resu_compile" not in "\n".join(lines)

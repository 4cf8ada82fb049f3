"""The fused step of both sides of a mask: kernel against reference, what may not be touched."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.bit_rank import BLOCK as RANK_BLOCK
from resu_compile.kernels.bit_rank import block_ranks
from resu_compile.kernels.fused_update import (
    STAY,
    Step,
    _packed_adam_kernel,
    _scalars,
    fused_update,
    fused_update_reference,
    fused_update_triton,
    packed_adam,
)
from resu_compile.kernels.mask_bits import pack_mask

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

ADAM = Step("adam", 0.1, 0.2, 0.9, 0.99, 1e-8, 1 - 0.9**3, 1 - 0.99**3)
THETA_ADAM = Step("adam", 0.02, 0.0, 0.8, 0.95, 1e-6, 1 - 0.8**2, 1 - 0.95**2)
SGD = Step("sgd", 0.1, 0.2)
MOMENTUM = Step("sgd", 0.1, 0.2, 0.9, 0.7, nesterov=False)
NESTEROV = replace(MOMENTUM, beta2=1.0, nesterov=True)
THETA_MOMENTUM = Step("sgd", 0.03, 0.5, 0.8)
PAIRS = [
    *itertools.product([STAY, ADAM], [STAY, THETA_ADAM, THETA_MOMENTUM, replace(SGD, lr=0.03)]),
    *itertools.product([SGD, MOMENTUM, NESTEROV], [STAY, THETA_MOMENTUM, THETA_ADAM]),
]
SHAPES = [pytest.param((16, 64), id="even"), pytest.param((37, 101), id="ragged"), (1,)]


def make(shape, device, dtype=torch.float32):
    torch.manual_seed(0)
    weight, grad, first = (torch.randn(shape).to(device, dtype) for _ in range(3))
    second = torch.rand(shape).to(device, dtype) + 0.1
    mask = (torch.rand(shape) < 0.4).to(device)
    chosen = (torch.rand(shape) < 0.5).to(device)
    return [weight, grad, first, second], mask, pack_mask(mask), pack_mask(chosen)


@needs_triton
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0].kind}-{p[1].kind}")
def test_kernel_is_the_reference(pair, shape, subset, device):
    tensors, _, bits, chosen = make(shape, device)
    expected = [tensor.clone() for tensor in tensors]
    picked = chosen if subset else None
    fused_update_triton(*tensors, bits, *pair, picked, grad_factor=-0.5)
    fused_update_reference(expected[0], expected[1] * -0.5, *expected[2:], bits, *pair, picked)
    for got, wanted in zip(tensors, expected, strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "impl", [pytest.param(fused_update_triton, marks=needs_triton), fused_update]
)
@pytest.mark.parametrize("pair", [(ADAM, STAY), (STAY, THETA_ADAM), (STAY, STAY)], ids=str)
def test_a_side_that_stays_is_not_touched(impl, pair, device):
    tensors, mask, bits, _ = make((37, 101), device)
    poisoned = ~mask if pair[0] is ADAM else mask
    for tensor in tensors:  # neither read nor written: NaN stays NaN and reaches nobody
        tensor[poisoned] = torch.nan
    before = [tensor.clone() for tensor in tensors]
    impl(*tensors, bits, *pair)
    for got, old in zip(tensors, before, strict=True):
        assert torch.isnan(got[poisoned]).all()
        assert not torch.isnan(got[~poisoned]).any()
        if pair == (STAY, STAY):
            assert_close(got, old, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_nothing_is_written_past_the_end(device):
    numel = 2 * 1024 + 5
    rooms = [torch.full((numel + 64,), 7.0, device=device) for _ in range(4)]
    bits = pack_mask(torch.rand(numel) < 0.5).to(device)
    fused_update_triton(*[room[32:-32] for room in rooms], bits, ADAM, THETA_ADAM)
    for room in rooms:
        assert bool((room[:32] == 7).all())
        assert bool((room[-32:] == 7).all())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_kernel_is_the_reference(shape, dtype, device):
    (weight, grad, first, second), mask, bits, _ = make(shape, device, dtype)
    packed = [first[mask].clone(), second[mask].clone()]
    ranks = block_ranks(bits, weight.numel(), True)
    expected = weight.cpu().clone()
    wanted = [part.cpu().clone() for part in packed]
    packed_adam(expected, grad.cpu(), *wanted, bits.cpu(), ranks.cpu(), ADAM, 0.5)
    grid = (-(-weight.numel() // RANK_BLOCK),)
    _packed_adam_kernel[grid](
        weight, grad, *packed, bits, ranks, weight.numel(), 0.5, *_scalars(ADAM), BLOCK=RANK_BLOCK
    )
    rtol = 1e-5 if dtype == torch.float32 else 2**-6  # a rounding of 8 bits at each of few ops
    assert_close(weight.cpu(), expected, rtol=rtol, atol=rtol / 10)
    for got, want in zip(packed, wanted, strict=True):
        assert_close(got.cpu(), want, rtol=rtol, atol=rtol / 10)


def test_adam_is_torchs_own(device):
    tensors, _, bits, _ = make((6, 5), device)
    weight = tensors[0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    state = [torch.zeros_like(tensors[0]) for _ in range(2)]
    ones = torch.full_like(bits, 255)
    for count in range(1, 4):
        weight.grad = tensors[1] * count
        optimizer.step()
        step = replace(ADAM, correction1=1 - 0.9**count, correction2=1 - 0.99**count)
        fused_update(tensors[0], tensors[1] * count, *state, ones, step, STAY)
    assert_close(tensors[0], weight.detach(), rtol=1e-5, atol=1e-6)

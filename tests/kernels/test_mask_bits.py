"""Packed masks: round trips, the bit layout, zeroing against the reference, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.mask_bits import (
    BLOCK,
    check_bits,
    pack_mask,
    take_pruned_,
    take_pruned_reference,
    take_pruned_triton,
    unpack_mask,
    zero_where_,
    zero_where_reference,
    zero_where_triton,
)
from tests.tolerances import EXACT

SHAPES = [
    pytest.param((16, 64), id="even"),
    pytest.param((1,), id="one"),
    pytest.param((37, 101), id="ragged"),
    pytest.param((3, 5, 7), id="experts"),
    pytest.param((BLOCK + 1,), id="one past a block"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def impls(op, kernel):
    needs = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
    return [pytest.param(op, id="op"), pytest.param(kernel, id="triton", marks=needs)]


ZEROING = impls(zero_where_, zero_where_triton)
TAKING = impls(take_pruned_, take_pruned_triton)

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)


def make(shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, device=device).to(dtype)
    return x, pack_mask(torch.rand(shape, device=device) < 0.4)


# -- bits ------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-math.prod(shape) // 8),)
    assert_close(unpack_mask(bits, shape), mask, **EXACT)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.booleans(), max_size=40))
def test_layout_is_low_bit_first_and_zero_padded(values):
    expected = bytearray(-(-len(values) // 8))
    for place, value in enumerate(values):
        expected[place // 8] |= value << place % 8
    bits = pack_mask(torch.tensor(values, dtype=torch.bool))
    assert bytes(bits.tolist()) == bytes(expected)


@settings(deadline=None, max_examples=40)
@given(data=st.binary(min_size=1, max_size=20))
def test_every_bit_pattern_is_a_mask(data):
    bits = torch.tensor(list(data), dtype=torch.uint8)
    assert_close(pack_mask(unpack_mask(bits, (8 * len(data),))), bits, **EXACT)


def test_strides_do_not_matter():
    mask = torch.rand(5, 9) < 0.5
    assert_close(pack_mask(mask.t()), pack_mask(mask.t().contiguous()), **EXACT)


# -- zeroing ---------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("impl", ZEROING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, impl, keep, device):
    x, bits = make(shape, dtype, device)
    expected = zero_where_reference(x, bits, keep)
    assert impl(x, bits, keep) is None
    assert_close(x, expected, **EXACT)  # only selects


@settings(deadline=None, max_examples=60)
@given(shape=shapes, keep=st.booleans(), seed=st.integers(0, 2**31))
def test_the_two_sides_add_up(shape, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    bits = pack_mask(torch.rand(shape, generator=generator) < 0.5)
    kept, dropped = x.clone(), x.clone()
    zero_where_(kept, bits, keep)
    zero_where_(dropped, bits, not keep)
    assert_close(kept + dropped, x, **EXACT)
    assert_close(kept, zero_where_reference(x, bits, keep), **EXACT)


@pytest.mark.parametrize("impl", ZEROING)
def test_nan_and_infinity_become_zero(impl, device):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device)
    impl(x, pack_mask(torch.tensor([False, False, False, True], device=device)), True)
    assert x.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("view", [torch.Tensor.t, lambda x: x[:, ::2], lambda x: x[1:]])
def test_op_on_views(view, keep, device):
    x = view(torch.randn(6, 10, device=device))
    bits = pack_mask(torch.rand(x.shape, device=device) < 0.4)
    expected = zero_where_reference(x, bits, keep)
    zero_where_(x, bits, keep)
    assert_close(x, expected, **EXACT)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("impl", ZEROING)
@pytest.mark.parametrize("numel", [1, 13, BLOCK - 1, BLOCK + 3])
def test_writes_only_its_tensor(numel, impl, keep, device):
    buffer = torch.full((numel + 2 * BLOCK,), 7.0, device=device)
    x = buffer[BLOCK:-BLOCK]
    # all bits of the last byte ask for a 0, those past the end too
    bits = torch.full((-(-numel // 8),), 0 if keep else 255, dtype=torch.uint8, device=device)
    impl(x, bits, keep)
    assert not x.any()
    assert (buffer[:BLOCK] == 7).all()
    assert (buffer[-BLOCK:] == 7).all()


def test_empty(device):
    x, bits = make((0, 4), device=device)
    zero_where_(x, bits, True)
    assert x.shape == (0, 4)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", ["contiguous", "transposed"])
def test_opcheck(form, keep, device):
    x, bits = make((6, 10), device=device)
    x = x if form == "contiguous" else x.t()
    torch.library.opcheck(torch.ops.resu_compile.zero_where_.default, (x, bits, keep))


# -- taking ----------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", TAKING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_taking_matches_reference(shape, dtype, impl, device):
    x, bits = make(shape, dtype, device)
    expected = take_pruned_reference(x, bits)
    out = torch.full_like(x, torch.nan)
    assert impl(x, bits, out) is None
    assert_close((x, out), expected, **EXACT)  # only selects


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_what_is_taken_can_be_added_back(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.5
    left, out = x.clone(), torch.empty_like(x)
    take_pruned_(left, pack_mask(mask), out)
    assert not left[~mask].any()
    assert not out[mask].any()
    assert_close(left + out, x, **EXACT)


@pytest.mark.parametrize("impl", TAKING)
def test_nan_of_active_entries_stays_where_it_is(impl, device):
    x = torch.tensor([torch.nan, torch.nan, torch.inf, 1.0], device=device)
    out = torch.full_like(x, torch.nan)
    impl(x, pack_mask(torch.tensor([True, False, False, True], device=device)), out)
    assert_close(x.tolist(), [torch.nan, 0.0, 0.0, 1.0], equal_nan=True)
    assert_close(out.tolist(), [0.0, torch.nan, torch.inf, 0.0], equal_nan=True)


@pytest.mark.parametrize("impl", TAKING)
@pytest.mark.parametrize("numel", [1, 13, BLOCK - 1, BLOCK + 3])
def test_taking_writes_only_its_tensors(numel, impl, device):
    buffers = [torch.full((numel + 2 * BLOCK,), 7.0, device=device) for _ in range(2)]
    x, out = (buffer[BLOCK:-BLOCK] for buffer in buffers)
    impl(x, torch.zeros(-(-numel // 8), dtype=torch.uint8, device=device), out)
    assert not x.any()
    assert (out == 7).all()
    for buffer in buffers:
        assert (buffer[:BLOCK] == 7).all()
        assert (buffer[-BLOCK:] == 7).all()


@pytest.mark.parametrize("view", [torch.Tensor.t, lambda x: x[:, ::2], lambda x: x[:0]])
def test_taking_from_views(view, device):
    x, out = (view(torch.randn(6, 10, device=device)) for _ in range(2))
    bits = pack_mask(torch.rand(x.shape, device=device) < 0.4)
    expected = take_pruned_reference(x, bits)
    take_pruned_(x, bits, out)
    assert_close((x, out), expected, **EXACT)


@pytest.mark.parametrize("form", ["contiguous", "transposed"])
def test_opcheck_of_taking(form, device):
    x, bits = make((6, 10), device=device)
    x = x if form == "contiguous" else x.t()
    torch.library.opcheck(
        torch.ops.resu_compile.take_pruned_.default, (x, bits, torch.empty_like(x))
    )


# -- refusals --------------------------------------------------------------------------------
def test_pack_refuses_other_dtypes():
    with pytest.raises(ArgumentError, match=r"expected dtype torch\.bool, got torch\.float32"):
        pack_mask(torch.ones(3))


@pytest.mark.parametrize(
    ("bits", "got"),
    [
        (torch.zeros(2, dtype=torch.uint8), r"torch\.uint8 of shape \(2,\)"),
        (torch.zeros(3, dtype=torch.int32), r"torch\.int32 of shape \(3,\)"),
        (torch.zeros(1, 3, dtype=torch.uint8), r"torch\.uint8 of shape \(1, 3\)"),
    ],
)
def test_bits_that_do_not_fit(bits, got):
    message = rf"expected uint8 of shape \(3,\) for 20 elements, got {got}"
    for refuse in (
        lambda: check_bits(bits, 20),
        lambda: unpack_mask(bits, (4, 5)),
        lambda: zero_where_(torch.ones(4, 5), bits, True),
    ):
        with pytest.raises(ArgumentError, match=message):
            refuse()


@pytest.mark.parametrize(
    ("out", "got"),
    [
        (torch.ones(4, 4), r"float32 of shape \(4, 4\) on cpu"),
        (torch.ones(4, 5).double(), r"float64 of shape \(4, 5\) on cpu"),
        (torch.ones(4, 5, device="meta"), r"float32 of shape \(4, 5\) on meta"),
    ],
)
def test_what_nothing_can_be_moved_to(out, got):
    x, bits = make((4, 5))
    before = x.clone()
    message = (
        rf"out: expected torch\.float32 of shape \(4, 5\) on cpu, as x has it, got torch\.{got}"
    )
    with pytest.raises(ArgumentError, match=message):
        take_pruned_(x, bits, out)
    assert_close(x, before, **EXACT)

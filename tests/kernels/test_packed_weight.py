"""Packed weights: exact round trips, the byte layout, refusals, operator checks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError
from resu_compile.kernels.packed_weight import (
    PACKED_WEIGHT_VERSION,
    check_packed,
    pack_weight,
    packed_size_bytes,
    unpack_weight,
    unpack_weight_reference,
)

SHAPES = [
    pytest.param((16, 32), id="even"),
    pytest.param((1,), id="one"),
    pytest.param((37, 101), id="ragged"),
    pytest.param((3, 5, 7), id="experts"),
    pytest.param((2, 3, 3, 3), id="conv"),
    pytest.param((0, 4), id="empty"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
IMPLS = [unpack_weight, unpack_weight_reference]


def make(shape, dtype=torch.float32, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight, torch.rand(shape, generator=generator) < density


def raw(x):
    return x.contiguous().view(torch.uint8)


def masked(weight, mask):
    flat = [w if m else 0.0 for w, m in zip(weight.flatten(), mask.flatten(), strict=True)]
    return torch.stack([torch.as_tensor(v, dtype=weight.dtype) for v in flat]).view(weight.shape)


@pytest.mark.parametrize("impl", IMPLS, ids=["op", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_round_trip_is_exact(impl, dtype, shape, density):
    weight, mask = make(shape, dtype, density)
    values, bits = pack_weight(weight, mask)
    dense = impl(values, bits, list(shape))
    assert dense.dtype == dtype
    assert dense.is_contiguous()
    assert values.numel() == mask.sum()
    if dense.numel():
        assert torch.equal(raw(dense), raw(masked(weight, mask)))
    check_packed(values, bits, shape)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_round_trip_of_any_bits(shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    # every pattern, NaN payloads and infinities included
    patterns = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    weight = patterns.to(torch.int32).view(torch.float32)
    mask = torch.rand(shape, generator=generator) < density
    values, bits = pack_weight(weight, mask)
    assert torch.equal(
        unpack_weight(values, bits, shape).view(torch.int32),
        torch.where(mask, weight.view(torch.int32), 0),
    )
    size = values.numel() * values.itemsize + bits.numel()
    assert size == packed_size_bytes(math.prod(shape), values.numel(), 4)


def test_layout():
    assert PACKED_WEIGHT_VERSION == 1
    weight = torch.arange(10.0).view(2, 5)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    values, bits = pack_weight(weight, mask.view(2, 5))
    assert bits.tolist() == [0b00001001, 0b00000010]
    assert values.tolist() == [0.0, 3.0, 9.0]


def test_strides_do_not_change_the_layout():
    weight, mask = make((6, 10))
    packed = pack_weight(weight, mask)
    for w, m in [(weight.t().contiguous().t(), mask), (weight, mask.t().contiguous().t())]:
        assert all(torch.equal(a, b) for a, b in zip(pack_weight(w, m), packed, strict=True))


def test_values_do_not_alias_the_weight():
    weight, mask = make((4, 4), density=1.0)
    weight.requires_grad_()
    values, _ = pack_weight(weight, mask)
    assert not values.requires_grad
    assert values.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


def test_canary():
    weight, mask = make((5, 7))
    values, bits = pack_weight(weight, mask)
    big_values = torch.full((values.numel() + 8,), 77.0)
    big_values[4:-4] = values
    big_bits = torch.full((bits.numel() + 2,), 255, dtype=torch.uint8)
    big_bits[1:-1] = bits
    before = big_values.clone(), big_bits.clone()
    dense = unpack_weight(big_values[4:-4], big_bits[1:-1], [5, 7])
    assert torch.equal(dense, masked(weight, mask))
    assert torch.equal(big_values, before[0])
    assert torch.equal(big_bits, before[1])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 3, dtype=torch.bool), r"mask of shape \(3, 4\)"),
        (torch.ones(3, 4), "expected a bool mask"),
    ],
)
def test_pack_refuses(mask, message):
    with pytest.raises(ArgumentError, match=message):
        pack_weight(torch.ones(3, 4), mask)


def test_pack_refuses_wide_dtype():
    with pytest.raises(ArgumentError, match="1 to 8 bytes"):
        pack_weight(torch.ones(2, dtype=torch.complex128), torch.ones(2, dtype=torch.bool))


def test_unpack_refuses():
    values, bits = torch.ones(2), torch.tensor([3], dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="expected 1 set bits, one a value, got 2"):
        unpack_weight(values[:1], bits, [2, 2])
    with pytest.raises(ArgumentError, match="expected 0 past the last position"):
        unpack_weight(values[:1], bits, [1])
    with pytest.raises(ArgumentError, match="nnz <= 1"):
        unpack_weight(values, bits, [1, 1])
    with pytest.raises(ArgumentError, match=r"uint8 of shape \(2,\) for 9 elements"):
        unpack_weight(values, bits, [3, 3])
    with pytest.raises(ArgumentError, match="nnz <= 4"):
        unpack_weight(values[None], bits, [2, 2])


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(shape):
    values, bits = pack_weight(*make(shape))
    torch.library.opcheck(unpack_weight, (values, bits, list(shape)))


def test_shape_errors_come_at_trace_time():
    values, bits = pack_weight(*make((4, 4)))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(values), mode.from_tensor(bits)
        assert unpack_weight(*fake, [4, 4]).shape == (4, 4)
        with pytest.raises(ArgumentError, match="for 40 elements"):
            unpack_weight(*fake, [4, 10])


def test_compiles_without_graph_break():
    weight, mask = make((8, 8))
    values, bits = pack_weight(weight, mask)
    unpack = torch.compile(
        lambda v, b: unpack_weight(v, b, [8, 8]) + 1, backend="eager", fullgraph=True
    )
    assert torch.equal(unpack(values, bits), masked(weight, mask) + 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda(shape, dtype):
    weight, mask = make(shape, dtype)
    values, bits = pack_weight(weight.cuda(), mask.cuda())
    dense = unpack_weight(values, bits, list(shape))
    assert dense.is_cuda
    if dense.numel():
        assert torch.equal(raw(dense.cpu()), raw(masked(weight, mask)))
    if dtype.itemsize > 1:  # opcheck's own allclose has no float8 on CUDA
        torch.library.opcheck(unpack_weight, (values, bits, list(shape)))

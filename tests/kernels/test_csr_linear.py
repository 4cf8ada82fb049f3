"""CSR weights and their product on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels.csr_linear import (
    CsrWeight,
    csr_linear,
    csr_linear_reference,
    csr_pack,
    csr_unpack,
)
from resu_compile.kernels.plan import ACTIVATIONS
from tests.tolerances import EXACT, matmul_tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [
    pytest.param((64, 64), id="even"),
    pytest.param((1, 1), id="one"),
    pytest.param((37, 101), id="ragged"),
    pytest.param((5, 300), id="long rows"),
]


def make_weight(shape, dtype=torch.float32, sparsity=0.7):
    """A random weight with one empty row, where there are rows to spare."""
    weight = torch.randn(shape, dtype=dtype)
    weight = weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) < sparsity, 0)
    if shape[0] > 1:
        weight[shape[0] // 2] = 0
    return weight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)])
def test_pack_is_exact(shape, sparsity, transposed):
    weight = make_weight(shape[::-1] if transposed else shape, sparsity=sparsity)
    weight = weight.t() if transposed else weight
    packed = csr_pack(weight)
    assert_close(csr_unpack(packed), weight, **EXACT)
    assert packed.size_bytes == 4 * (shape[0] + 1) + 8 * int(weight.count_nonzero())
    again = CsrWeight.from_tensors(packed.tensors(), packed.layout, packed.shape)
    assert_close(csr_unpack(again), weight, **EXACT)


def test_pack_by_hand():
    packed = csr_pack(torch.tensor([[0.0, 5.0, 6.0], [0.0, 0.0, 0.0], [7.0, 0.0, 0.0]]))
    assert packed.ptr.tolist() == [0, 2, 2, 3]
    assert packed.col.tolist() == [1, 2, 0]
    assert packed.val.tolist() == [5.0, 6.0, 7.0]


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_kept_bit_patterns_survive(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, 1.5, torch.nan, -torch.inf])
    weight = special[torch.randint(0, 5, (rows, columns), generator=generator)]
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    found = csr_unpack(csr_pack(weight, mask)).view(torch.int32)
    expected = torch.where(mask, weight.view(torch.int32), 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("weight", "mask", "error", "message"),
    [
        (torch.ones(4), None, WeightError, "expected a floating point matrix"),
        (torch.ones(2, 2, dtype=torch.int32), None, WeightError, "got torch.int32"),
        (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), ArgumentError, r"shape \(2, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), ArgumentError, "expected torch.bool"),
    ],
)
def test_pack_refuses(weight, mask, error, message):
    with pytest.raises(error, match=message):
        csr_pack(weight, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ptr": torch.zeros(5)}, "expected torch.int32"),
        ({"ptr": torch.zeros(4, dtype=torch.int32)}, r"shape \(5,\)"),
        ({"col": torch.zeros(3)}, "col: expected torch.int32"),
        ({"val": torch.zeros(2, 2)}, "like col"),
    ],
)
def test_tensors_that_are_no_csr(change, message):
    packed = csr_pack(make_weight((4, 8)))
    parts = {"ptr": packed.ptr, "col": packed.col, "val": packed.val} | change
    with pytest.raises(ArgumentError, match=message):
        CsrWeight(**parts, shape=(4, 8))
    with pytest.raises(ArgumentError, match=r"expected \(\) for CSR"):
        CsrWeight.from_tensors(packed.tensors(), [1], (4, 8))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, with_bias):
    packed = csr_pack(make_weight(shape, dtype))
    bias = torch.randn(shape[0], dtype=dtype) if with_bias else None
    wide = csr_pack(csr_unpack(packed).double())
    for rows in (1, 2, 3, 31, 32, 37):
        x = torch.randn(shape[1], rows, dtype=dtype).t()
        expected = csr_linear_reference(x.double(), wide, None if bias is None else bias.double())
        y = csr_linear(x, packed, bias)
        assert y.is_contiguous()
        assert_close(y, expected.to(dtype), **matmul_tolerance(dtype, shape[1]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 5])
def test_activation_comes_before_rounding(rows, activation):
    packed = csr_pack(make_weight((12, 40), torch.bfloat16))
    x, bias = torch.randn(rows, 40, dtype=torch.bfloat16), torch.randn(12, dtype=torch.bfloat16)
    wide = csr_pack(csr_unpack(packed).double())
    expected = csr_linear_reference(x.double(), wide, bias.double(), activation)
    y = csr_linear(x, packed, bias, activation)
    assert_close(y, expected.to(torch.bfloat16), **matmul_tolerance(torch.bfloat16, 40))


def test_a_weight_without_entries():
    packed = csr_pack(torch.zeros(4, 8))
    bias = torch.randn(4)
    assert_close(csr_linear(torch.randn(3, 8), packed, bias), bias.expand(3, -1), **EXACT)


def test_is_silent(recwarn):
    csr_linear(torch.randn(2, 8), csr_pack(make_weight((4, 8))), None)
    assert not recwarn.list


def test_rows_of_x_do_not_touch_each_other():
    weight = make_weight((6, 40))
    x = torch.randn(3, 40)
    clean = x @ weight.t()
    x[1] = torch.nan
    y = csr_linear(x, csr_pack(weight), None)
    assert_close(y[[0, 2]], clean[[0, 2]], **matmul_tolerance(x.dtype, 40))

"""Selection in each row: the kernel and the k-th value against a stable sort, ties, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.row_select import (
    row_select,
    row_select_by_rank,
    row_select_reference,
    row_select_triton,
)
from tests.kernels.test_radix_select import SCORES
from tests.tolerances import EXACT

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def triton_mask(score, count, *, highest, first=None):
    taken = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    row_select_triton(score, count, taken, highest=highest, first=first)
    return taken


IMPLS = [
    pytest.param(row_select, id="choice"),
    pytest.param(row_select_by_rank, id="rank"),
    pytest.param(triton_mask, id="triton", marks=needs_triton),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("highest", [False, True], ids=["lowest", "highest"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (130, 4)])
def test_matches_a_stable_sort(shape, name, highest, impl, device):
    score = SCORES[name](shape[0] * shape[1]).view(shape).to(device)
    for count in {1, max(shape[1] // 3, 1), max(shape[1] - 1, 1)}:
        expected = row_select_reference(score, count, highest=highest)
        assert expected.sum(-1).eq(count).all()
        assert_close(impl(score, count, highest=highest), expected, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_have_many_ties(dtype, impl, device):
    score = torch.randn(5, 500, device=device).to(dtype)
    expected = row_select_reference(score, 350, highest=False)
    assert_close(impl(score, 350, highest=False), expected, **EXACT)


@pytest.mark.parametrize("impl", [IMPLS[0], IMPLS[2]])
@pytest.mark.parametrize("highest", [False, True], ids=["lowest", "highest"])
@settings(deadline=None, max_examples=10)
@given(share=st.floats(0, 1), count=st.integers(1, 8), data=st.data())
def test_some_places_come_first(impl, highest, device, share, count, data):
    values = data.draw(st.lists(st.integers(-2, 2), min_size=24, max_size=24))
    score = torch.tensor(values, dtype=torch.float32, device=device).view(3, 8)
    first = torch.rand(3, 8, device=device) < share
    expected = row_select_reference(score, count, highest=highest, first=first)
    assert_close(impl(score, count, highest=highest, first=first), expected, **EXACT)
    some = expected & first  # the definition: none of the others while one of these is left
    assert (some.sum(-1) == first.sum(-1).clamp(max=count)).all()


def test_none_all_and_views(device):
    score = torch.randn(6, 10, device=device).t()
    assert not row_select(score, 0, highest=True).any()
    assert row_select(score, 6, highest=True).all()
    found = row_select(score, 2, highest=True)
    assert found.is_contiguous()
    assert_close(found, row_select_reference(score, 2, highest=True), **EXACT)
    assert row_select(score[:0], 3, highest=False).shape == (0, 6)


@needs_triton
def test_writes_nothing_beyond_its_rows(device):
    buffer = torch.ones(7, 5, dtype=torch.bool, device=device)
    row_select_triton(torch.randn(5, 5, device=device), 1, buffer[1:6], highest=True)
    assert buffer.sum(1).tolist() == [5, 1, 1, 1, 1, 1, 5]


@pytest.mark.parametrize("count", [-1, 6])
def test_refuses_a_count_out_of_range(count):
    with pytest.raises(
        ArgumentError, match=rf"count: expected an integer in \[0, 5\], got {count}"
    ):
        row_select(torch.zeros(2, 5), count, highest=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("columns", [4096, 11008, 1 << 15, (1 << 15) + 1])
def test_long_rows_on_the_device(columns):
    score = torch.randn(9, columns, device="cuda").bfloat16().float()
    expected = row_select_reference(score, columns // 3, highest=False)
    assert_close(row_select(score, columns // 3, highest=False), expected, **EXACT)

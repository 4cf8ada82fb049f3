"""Phi and its inverse: against lists of indices, round trips, canaries, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.bit_rank import (
    BLOCK,
    block_ranks,
    gather_by_rank,
    gather_by_rank_triton,
    scatter_by_rank_,
    scatter_by_rank_triton,
)
from resu_compile.kernels.mask_bits import pack_mask
from tests.tolerances import EXACT

SHAPES = [
    pytest.param((16, 64), id="even"),
    pytest.param((1,), id="one"),
    pytest.param((37, 101), id="ragged"),
    pytest.param((3, 5, 7), id="experts"),
    pytest.param((2 * BLOCK + 1,), id="one past a block"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def gather_triton(x, bits, keep, count):
    out = torch.full((count,), math.nan, dtype=x.dtype, device=x.device)
    gather_by_rank_triton(x, bits, keep, out)
    return out


GATHERS = [
    pytest.param(gather_by_rank, id="op"),
    pytest.param(gather_triton, id="triton", marks=needs_triton),
]
SCATTERS = [
    pytest.param(scatter_by_rank_, id="op"),
    pytest.param(scatter_by_rank_triton, id="triton", marks=needs_triton),
]


def make(shape, dtype, device, density=0.4):
    mask = torch.rand(shape) < density
    return torch.randn(shape).to(device=device, dtype=dtype), mask


def indices(mask, keep):
    """Row-major indices of one side, by plain Python."""
    return [i for i, bit in enumerate(mask.flatten().tolist()) if bit is keep]


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_is_by_index(gather, keep, dtype, shape, device):
    x, mask = make(shape, dtype, device)
    where = indices(mask, keep)
    got = gather(x, pack_mask(mask).to(device), keep, len(where))
    assert_close(got, x.flatten()[where], **EXACT)


@pytest.mark.parametrize("scatter", SCATTERS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_is_by_index_and_touches_nothing_else(scatter, keep, dtype, shape, device):
    x, mask = make(shape, dtype, device)
    where = indices(mask, keep)
    values = torch.randn(len(where), device=device).to(dtype)
    room = torch.full((x.numel() + 16,), 7.0, dtype=dtype, device=device)
    target = room[8:-8].view(shape)
    target.copy_(x)
    scatter(target, values, pack_mask(mask).to(device), keep)
    expected = x.flatten().clone()
    expected[where] = values
    assert_close(target.flatten(), expected, **EXACT)
    assert bool((room[:8] == 7).all())
    assert bool((room[-8:] == 7).all())


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
def test_both_sides_make_the_whole(shape, density, seed):
    torch.manual_seed(seed)
    x, mask = make(shape, torch.float32, "cpu", density)
    bits, rebuilt = pack_mask(mask), torch.full(shape, math.nan)
    for keep in (True, False):
        values = gather_by_rank(x, bits, keep, len(indices(mask, keep)))
        scatter_by_rank_(rebuilt, values, bits, keep)
    assert_close(rebuilt, x, **EXACT)


@pytest.mark.parametrize("numel", [1, 7, BLOCK, BLOCK + 3, 3 * BLOCK - 1])
@pytest.mark.parametrize("keep", [True, False])
def test_block_ranks_count_the_places_before(numel, keep):
    mask = torch.rand(numel) < 0.4
    ranks = block_ranks(pack_mask(mask), numel, keep)
    side = mask if keep else ~mask
    starts = [*range(0, numel, BLOCK), numel]
    assert ranks.tolist() == [int(side[:start].sum()) for start in starts]


def test_values_of_a_wider_dtype_are_rounded(device):
    x = torch.zeros(4, dtype=torch.bfloat16, device=device)
    bits = pack_mask(torch.tensor([True, False, True, False])).to(device)
    scatter_by_rank_(x, torch.tensor([1.001, -2.003], device=device), bits, False)
    assert_close(x.cpu(), torch.tensor([0, 1.0, 0, -2.0], dtype=torch.bfloat16), **EXACT)


def test_strides_do_not_matter(device):
    x, mask = make((6, 5), torch.float32, device)
    bits, count = pack_mask(mask).to(device), int(mask.sum())
    got = gather_by_rank(x.t().contiguous().t(), bits, True, count)
    assert_close(got, x[mask.to(device)], **EXACT)


def test_opcheck(device):
    x, mask = make((9, 13), torch.float32, device)
    bits, count = pack_mask(mask).to(device), int(mask.sum())
    torch.library.opcheck(gather_by_rank, (x, bits, True, count))
    torch.library.opcheck(gather_by_rank, (x.t(), bits, False, x.numel() - count))
    values = torch.randn(count, device=device)
    torch.library.opcheck(scatter_by_rank_, (x, values, bits, True))


def test_counts_that_do_not_fit_are_refused():
    x, bits = torch.zeros(5), pack_mask(torch.tensor([True, False, True, False, False]))
    with pytest.raises(ArgumentError, match=r"count: expected 2, .* got 3"):
        gather_by_rank(x, bits, True, 3)
    with pytest.raises(ArgumentError, match=r"values: expected shape \(3,\)"):
        scatter_by_rank_(x, torch.zeros(2), bits, False)
    with pytest.raises(ArgumentError, match="bits: expected uint8"):
        gather_by_rank(torch.zeros(9), bits, True, 2)

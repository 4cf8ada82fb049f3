"""Packed tiles: exact round trips, and the documented layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels.tile_weight import (
    PAIR_SPARSITY,
    ROW,
    STEP,
    STRIP,
    TileWeight,
    pack_tiles,
    unpack_tiles,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 600),
    sparsity=st.sampled_from((0.0, 0.3, 0.7, 0.9, 0.99, 1.0)),
    dtype=st.sampled_from(DTYPES),
    unit=st.sampled_from((1, 2, None)),
    segment=st.sampled_from((128, 512)),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_is_exact(rows, columns, sparsity, dtype, unit, segment, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    weight[0, 0] = -0.0
    weight[-1, -1] = torch.nan
    packed = pack_tiles(weight, mask, unit=unit, segment=segment)
    expected = torch.where(mask, weight, torch.zeros_like(weight)).contiguous()
    assert_same_bits(unpack_tiles(packed), expected)
    again = TileWeight.from_tensors(packed.tensors(), packed.layout, packed.shape)
    assert_same_bits(unpack_tiles(again), expected)


@pytest.mark.parametrize("unit", [1, 2])
def test_without_a_mask_what_is_not_zero_is_kept(unit):
    weight = torch.tensor([[0.0, -0.0, 1.0, torch.nan]])
    packed = pack_tiles(weight, unit=unit)
    assert_same_bits(unpack_tiles(packed), torch.tensor([[0.0, 0.0, 1.0, torch.nan]]))


def walk(packed: TileWeight) -> torch.Tensor:
    """The weight as the module's docstring says to read it, one place after the other."""
    out_features, in_features = packed.shape
    dense = torch.zeros(packed.shape, dtype=packed.val.dtype)
    strips, segments = packed.flags.shape[:2]
    for strip, j, lane in (
        (a, b, c) for a in range(strips) for b in range(segments) for c in range(32)
    ):
        first, g, t = int(packed.offset[strip * segments + j]), lane >> 2, lane & 3
        rank = [0, 0]
        for n in range(packed.segment // 4):
            s, i = divmod(n, 16)
            row = STRIP * strip + g + 8 * (i & 1)
            for h in range(2):
                bit = 2 * n + h if packed.unit == 1 else n
                if not int(packed.flags[strip, j, bit // 32, lane]) >> bit % 32 & 1:
                    continue
                column = packed.segment * j + STEP * s + 16 * (i >> 2) + 8 * (i >> 1 & 1)
                column += 2 * t + h
                if row < out_features and column < in_features:
                    dense[row, column] = packed.val[first + rank[h], 2 * lane + h]
                rank[h] += 1
    return dense


@pytest.mark.parametrize("unit", [1, 2])
def test_layout_is_the_documented_one(unit):
    weight = torch.randn(18, 150, dtype=torch.bfloat16)
    weight *= torch.rand(18, 150) < 0.4
    packed = pack_tiles(weight, unit=unit, segment=128)
    assert torch.equal(walk(packed), weight)
    assert packed.flags.shape == (2, 2, 2 // unit, 32)
    rows = packed.offset.diff()
    assert packed.val.shape == (int(rows.sum()), ROW)
    assert packed.segment_rows == int(rows.max())


def test_unit_follows_the_sparsity():
    weight = torch.randn(64, 512)
    order = torch.rand(64, 512)
    assert pack_tiles(weight, order >= PAIR_SPARSITY + 0.05).unit == 2
    assert pack_tiles(weight, order >= PAIR_SPARSITY - 0.05).unit == 1


def test_size_follows_the_kept_entries():
    weight = torch.randn(256, 4096).to(torch.bfloat16)
    packed = pack_tiles(weight, torch.rand(256, 4096) >= 0.7)
    bytes_per_weight = packed.size_bytes / weight.numel()
    # a flag bit, 0.3 values of 2 bytes; the longest of 64 streams is half as long again as the mean
    assert 1 / 8 + 0.6 < bytes_per_weight < 1 / 8 + 0.6 * 1.55
    assert packed.size_bytes == sum(t.nbytes for t in packed.tensors())


@pytest.mark.parametrize(
    ("weight", "mask", "options", "error", "match"),
    [
        (torch.ones(4), None, {}, WeightError, "weight: expected a floating point matrix"),
        (torch.ones(4, 4, dtype=torch.int32), None, {}, WeightError, "got torch.int32"),
        (torch.ones(0, 4), None, {}, WeightError, r"shape \(0, 4\)"),
        (torch.ones(4, 4), torch.ones(4, 4), {}, ArgumentError, "mask: expected torch.bool"),
        (torch.ones(4, 4), None, {"unit": 3}, ArgumentError, "unit: expected 1 or 2, got 3"),
        (torch.ones(4, 4), None, {"segment": 64}, ArgumentError, "power of two >= 128, got 64"),
    ],
)
def test_bad_arguments(weight, mask, options, error, match):
    with pytest.raises(error, match=match):
        pack_tiles(weight, mask, **options)


def test_tensors_that_do_not_fit_are_refused():
    packed = pack_tiles(torch.ones(16, 128), segment=128)
    flags, offset, val = packed.tensors()
    for tensors, match in (
        ((flags[:, :, :1], offset, val), "flags: expected int32 of shape"),
        ((flags, offset.long(), val), "offset: expected int32"),
        ((flags, offset, val.view(-1)), "val: expected shape"),
    ):
        with pytest.raises(ArgumentError, match=match):
            TileWeight.from_tensors(tensors, packed.layout, packed.shape)

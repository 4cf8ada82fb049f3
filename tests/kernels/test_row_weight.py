"""Weights packed by rows: exact both ways, for any shape, mask and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError, WeightError
from resu_compile.kernels.row_order import CHUNK, GROUP
from resu_compile.kernels.row_weight import (
    RowWeight,
    default_blocks,
    gaps,
    pack_rows,
    row_of_group,
    unpack_rows,
    wide_base,
)

BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def kept_part(weight, mask):
    return torch.where(mask, weight, torch.zeros_like(weight))


def assert_same_bits(a, b):
    integer = BITS.get(a.dtype, torch.int16)
    assert a.dtype == b.dtype
    assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    sparsity=st.sampled_from([0.0, 0.3, 0.7, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(DTYPES),
    gap_bits=st.sampled_from([None, 4, 8]),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_round_trip(rows, columns, sparsity, dtype, gap_bits, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mask = torch.rand(rows, columns, generator=generator) >= sparsity
    mask[seed % rows] = seed % 3 > 0  # a full or an empty row
    packed = pack_rows(weight, mask, blocks=min(blocks, rows), gap_bits=gap_bits)
    assert_same_bits(unpack_rows(packed), kept_part(weight, mask))
    again = RowWeight.from_tensors(packed.tensors(), packed.layout, packed.shape)
    assert_same_bits(unpack_rows(again), kept_part(weight, mask))


def test_strides_and_values_without_a_mask():
    weight = torch.randn(50, 30)
    weight[weight.abs() < 0.7] = 0
    assert_same_bits(unpack_rows(pack_rows(weight.t())), weight.t())
    assert_same_bits(unpack_rows(pack_rows(weight[::2, 3:20])), weight[::2, 3:20])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_values_keep_their_bits(dtype):
    weight = torch.ones(3, 40, dtype=dtype)
    weight[0, 0] = weight[1, 39] = -0.0
    weight[2, 5] = float("nan")
    weight[2, 6] = -float("inf")
    mask = torch.rand(3, 40) < 0.5
    mask[0, 0] = mask[1, 39] = mask[2, 5] = mask[2, 6] = True
    unpacked = unpack_rows(pack_rows(weight, mask))
    assert_same_bits(unpacked, kept_part(weight, mask))
    assert torch.signbit(unpacked[0, 0])


def test_wide_weight_takes_wide_base_columns():
    weight = torch.randn(2, 70_001)
    mask = torch.rand(2, 70_001) < 0.01
    mask[:, -1] = True
    packed = pack_rows(weight, mask)
    assert packed.base.dtype == torch.int32
    assert int(wide_base(packed).max()) > 1 << 16
    assert_same_bits(unpack_rows(packed), kept_part(weight, mask))
    narrow = pack_rows(weight[:, : 1 << 16], mask[:, : 1 << 16])
    assert narrow.base.dtype == torch.int16
    assert_same_bits(unpack_rows(narrow), kept_part(weight, mask)[:, : 1 << 16])


@pytest.mark.parametrize(("gap_bits", "distance"), [(4, 15), (4, 16), (8, 255), (8, 256)])
def test_fillers_stand_only_where_a_gap_is_too_wide(gap_bits, distance):
    weight = torch.zeros(1, 2 * distance + 1)
    weight[0, [0, distance, 2 * distance]] = torch.tensor([1.0, 2.0, 3.0])
    packed = pack_rows(weight, gap_bits=gap_bits)
    fillers = 2 if distance >= 1 << gap_bits else 0
    assert int((gaps(packed) > 0).sum()) == 2 + fillers
    assert_same_bits(unpack_rows(packed), weight)


def test_the_smaller_gaps_are_taken():
    weight = torch.randn(32, 4096)
    sizes = {}
    for sparsity in (0.5, 0.95):
        mask = torch.rand(32, 4096) >= sparsity
        taken = pack_rows(weight, mask, blocks=1)
        sizes[sparsity] = {b: pack_rows(weight, mask, blocks=1, gap_bits=b) for b in (4, 8)}
        assert taken.size_bytes == min(p.size_bytes for p in sizes[sparsity].values())
    assert sizes[0.5][4].size_bytes < sizes[0.5][8].size_bytes
    assert sizes[0.95][8].size_bytes < sizes[0.95][4].size_bytes


def test_bytes_of_an_entry():
    weight = torch.randn(64, 4096).bfloat16()
    mask = torch.rand(64, 4096) >= 0.8
    packed = pack_rows(weight, mask, blocks=4, gap_bits=8)
    assert packed.size_bytes / int(mask.sum()) < 3.125 * 1.05


def test_blocks_have_about_as_many_groups_each():
    mask = torch.rand(640, 1000) < torch.linspace(0, 0.6, 640)[:, None]
    packed = pack_rows(torch.ones(640, 1000), mask, blocks=8)
    counts = packed.ends[:, -1]
    assert int(counts.sum()) == int((row_of_group(packed) >= 0).sum())
    assert int(counts.max()) < 1.3 * float(counts.float().mean())
    assert packed.capacity % CHUNK == 0
    assert packed.capacity >= int(counts.max())


def test_groups_in_sequence_are_spread_over_the_row():
    packed = pack_rows(torch.ones(1, 4096), blocks=1)
    base = wide_base(packed)[: 4096 // GROUP].view(-1, 8)
    assert ((base.diff(dim=1) - 512).abs() <= GROUP).all()


def test_sizes_of_another_weight_are_taken_over():
    weight = torch.randn(300, 256)
    first = pack_rows(weight, torch.rand(300, 256) < 0.11, blocks=5, gap_bits=8)
    mask = torch.rand(300, 256) < 0.1
    again = pack_rows(weight, mask, like=first)
    assert again.layout == first.layout
    assert [t.shape for t in again.tensors()] == [t.shape for t in first.tensors()]
    assert_same_bits(unpack_rows(again), kept_part(weight, mask))
    fuller = torch.rand(300, 256) < 0.5
    assert_same_bits(unpack_rows(pack_rows(weight, fuller, like=first)), kept_part(weight, fuller))


def test_many_rows_make_more_blocks():
    cpu = torch.device("cpu")
    assert default_blocks(cpu, 7) == 7
    assert default_blocks(cpu, 4096) == 132
    assert default_blocks(cpu, 28672) == 264


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(3)}, WeightError, "floating point matrix"),
        ({"weight": torch.ones(3, 3).int()}, WeightError, "int32"),
        ({"weight": torch.ones(0, 3)}, WeightError, "N, K >= 1"),
        ({"mask": torch.ones(3, 4)}, ArgumentError, "mask: expected torch.bool"),
        ({"mask": torch.ones(3, 3) > 0}, ArgumentError, "like weight"),
        ({"blocks": 4}, ArgumentError, "blocks: expected 1 to N = 3, got 4"),
        ({"gap_bits": 5}, ArgumentError, "gap_bits: expected one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pack_rows(**{"weight": torch.ones(3, 4), **arguments})


def test_tensors_that_do_not_fit_are_refused():
    packed = pack_rows(torch.ones(3, 4))
    for place in range(3):
        tensors = list(packed.tensors())
        tensors[place] = tensors[place][:-1]
        with pytest.raises(ArgumentError, match="for capacity 32"):
            RowWeight.from_tensors(tensors, packed.layout, packed.shape)
    with pytest.raises(ArgumentError, match="capacity: expected a positive multiple"):
        RowWeight.from_tensors(packed.tensors(), (8, 33), packed.shape)

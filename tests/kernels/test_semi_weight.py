"""The 2:4 form of a weight: exact both ways, and in the order that the tensor cores read."""

import itertools
import math

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.kernels.semi_weight import (
    SemiWeight,
    is_semi_pattern,
    is_semi_structured,
    pack_semi,
    unpack_semi,
    unpack_semi_reference,
)

SHAPES = [
    pytest.param((16, 256), id="one tile"),
    pytest.param((48, 512), id="even"),
    pytest.param((37, 300), id="ragged"),
    pytest.param((1, 4), id="tiny"),
    pytest.param((5, 7), id="short group"),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def two_of_four(shape, at_most=True):
    """A random mask with two, or at most two, of each four columns of a row."""
    rows, columns = shape
    rank = torch.rand(rows, -(-columns // 4), 4).argsort(-1).argsort(-1)
    count = torch.randint(0, 3, rank.shape[:2]) if at_most else torch.full(rank.shape[:2], 2)
    return (rank < count.unsqueeze(-1)).reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_every_bit_back(shape, dtype, device):
    mask = two_of_four(shape).to(device)
    weight = torch.randn(shape, device=device).to(dtype)
    weight[torch.rand(shape, device=device) < 0.2] = -0.0
    weight[torch.rand(shape, device=device) < 0.1] = torch.nan
    packed = pack_semi(weight, mask)
    found = unpack_semi(packed)
    bits = INTEGERS[dtype]
    assert found.dtype == dtype
    assert torch.equal(found.view(bits), torch.where(mask, weight.view(bits), 0))
    assert torch.equal(unpack_semi_reference(packed).view(bits), found.view(bits))


def test_without_a_mask_what_is_not_zero_is_kept():
    weight = torch.where(two_of_four((16, 64)), torch.randn(16, 64), 0)
    weight[0, :4] = torch.tensor([-0.0, 0.0, 3.0, 0.0])
    assert torch.equal(unpack_semi(pack_semi(weight)).view(torch.int32), weight.view(torch.int32))


def test_strides_do_not_matter():
    weight, mask = torch.randn(64, 32), two_of_four((32, 64))
    packed = pack_semi(weight.t(), mask)
    same = pack_semi(weight.t().contiguous(), mask)
    assert all(torch.equal(a, b) for a, b in zip(packed.tensors(), same.tensors(), strict=True))


def test_each_lane_holds_its_fragment():
    """Lane, register and bit of single entries, counted by hand from the PTX manual."""
    for row, column, block, step, lane, register, half in (
        (0, 0, 0, 0, 0, 0, 0),  # row 0, group 0
        (3, 5, 0, 0, 13, 0, 0),  # group 1 of row 3: lane 4 * 3 + 1
        (11, 5, 0, 0, 13, 1, 0),  # eight rows below
        (3, 21, 0, 0, 13, 2, 0),  # four groups on
        (11, 21 + 32 + 64, 1, 1, 13, 3, 0),  # next block, second step
    ):
        weight = torch.zeros(16, 256)
        weight[row, column] = 1.0
        weight[row, column + 1 - 2 * (column % 4 == 3)] = 2.0
        values = pack_semi(weight).values
        assert values[0, block, step, lane, register, half] == 1.0
        assert values[0, block, step, lane, register, 1 - half] == 2.0
        assert values.count_nonzero() == 2


def test_places_are_in_the_words_of_the_lanes_that_give_them():
    weight = torch.zeros(16, 256)
    weight[3, 4 * 6 + 1] = weight[3, 4 * 6 + 3] = 1.0  # group 6: second lane of the first step
    weight[11, 64 + 32 + 2] = weight[11, 64 + 32 + 3] = 1.0  # block 1, step 1, group 0, high row
    places = pack_semi(weight).places
    empty = sum((0 | 1 << 2) << 4 * i for i in range(8))  # places 0 and 1 of each group
    word = int(places[0, 0, 4 * 3 + 1, 0])
    assert word & 0xFFFFFFFF == empty & ~(15 << 8) | (1 | 3 << 2) << 8
    word = int(places[0, 0, 4 * 3 + 2, 1])
    assert word & 0xFFFFFFFF == empty & ~(15 << 16) | (2 | 3 << 2) << 16
    words = places.view(-1).tolist()
    assert sum(w & 0xFFFFFFFF != empty for w in words) == 2


def test_places_always_ascend():
    codes = pack_semi(torch.randn(32, 512), two_of_four((32, 512))).places
    nibbles = torch.stack([codes >> s & 15 for s in range(0, 32, 4)])
    assert ((nibbles & 3) < (nibbles >> 2)).all()


@pytest.mark.parametrize("group", [2, 3, 4, 5, 6, 8, 12])
def test_which_patterns_are_two_of_four(group):
    """Against all masks of one row as long as it takes for groups and fours to meet again."""
    columns = math.lcm(group, 4)
    for keep in range(1, group):
        one = [c for c in itertools.product([0, 1], repeat=group) if sum(c) == keep]
        # masks of whole groups are independent: the worst four hold the worst parts of each
        found = all(
            sum(
                max(
                    sum(mask[j % group] for j in range(start, start + 4) if j // group == i)
                    for mask in one
                )
                for i in range(columns // group)
            )
            <= 2
            for start in range(0, columns, 4)
        )
        assert is_semi_pattern(keep, group) == found
    assert is_semi_pattern(1, group)


def test_size_and_tensors():
    packed = pack_semi(torch.randn(32, 512).bfloat16(), two_of_four((32, 512)))
    assert packed.size_bytes == 32 * 512 * 2 * 9 // 16
    again = SemiWeight.from_tensors(packed.tensors(), packed.layout, packed.shape)
    assert torch.equal(unpack_semi(again), unpack_semi(packed))
    assert is_semi_structured(unpack_semi(packed) != 0)


def test_what_is_no_two_of_four_is_named():
    dense = torch.ones(2, 8)
    assert not is_semi_structured(dense.bool())
    with pytest.raises(ArgumentError, match=r"^mask: expected at most 2 of each 4 .* pattern='2:4"):
        pack_semi(dense)
    with pytest.raises(ArgumentError, match=r"^weight: expected two dimensions"):
        pack_semi(torch.ones(4))
    with pytest.raises(ArgumentError, match=r"^mask: expected bool of shape \(2, 8\)"):
        pack_semi(dense, torch.ones(2, 4, dtype=torch.bool))
    packed = pack_semi(torch.zeros(16, 256))
    with pytest.raises(ArgumentError, match=r"^SemiWeight: expected 2 tensors of layout version 1"):
        SemiWeight.from_tensors(packed.tensors(), (2,), packed.shape)
    with pytest.raises(ArgumentError, match=r"^values: expected shape"):
        SemiWeight.from_tensors(packed.tensors(), packed.layout, (32, 256))
    with pytest.raises(ArgumentError, match=r"^places: expected int32"):
        SemiWeight(packed.values, packed.places.long(), (16, 256))

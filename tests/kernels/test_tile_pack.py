"""Packing and unpacking of tiles by Triton against the plain PyTorch functions."""

from __future__ import annotations

import pytest
import torch

from resu_compile.kernels import tile_weight
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.tile_pack import count_triton, fill_triton, unpack_triton
from resu_compile.kernels.tile_weight import ROW, pack_tiles

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

CASES = [
    pytest.param((1, 1), torch.int16, 1, 128, id="one"),
    pytest.param((16, 128), torch.int16, 1, 128, id="whole"),
    pytest.param((16, 128), torch.int16, 2, 128, id="whole, pairs"),
    pytest.param((37, 300), torch.int32, 1, 128, id="ragged"),
    pytest.param((37, 300), torch.int64, 2, 256, id="ragged, pairs"),
    pytest.param((20, 700), torch.int16, 1, 512, id="long segments"),
]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(("shape", "dtype", "unit", "segment"), CASES)
def test_packs_and_unpacks_like_the_reference(shape, dtype, unit, segment, transposed, device):
    bits = torch.randint(1, 2**15, shape, dtype=dtype, device=device)
    mask = torch.rand(shape, device=device) < 0.4
    if transposed:
        bits, mask = bits.t().contiguous().t(), mask.t().contiguous().t()
    flags, rows = count_triton(mask, unit, segment)
    expected_flags, expected_rows = tile_weight._count(mask, unit, segment)
    assert torch.equal(flags, expected_flags)
    assert torch.equal(rows, expected_rows)

    ends = rows.cumsum(0)
    offset = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    room = torch.full((int(ends[-1]) + 2, ROW), -1, dtype=dtype, device=device)
    val, expected_val = room[1:-1].zero_(), torch.zeros_like(room[1:-1])
    fill_triton(bits, mask, offset, val, unit, segment)
    tile_weight._fill(bits, mask, offset, expected_val, unit, segment)
    assert torch.equal(val, expected_val)
    assert room[[0, -1]].eq(-1).all()  # nothing is written before or behind

    dense = unpack_triton(flags, offset, val, shape, unit, segment)
    assert torch.equal(dense, torch.where(mask, bits, torch.zeros_like(bits)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_is_packed_alike_on_both_devices(dtype):
    weight = torch.randn(1000, 3001).to(dtype)
    mask = torch.rand(1000, 3001) < 0.3
    for unit in (1, 2):
        packed = pack_tiles(weight.cuda(), mask.cuda(), unit=unit)
        expected = pack_tiles(weight, mask, unit=unit)
        assert packed.layout == expected.layout
        for own, other in zip(packed.tensors(), expected.tensors(), strict=True):
            assert torch.equal(own.cpu(), other)

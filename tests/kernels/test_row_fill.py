"""Writing the entries of a weight packed by rows: Triton against plain PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from resu_compile.kernels import row_fill
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.row_fill import (
    count_fillers_reference,
    count_fillers_triton,
    fill_reference,
    fill_triton,
)
from resu_compile.kernels.row_weight import RowWeight, pack_rows, unpack_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def make(shape, sparsity, dtype=torch.float32):
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    mask = torch.rand(shape, device=DEVICE) >= sparsity
    mask[shape[0] // 2] = False
    mask[-1, -3000:] = True
    return weight, mask


def packed_by(monkeypatch, count, fill, *args, **options) -> RowWeight:
    with monkeypatch.context() as patched:
        for name in ("count_fillers_reference", "count_fillers_triton"):
            patched.setattr(row_fill, name, count)
        for name in ("fill_reference", "fill_triton"):
            patched.setattr(row_fill, name, fill)
        return pack_rows(*args, **options)


@pytest.mark.parametrize(
    ("shape", "sparsity", "gap_bits", "dtype"),
    [
        pytest.param((1, 1), 0.0, 8, torch.float32, id="one"),
        pytest.param((9, 1001), 0.5, 4, torch.bfloat16, id="ragged"),
        pytest.param((6, 2600), 0.3, 8, torch.float16, id="several-steps"),
        pytest.param((7, 1200), 0.99, 4, torch.float32, id="many-fillers"),
        pytest.param((7, 3000), 0.999, 8, torch.float32, id="long-gaps"),
        pytest.param((2, 70_001), 0.9, 8, torch.bfloat16, id="wide"),
        pytest.param((5, 130), 0.6, 4, torch.float64, id="float64"),
    ],
)
def test_triton_writes_what_the_reference_writes(shape, sparsity, gap_bits, dtype, monkeypatch):
    weight, mask = make(shape, sparsity, dtype)
    options = {"blocks": min(2, shape[0]), "gap_bits": gap_bits, "spare": 0.1}
    reference = count_fillers_reference, fill_reference
    triton = count_fillers_triton, fill_triton
    expected = packed_by(monkeypatch, *reference, weight, mask, **options)
    packed = packed_by(monkeypatch, *triton, weight, mask, **options)
    assert packed.layout == expected.layout
    integers = {2: torch.int16, 8: torch.int64}
    for ours, theirs in zip(packed.tensors(), expected.tensors(), strict=True):
        bits = integers.get(ours.element_size(), torch.int32) if ours.is_floating_point() else None
        assert torch.equal(ours.view(bits or ours.dtype), theirs.view(bits or theirs.dtype))
    assert torch.equal(unpack_rows(packed), torch.where(mask, weight, torch.zeros_like(weight)))


@pytest.mark.parametrize("widest", [15, 255])
def test_fillers_are_counted_alike(widest):
    _, mask = make((40, 3000), 0.99)
    place = mask.flatten().nonzero().view(-1)
    stop = mask.sum(1).cumsum(0)
    expected = count_fillers_reference(place, stop, 3000, widest)
    assert int(expected.sum())
    assert torch.equal(count_fillers_triton(place, stop, 3000, widest), expected)


def test_nothing_is_kept():
    place = torch.empty(0, dtype=torch.int64, device=DEVICE)
    stop = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert count_fillers_triton(place, stop, 10, 15).tolist() == [0] * 4
    assert count_fillers_reference(place, stop, 10, 15).tolist() == [0] * 4


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_large_weight_comes_back(sparsity):
    weight, mask = make((1500, 4096), sparsity, torch.bfloat16)
    expected = torch.where(mask, weight, torch.zeros_like(weight))
    assert torch.equal(unpack_rows(pack_rows(weight, mask)), expected)

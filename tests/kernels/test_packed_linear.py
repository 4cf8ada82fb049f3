"""One weight in several formats: flat lists there and back."""

from __future__ import annotations

import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.kernels.packed_linear import (
    FORMATS,
    PackedLinear,
    format_of,
    pack_linear,
    parts_of,
)
from resu_compile.kernels.plan import Kernel

SUBSETS = [
    {Kernel.CSR},
    {Kernel.ROWS},
    {Kernel.TILES},
    {Kernel.ROWS, Kernel.TILES},
    {Kernel.CSR, Kernel.ROWS, Kernel.TILES, Kernel.SEMI},
]


def make_weight(shape=(48, 64)):
    """2:4 along the inputs, which every format takes."""
    weight = torch.randn(shape, dtype=torch.float16)
    keep = torch.rand(shape[0], shape[1] // 4, 4).argsort(-1) < 2
    return weight.masked_fill_(~keep.view(shape), 0)


@pytest.mark.parametrize("formats", SUBSETS, ids=lambda s: "+".join(sorted(k.name for k in s)))
def test_there_and_back(formats):
    weight = make_weight()
    mask = weight != 0
    packed = pack_linear(weight, mask, formats)
    assert packed.formats == formats
    assert packed.layout[0] == sum(1 << kernel for kernel in formats)
    again = PackedLinear.from_tensors(packed.tensors(), packed.layout, packed.shape)
    assert again.formats == formats
    assert torch.equal(again.unpack(), weight)
    for kernel in formats:
        assert torch.equal(format_of(kernel).unpack(again.weights[kernel]), weight)
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors())
    assert packed.size_bytes == sizes


def test_kernels_without_storage_need_none():
    weight = make_weight()
    packed = pack_linear(weight, None, [Kernel.DENSE])
    assert packed.tensors() == ()
    assert packed.layout == (0,)
    assert PackedLinear.from_tensors((), (0,), (48, 64)).formats == frozenset()
    with pytest.raises(ArgumentError, match="at least one format"):
        packed.unpack()


def test_unpack_gets_a_format_if_there_is_none():
    weight = make_weight()
    assert pack_linear(weight, None, [Kernel.UNPACK]).formats == {Kernel.CSR}
    assert pack_linear(weight, None, [Kernel.UNPACK, Kernel.ROWS]).formats == {Kernel.ROWS}
    if torch.cuda.is_available():
        assert pack_linear(weight.cuda(), None, [Kernel.UNPACK]).formats == {Kernel.TILES}


def test_weights_are_ordered_and_of_one_shape():
    weight = make_weight()
    csr, rows = (format_of(k).pack(weight, None) for k in (Kernel.CSR, Kernel.ROWS))
    packed = PackedLinear((48, 64), {Kernel.ROWS: rows, Kernel.CSR: csr})
    assert list(packed.weights) == [Kernel.CSR, Kernel.ROWS]
    with pytest.raises(ArgumentError, match=r"shape \(48, 65\) of all formats"):
        PackedLinear((48, 65), {Kernel.CSR: csr})
    with pytest.raises(ArgumentError, match="got UNPACK"):
        PackedLinear((48, 64), {Kernel.UNPACK: csr})


@pytest.mark.parametrize(
    "layout", [(), (2,), (2, 3), (2, 3, 1), (0, 1), (1,), (1 << 6, 0, 0), (2, 3, 0, 7)]
)
def test_layouts_that_are_none(layout):
    with pytest.raises(ArgumentError, match="expected that of a PackedLinear"):
        parts_of(layout)


def test_tensors_are_counted():
    packed = pack_linear(make_weight(), None, [Kernel.CSR])
    with pytest.raises(ArgumentError, match="expected 3 for this layout, got 2"):
        PackedLinear.from_tensors(packed.tensors()[:2], packed.layout, packed.shape)


@pytest.mark.parametrize("kernel", sorted(set(Kernel) - set(FORMATS)))
def test_a_kernel_without_storage_has_no_format(kernel):
    with pytest.raises(ArgumentError, match=kernel.name):
        format_of(kernel)

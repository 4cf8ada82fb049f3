"""Unpacking a committed graph once: by its text and its numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.passes.choose_kernels import choose_kernels
from resu_compile.passes.fold_commit import PACKED, fold_commit
from resu_compile.passes.unpack_weights import unpack_weights

CPU = torch.device("cpu")


def committed(model, mask_name, x):
    mask = torch.rand(model.get_parameter(mask_name).shape) < 0.3
    with torch.no_grad():
        model.get_parameter(mask_name).mul_(mask)
    gm = torch.export.export(model, (x,), strict=False).module()
    return fold_commit(gm, {mask_name: mask})[0]


def names_of(gm):
    return {values: name for name, (values, _) in gm.meta[PACKED].items()}


def test_by_text_and_numbers():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(3, 8)
    gm = committed(model, "0.weight", x)
    assert "unpack_weight" in str(gm.graph)
    held, report = unpack_weights(gm, names_of(gm), CPU)
    assert "unpack_weight" not in str(gm.graph)
    assert "get_attr[target=0.weight]" in str(gm.graph)
    assert set(gm.state_dict()) == {"0.bias"}  # nothing is packed or dense before it is asked for
    assert held["0.weight"]().equal(model[0].weight)
    choose_kernels(gm, {"0.weight": 0.7}, CPU, 1.0, held=held)
    assert set(gm.state_dict()) == {"0.weight", "0.bias"}
    assert not gm.get_parameter("0.weight").requires_grad
    assert torch.equal(gm(x), model(x))
    assert list(report.rewritten) == ["0.weight"]


def test_graph_without_packed_weights_stays():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    gm = torch.export.export(model, (x,), strict=False).module()
    code = gm.code
    held, report = unpack_weights(gm, {}, CPU)
    assert held == {}
    assert report.rewritten == {}
    assert gm.code == code


def test_bitmap_that_does_not_fit():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    gm = committed(model, "0.weight", x)
    gm.get_buffer("0.weight_bits").bitwise_xor_(1)
    held, _ = unpack_weights(gm, names_of(gm), CPU)
    with pytest.raises(ArgumentError, match="one a value"):
        held["0.weight"]()

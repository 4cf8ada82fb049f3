"""Devices that a traced graph holds as constants."""

from __future__ import annotations

import torch
from torch import nn

from resu_compile.passes.move_device import move_device


class Positions(nn.Module):
    def forward(self, x):
        table = torch.arange(x.shape[-1], device=x.device)
        return x + table + torch.zeros(1, dtype=x.dtype).to("cpu")


def test_moves_constants_there_and_back():
    x = torch.randn(2, 4)
    gm = torch.export.export(Positions(), (x,), strict=False).module()
    code = gm.code
    report = move_device(gm, torch.device("meta"))
    assert report.rewritten["arange"] == "cpu to meta"
    assert "type='cpu'" not in gm.code
    assert gm(x.to("meta")).device.type == "meta"
    move_device(gm, torch.device("cpu"))
    assert torch.equal(gm(x), Positions()(x))
    assert gm.code == code


def test_same_device_changes_nothing():
    gm = torch.export.export(Positions(), (torch.randn(2, 4),), strict=False).module()
    assert move_device(gm, torch.device("cpu")).rewritten == {}

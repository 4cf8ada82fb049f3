"""The kernel behind the ceiling of reading reads everything."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ceilings import Ceilings, read_triton
from resu_compile.kernels._triton import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_every_number_is_read_once(device, programs):
    x = torch.zeros(8 * 4096, device=device)
    x[::4096] = 2.0 ** torch.arange(8, device=device)  # a sum says which blocks are in it
    out = torch.full((programs,), float("nan"), device=device)
    read_triton(x, out, 4096)
    assert out.sum().item() == 255


@pytest.mark.parametrize("rate", [0.0, float("nan"), float("inf")])
def test_a_rate_is_above_zero(rate):
    with pytest.raises(ValueError, match="copy: expected a rate above 0"):
        Ceilings(1.0, rate, 1.0)

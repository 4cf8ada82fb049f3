"""Top-k masks: the reference and the kernels against a stable sort, ties, order, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels import radix_select
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.radix_select import (
    topk_mask,
    topk_mask_cuda,
    topk_mask_reference,
    topk_mask_triton,
    topk_module,
)
from resu_compile.sparsity import topk_mask as sparsity_topk_mask
from tests.tolerances import EXACT

CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")]
INF = math.inf


def by_sort(score, k):
    """A stable sort keeps equal scores in index order."""
    order = torch.sort(score.double().flatten(), descending=True, stable=True).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[:k]] = True
    return mask.view(score.shape)


def triton_mask(score, k):
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    topk_mask_triton(score, k, mask)
    return mask


def cuda_mask(score, k):
    module = topk_module(score)
    assert module is not None, "NVRTC is there on every GPU that this suite runs on"
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    topk_mask_cuda(module, score, k, mask)
    return mask


IMPLS = [
    pytest.param(topk_mask_reference, id="reference"),
    pytest.param(topk_mask, id="op"),
    pytest.param(sparsity_topk_mask, id="sparsity"),
    pytest.param(triton_mask, id="triton", marks=needs_triton),
    pytest.param(cuda_mask, id="cuda", marks=needs_cuda),
]
KERNELS = IMPLS[3:]

SCORES = {
    "normal": lambda n: torch.randn(n),
    "all equal": lambda n: torch.full((n,), -0.25),
    "few values": lambda n: torch.randint(-2, 3, (n,)).float(),
    "two zeros": lambda n: torch.where(torch.rand(n) < 0.5, -0.0, 0.0),
    "half -inf": lambda n: torch.where(torch.rand(n) < 0.5, -INF, torch.randn(n)),
    "infinities": lambda n: torch.where(torch.rand(n) < 0.5, -INF, INF),
    "subnormal": lambda n: torch.randint(-3, 4, (n,)) * 2.0**-149,
    "wide": lambda n: torch.randn(n) * 10.0 ** torch.randint(-40, 38, (n,)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("numel", [1, 9, 2049])
def test_matches_a_stable_sort(numel, name, impl, device):
    score = SCORES[name](numel).to(device)
    for k in {1, max(numel // 3, 1), max(numel - 1, 1)}:
        assert_close(impl(score, k), by_sort(score, k), **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_have_many_ties(dtype, impl, device):
    score = torch.randn(3000, device=device).to(dtype)
    for k in (1, 700, 2999):
        assert_close(impl(score, k), by_sort(score, k), **EXACT)


def test_float64_differences_below_float32_count(device):
    score = 1.0 + torch.arange(100, dtype=torch.float64, device=device) * 1e-12
    assert_close(topk_mask(score, 10), by_sort(score, 10), **EXACT)


@needs_triton
@settings(deadline=None, max_examples=15)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    share=st.floats(0, 1),
)
def test_any_floats(values, share):
    score = torch.tensor(values, dtype=torch.float32, device="cuda" if CUDA else "cpu")
    k = max(round(share * len(values)), 1)
    expected = by_sort(score, k)
    assert_close(topk_mask_reference(score, k), expected, **EXACT)
    assert_close(triton_mask(score, k), expected, **EXACT)


@needs_triton
@pytest.mark.parametrize("digit_bits", [5, 8])
@pytest.mark.parametrize("name", ["normal", "all equal", "few values"])
def test_many_tiles_programs_and_chunks(name, digit_bits, device, monkeypatch):
    for constant, value in (("BLOCK", 64), ("PROGRAMS", 2), ("CHUNKS", 4)):
        monkeypatch.setattr(radix_select, constant, value)
    monkeypatch.setattr(radix_select, "DIGIT_BITS", digit_bits)
    score = SCORES[name](1000).to(device)  # 4 tiles for each of 4 chunks
    for k in (1, 777):
        assert_close(triton_mask(score, k), by_sort(score, k), **EXACT)


@pytest.mark.parametrize("impl", [topk_mask, topk_mask_reference, sparsity_topk_mask])
def test_none_and_all(impl, device):
    score = torch.randn(3, 5, device=device)
    assert not impl(score, 0).any()
    assert impl(score, 15).all()
    assert impl(score[:0], 0).shape == (0, 5)


@pytest.mark.parametrize("view", [torch.Tensor.t, lambda x: x[:, ::2], lambda x: x.flatten()[1:]])
def test_op_on_views(view, device):
    score = view(torch.randn(40, 60, device=device))
    mask = topk_mask(score, 500)
    assert_close(mask, by_sort(score.contiguous(), 500), **EXACT)
    assert mask.is_contiguous()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("numel", [1, 13, 2047, 2051])
def test_writes_only_its_mask(numel, impl, device, monkeypatch):
    buffer = torch.full((numel + 128,), 7, dtype=torch.uint8, device=device)
    inner = buffer[64:-64].view(torch.bool)
    monkeypatch.setattr(torch, "empty", _hand_out(inner, torch.empty))
    impl(torch.randn(numel, device=device), 1)
    assert int(inner.sum()) == 1
    assert (buffer[:64] == 7).all()
    assert (buffer[-64:] == 7).all()


def _hand_out(mask, empty):
    return lambda *args, **kw: mask if kw.get("dtype") == torch.bool else empty(*args, **kw)


@pytest.mark.parametrize("k", [0, 7, 60])
def test_opcheck(k, device):
    score = torch.randn(6, 10, device=device)
    torch.library.opcheck(torch.ops.resu_compile.topk_mask.default, (score, k))


@pytest.mark.parametrize("k", [-1, 13])
def test_k_out_of_range(k):
    for impl in (topk_mask, sparsity_topk_mask):
        with pytest.raises(ArgumentError, match=rf"k: expected an integer in \[0, 12\], got {k}"):
            impl(torch.ones(3, 4), k)


# -- GPU -------------------------------------------------------------------------------------
@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", [topk_mask, triton_mask, cuda_mask])
@pytest.mark.parametrize("name", SCORES)
def test_large(name, impl):
    numel = 2048 * 2048 + 2048 * 7 + 3
    score = SCORES[name](numel).cuda()
    for k in (1, numel // 5, numel - 1):
        mask = impl(score, k)
        assert int(mask.sum()) == k
        assert_close(mask, by_sort(score, k), **EXACT)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", [topk_mask, triton_mask, cuda_mask])
def test_in_a_cuda_graph_without_waiting(impl):
    score = torch.randn(300_001, device="cuda")
    impl(score, 1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        impl(score, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = impl(score, 1000)
    for values in (torch.randn(300_001), torch.randint(0, 4, (300_001,)).float()):
        score.copy_(values)
        graph.replay()
        assert_close(mask, by_sort(score, 1000), **EXACT)

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.kernels.sparse_linear import ROW_MULTIPLE, csr_unpack
from resu_compile.runtime import csr_cache
from resu_compile.runtime.csr_cache import csr_of


def masked(device="cpu", shape=(6, 8)):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape, device=device))
    resu.sparsify(model, 0.5, compile=False)
    ctl = resu.controller(model)
    return model, ctl, ctl.weights["weight"]


def unpacked(csr, weight, transposed):
    shape = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
    value = csr_unpack(csr, shape)
    return value.t() if transposed else value


@pytest.mark.parametrize("transposed", [True, False])
def test_packs_the_active_entries(transposed, device):
    model, ctl, weight = masked(device)
    csr = csr_of(weight, transposed=transposed)
    assert torch.equal(unpacked(csr, weight, transposed), model.weight)
    assert csr.ptr.numel() == weight.shape[transposed] + 1


def test_active_zeros_are_kept_so_that_counts_stay(device):
    model, ctl, weight = masked(device)
    entries = csr_of(weight, transposed=False).val.numel()
    with torch.no_grad():
        model.weight.zero_()
    assert csr_of(weight, transposed=False).val.numel() == entries


def test_packs_once_until_something_changes(monkeypatch):
    model, ctl, weight = masked()
    packs = []
    pack = csr_cache.csr_pack
    monkeypatch.setattr(csr_cache, "csr_pack", lambda *args: packs.append(args) or pack(*args))
    for _ in range(3):
        csr_of(weight, transposed=False)
        csr_of(weight, transposed=True)
    assert len(packs) == 2
    with torch.no_grad():
        model.weight.mul_(2)
    assert torch.equal(unpacked(csr_of(weight, transposed=False), weight, False), model.weight)
    ctl.prune(0.75)
    assert torch.equal(unpacked(csr_of(weight, transposed=False), weight, False), model.weight)
    model.weight.data = torch.randn_like(model.weight)
    ctl.refresh()
    assert torch.equal(unpacked(csr_of(weight, transposed=False), weight, False), model.weight)
    assert len(packs) == 5


def test_a_fused_step_is_noticed():
    model, _, weight = masked()
    csr_of(weight, transposed=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.weight.sum().backward()
    optimizer.step()
    assert torch.equal(unpacked(csr_of(weight, transposed=False), weight, False), model.weight)


def test_addresses_stay_while_counts_do(device):
    """CUDA graphs and Inductor's checks of sizes rely on it."""
    model, ctl, weight = masked(device, (5, 40))
    before = csr_of(weight, transposed=False)
    addresses = [part.data_ptr() for part in (before.ptr, before.col, before.val)]
    for _ in range(3):
        with ctl.resurrect(lr=0.1, init="normal", budget=0.5):
            pass
        after = csr_of(weight, transposed=False)
        assert [part.data_ptr() for part in (after.ptr, after.col, after.val)] == addresses
        assert torch.equal(unpacked(after, weight, False), model.weight)
    ctl.prune(0.75)
    assert csr_of(weight, transposed=False).val.numel() < before.val.numel()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_room_for_padding_depends_on_the_count_alone():
    model, ctl, weight = masked("cuda", (5, 40))
    csr = csr_of(weight, transposed=False)
    assert csr.val.numel() == weight.nnz + 5 * (ROW_MULTIPLE - 1)


def test_packed_in_inference_mode_and_changed_outside():
    model, _, weight = masked()
    with torch.inference_mode():
        csr_of(weight, transposed=False)
    with torch.no_grad():
        model.weight.mul_(2)
    assert torch.equal(unpacked(csr_of(weight, transposed=False), weight, False), model.weight)


def test_is_forgotten_with_the_model():
    model, ctl, weight = masked()
    csr_of(weight, transposed=False)
    count = len(csr_cache._cache)
    del model, ctl, weight
    gc.collect()
    assert len(csr_cache._cache) < count

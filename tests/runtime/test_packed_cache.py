from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.kernels import packed_linear
from resu_compile.kernels.plan import Kernel
from resu_compile.runtime import packed_cache, packed_room
from resu_compile.runtime.packed_cache import content_of, packed_of

CSR = frozenset({Kernel.CSR})


def masked(device="cpu", shape=(6, 8)):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape, device=device))
    resu.sparsify(model, 0.5, compile=False)
    ctl = resu.controller(model)
    return model, ctl, ctl.weights["weight"]


def unpacked(weight, transposed=False, formats=CSR):
    value = packed_of([(weight, transposed)], formats).unpack()
    return value.t() if transposed else value


def addresses(packed):
    return [tensor.data_ptr() for tensor in packed.tensors()]


@pytest.mark.parametrize("transposed", [True, False])
def test_packs_the_active_entries(transposed, device):
    model, ctl, weight = masked(device)
    packed = packed_of([(weight, transposed)], CSR)
    assert torch.equal(unpacked(weight, transposed), model.weight)
    assert packed.shape == ((8, 6) if transposed else (6, 8))
    assert packed.formats == CSR


def test_active_zeros_are_kept_so_that_counts_stay(device):
    model, ctl, weight = masked(device)
    before = [tensor.shape for tensor in packed_of([(weight, False)], CSR).tensors()]
    with torch.no_grad():
        model.weight.zero_()
    assert [tensor.shape for tensor in packed_of([(weight, False)], CSR).tensors()] == before


def test_packs_once_until_something_changes(monkeypatch):
    model, ctl, weight = masked()
    packs = []
    form = packed_linear.format_of(Kernel.CSR)
    counted = form._replace(pack=lambda *args: packs.append(args) or form.pack(*args))
    monkeypatch.setattr(packed_room, "format_of", lambda _: counted)
    for _ in range(3):
        unpacked(weight, False)
        unpacked(weight, True)
    assert len(packs) == 2
    with torch.no_grad():
        model.weight.mul_(2)
    assert torch.equal(unpacked(weight), model.weight)
    ctl.prune(0.75)
    assert torch.equal(unpacked(weight), model.weight)
    model.weight.data = torch.randn_like(model.weight)
    ctl.refresh()
    assert torch.equal(unpacked(weight), model.weight)
    assert len(packs) == 5


def test_a_fused_step_is_noticed():
    model, _, weight = masked()
    unpacked(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.weight.sum().backward()
    optimizer.step()
    assert torch.equal(unpacked(weight), model.weight)


def test_addresses_stay_while_counts_do(device):
    """CUDA graphs and Inductor's checks of sizes rely on it."""
    model, ctl, weight = masked(device, (5, 40))
    before = packed_of([(weight, False)], CSR)
    places = addresses(before)
    for _ in range(3):
        with ctl.resurrect(lr=0.1, init="normal", budget=0.5):
            pass
        assert addresses(packed_of([(weight, False)], CSR)) == places
        assert torch.equal(unpacked(weight), model.weight)
    ctl.prune(0.75)
    assert packed_of([(weight, False)], CSR).size_bytes < before.size_bytes


def pair(sparsity=0.5):
    """Two weights of one input, one stored as its transpose."""
    model = nn.Module()
    model.first = nn.Parameter(torch.randn(6, 8))
    model.second = nn.Parameter(torch.randn(8, 3))
    resu.sparsify(model, sparsity, compile=False)
    ctl = resu.controller(model)
    return model, ctl, [(ctl.weights["first"], False), (ctl.weights["second"], True)]


def test_several_weights_are_packed_as_one():
    model, ctl, members = pair()
    packed = packed_of(members, CSR)
    assert packed.shape == (9, 8)
    assert torch.equal(packed.unpack(), torch.cat([model.first, model.second.t()]))
    places, content = addresses(packed), content_of(members)
    with torch.no_grad():
        model.second.mul_(3)
    assert content_of(members) != content
    packed = packed_of(members, CSR)
    assert addresses(packed) == places
    assert torch.equal(packed.unpack(), torch.cat([model.first, model.second.t()]))


def test_formats_are_packed_one_by_one():
    model, _, weight = masked()
    csr = packed_of([(weight, False)], CSR)
    both = packed_of([(weight, False)], {Kernel.CSR, Kernel.TILES})
    assert both.formats == {Kernel.CSR, Kernel.TILES}
    assert set(addresses(csr)) <= set(addresses(both))
    for kernel in both.formats:
        own = packed_linear.format_of(kernel).unpack(both.weights[kernel])
        assert torch.equal(own, model.weight)


@pytest.mark.parametrize("kernel", [Kernel.ROWS, Kernel.TILES], ids=lambda kernel: kernel.name)
def test_commits_that_keep_counts_change_contents_in_place(kernel, device):
    """Formats that pad by the mask have room to spare."""
    model, ctl, weight = masked(device, (64, 128))
    before = packed_of([(weight, False)], {kernel})
    places, layout = addresses(before), before.layout
    for _ in range(3):
        with ctl.resurrect(lr=0.1, init="normal", eps=1.0, budget=0.3) as phase:
            pass
        assert phase.report.resurrected
        packed = packed_of([(weight, False)], {kernel})
        assert addresses(packed) == places
        assert packed.layout == layout
        assert torch.equal(packed.unpack(), model.weight)


def test_packed_in_inference_mode_and_changed_outside():
    model, _, weight = masked()
    with torch.inference_mode():
        unpacked(weight)
    with torch.no_grad():
        model.weight.mul_(2)
    assert torch.equal(unpacked(weight), model.weight)


def test_is_forgotten_with_the_model():
    model, ctl, members = pair()
    packed_of(members, CSR)
    count = len(packed_cache._cache)
    del model, ctl, members
    gc.collect()
    assert len(packed_cache._cache) < count

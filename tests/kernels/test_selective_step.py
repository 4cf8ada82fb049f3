"""The selective step: the reference by its sets, the kernels by the reference, edges, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels import radix_select, selective_step
from resu_compile.kernels._triton import HAS_TRITON
from resu_compile.kernels.mask_bits import pack_mask
from resu_compile.kernels.selective_step import (
    SAMPLE_BLOCKS,
    Places,
    Rule,
    selective_step_,
    selective_step_cuda,
    selective_step_reference,
    selective_step_triton,
    step_module,
)
from tests.tolerances import EXACT

CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")]
RULE = Rule(0.25, 0.5, 1e-8, 0.5, 0, 0, False, 0.0)
# theta takes two or three roundings, by fused steps or apart; values are of order 1
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def run_op(places, rule):
    n_pruned = places.weight.numel() - _ones(places.bits)
    selective_step_(*places, n_pruned=n_pruned, **rule._asdict())


def run_cuda(places, rule):
    module = step_module(places.weight, places.grad)
    assert module is not None, "NVRTC is there on every GPU that this suite runs on"
    selective_step_cuda(module, places, rule)


def _ones(bits):
    return sum(int(byte).bit_count() for byte in bits.tolist())


IMPLS = [
    pytest.param(run_op, id="op"),
    pytest.param(selective_step_triton, id="triton", marks=needs_triton),
    pytest.param(run_cuda, id="cuda", marks=needs_cuda),
]


def by_sets(theta, grad, ema, ema_abs, rule):
    """The step as it is written, place by place, in float64; returns the places that moved."""
    beta, places = rule.beta, range(len(theta))
    for i in places:
        ema[i] = beta * ema[i] + (1 - beta) * grad[i]
        ema_abs[i] = beta * ema_abs[i] + (1 - beta) * abs(grad[i])
    direction = [m / (v + rule.delta) for m, v in zip(ema, ema_abs, strict=True)]
    ranked = sorted(places, key=lambda i: (-abs(grad[i]), i))
    screened = set(ranked[: rule.k_screen])
    consistent = {i for i in places if abs(direction[i]) > rule.tau}
    chosen = [i for i in ranked if i in screened & consistent][: rule.k_select]
    for i in chosen:
        step = direction[i] if rule.adaptive else grad[i]
        step = abs(direction[i]) * step + rule.weight_decay * theta[i]
        theta[i] -= rule.lr * step
    margin = min((abs(abs(d) - rule.tau) for d in direction), default=1.0)
    return chosen, margin


def grid(shape, step, most):
    """Multiples of ``step``: sums and halves of them are exact, so that all sides see one C."""
    return torch.randint(-most, most + 1, shape) * step


def make(shape, rule, gradient="grid", dtype=torch.float32, device="cpu", density=0.3):
    """Tensors of a step, and the rule with its two shares (of P) made counts."""
    grad = torch.randn(shape) if gradient == "normal" else grid(shape, 0.5, 4)
    grad = torch.ones(shape) if gradient == "all equal" else grad
    grad = grad.bfloat16().float() if gradient == "normal" else grad  # few bits: exact averages
    ema = grid(shape, 0.25, 4)
    ema_abs = ema.abs() + grid(shape, 0.25, 2).abs()
    mask = torch.rand(shape) < density
    tensors = torch.randn(shape).to(dtype), grad.to(dtype), ema, ema_abs, pack_mask(mask)
    pruned = int((~mask).sum())
    rule = rule._replace(
        k_screen=round(rule.k_screen * pruned), k_select=round(rule.k_select * pruned)
    )
    return Places(*(x.to(device) for x in tensors)), ~mask.to(device), rule


def expect(places, pruned, rule):
    """The reference on the pruned places, on the CPU, beside untouched active ones."""
    whole = [x.cpu().clone() for x in places[:4]]
    vectors = [x[pruned.cpu()] for x in whole]
    selective_step_reference(*vectors, **rule._asdict())
    for x, vector in zip(whole, vectors, strict=True):
        x[pruned.cpu()] = vector
    return Places(*whole, places.bits.cpu())


def check(impl, places, pruned, rule):
    expected = expect(places, pruned, rule)
    before = places.weight.cpu().clone()
    assert impl(places, rule) is None
    moved = places.weight.cpu() != before
    assert_close(moved, expected.weight != before, **EXACT)
    tolerance = CLOSE if places.weight.dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-3}
    assert_close(places.weight.cpu(), expected.weight, **tolerance)
    assert_close(places.ema.cpu(), expected.ema, **EXACT)
    assert_close(places.ema_abs.cpu(), expected.ema_abs, **EXACT)
    assert_close(places.grad.cpu(), expected.grad, **EXACT)


# -- the reference ---------------------------------------------------------------------------
quarters = st.integers(-3, 3).map(lambda i: i / 4)


@settings(deadline=None, max_examples=150)
@given(
    data=st.lists(st.tuples(quarters, quarters, quarters, quarters.map(abs)), max_size=12),
    k_screen=st.integers(0, 14),
    k_select=st.integers(0, 14),
    adaptive=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.5]),
)
def test_reference_is_the_sets(data, k_screen, k_select, adaptive, weight_decay):
    rule = RULE._replace(
        k_screen=k_screen, k_select=k_select, adaptive=adaptive, weight_decay=weight_decay
    )
    columns = [list(column) for column in zip(*data, strict=True)] or [[], [], [], []]
    vectors = [torch.tensor(column, dtype=torch.float64) for column in columns]
    by_sets(*columns, rule)
    selective_step_reference(*vectors, **rule._asdict())
    for column, vector in zip(columns, vectors, strict=True):
        assert_close(vector, torch.tensor(column, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_ties_are_cut_twice():
    # |g| = 1 everywhere; P_mag = places 0..3; of those 1, 2, 3 are consistent; two may move
    ema = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0])
    theta, grad, ema_abs = torch.zeros(5), torch.ones(5), torch.ones(5)
    rule = RULE._replace(lr=1.0, k_screen=4, k_select=2)
    selective_step_reference(theta, grad, ema, ema_abs, **rule._asdict())
    assert (theta != 0).tolist() == [False, True, True, False, False]


# -- the kernels -----------------------------------------------------------------------------
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gradient", ["grid", "normal", "all equal"])
@pytest.mark.parametrize("shape", [(1,), (37, 101), (3, 5, 7), (2049,)], ids=str)
def test_matches_reference(shape, gradient, impl, device):
    for k_screen, k_select in ((0.5, 0.2), (0.9, 1), (1, 0.1), (1, 1)):
        rule = RULE._replace(k_screen=k_screen, k_select=k_select)
        check(impl, *make(shape, rule, gradient, device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("adaptive", [False, True])
def test_both_steps_and_decay(adaptive, weight_decay, impl, device):
    rule = Rule(0.25, 0.5, 0.25, 0.4, 0.6, 0.3, adaptive, weight_decay)
    check(impl, *make((500,), rule, "normal", device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(dtype, impl, device):
    rule = RULE._replace(k_screen=0.5, k_select=0.3, lr=1.0)
    check(impl, *make((999,), rule, dtype=dtype, device=device))


@needs_triton
@settings(deadline=None, max_examples=15)
@given(
    numel=st.integers(1, 70),
    k_screen=st.integers(0, 70),
    k_select=st.integers(0, 70),
    tau=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    density=st.sampled_from([0.0, 0.4, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_any_counts(numel, k_screen, k_select, tau, density, seed):
    torch.manual_seed(seed)
    places, pruned, _ = make((numel,), RULE, device="cuda" if CUDA else "cpu", density=density)
    n_pruned = int(pruned.sum())
    rule = RULE._replace(
        tau=tau, k_screen=min(k_screen, n_pruned), k_select=min(k_select, n_pruned)
    )
    check(selective_step_triton, places, pruned, rule)


@needs_triton
@pytest.mark.parametrize("shares", [(0.5, 0.2), (0.2, 0.5), (1, 0.2)], ids=str)
def test_many_tiles_programs_and_chunks(shares, device, monkeypatch):
    for constant, value in (("BLOCK", 64), ("PROGRAMS", 2), ("CHUNKS", 4)):
        monkeypatch.setattr(radix_select, constant, value)
    rule = RULE._replace(k_screen=shares[0], k_select=shares[1])
    check(selective_step_triton, *make((1000,), rule, device=device))


@pytest.mark.parametrize("impl", IMPLS)
def test_active_places_keep_every_bit(impl, device):
    rule = RULE._replace(k_screen=0.9, k_select=0.9, weight_decay=0.5)
    places, pruned, rule = make((30, 41), rule, device=device)
    for x in places[:4]:
        x[~pruned] = math.nan
    impl(places, rule)
    for x in places[:4]:
        assert_close(x.isnan(), ~pruned, **EXACT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("numel", [1, 13, 1023, 2051])
def test_writes_only_its_tensors(numel, impl, device):
    rule = RULE._replace(k_screen=1, k_select=1, tau=-1.0, weight_decay=1.0)
    places, _, rule = make((numel,), rule, device=device, density=0.0)
    buffers = [torch.full((numel + 128,), 7.0, device=device) for _ in range(3)]
    inner = [buffer[64:-64] for buffer in buffers]
    for x, source in zip(inner, (places.weight, places.ema, places.ema_abs), strict=True):
        x.copy_(source)
    impl(places._replace(weight=inner[0], ema=inner[1], ema_abs=inner[2]), rule)
    assert not any((x == 7).any() for x in inner)
    for buffer in buffers:
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shares", [(0, 1), (1, 0)], ids=str)
def test_no_place_only_averages(shares, impl, device):
    rule = RULE._replace(k_screen=shares[0], k_select=shares[1])
    places, pruned, rule = make((300,), rule, device=device)
    weight, ema = places.weight.clone(), places.ema.clone()
    expected = expect(places, pruned, rule)
    impl(places, rule)
    assert_close(places.weight, weight, **EXACT)
    assert_close(places.ema.cpu(), expected.ema, **EXACT)
    assert not torch.equal(places.ema, ema)


@pytest.mark.parametrize("impl", IMPLS)
def test_50_steps_of_a_plain_loop(impl, device):
    generator = torch.Generator().manual_seed(3)
    places, pruned, _ = make((300,), RULE, device=device)
    places.ema.zero_()
    places.ema_abs.zero_()
    n_pruned = int(pruned.sum())
    rule = Rule(0.01, 0.9, 1e-8, 0.5, n_pruned // 2, n_pruned // 5, True, 0.01)
    lists = [x[pruned].double().tolist() for x in places[:4]]
    for _ in range(50):
        grad = torch.randn(300, generator=generator)
        places.grad.copy_(grad)
        lists[1] = grad[pruned.cpu()].double().tolist()
        _, margin = by_sets(*lists, rule)
        assert margin > 2e-6, "C so near tau that float32 and float64 may differ: take another seed"
        impl(places, rule)
    theta = torch.tensor(lists[0], dtype=torch.float64)
    # 50 steps of size 0.01, each rounded at theta's size of order 1
    assert_close(places.weight[pruned].cpu().double(), theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 7, 264])
@pytest.mark.parametrize("numel", [1, 4099, 300_007])
def test_the_lists_of_the_cuda_launch_fit(numel, blocks, monkeypatch):
    launched, workspaces, original = [], [], selective_step.start_search

    def start_search(*args, **kwargs):
        workspace, lists = original(*args, **kwargs)
        workspaces.append(workspace)
        return workspace, lists

    class Recorder:
        def launch(self, name, grid, args, *, cooperative):
            launched.append((name, grid, args, cooperative))

    monkeypatch.setattr(selective_step, "start_search", start_search)
    monkeypatch.setattr(selective_step, "count_blocks", lambda _: blocks)
    places, _, rule = make((numel,), RULE._replace(k_screen=1, k_select=1), density=0.0)
    selective_step_cuda(Recorder(), places, rule)
    ((name, grid, args, cooperative),), (workspace,) = launched, workspaces
    assert (name, grid, cooperative) == ("step_fused", blocks, True)
    start, end = workspace.data_ptr(), workspace.data_ptr() + workspace.nbytes
    assert start == args.state < args.hist < args.fine < args.counts < args.window
    assert args.window % 16 == args.sure % 16 == 0
    assert args.window + 16 * blocks * args.window_room == args.sure
    assert args.sure + 8 * blocks * args.sure_room == args.lengths
    assert args.lengths + 4 * 2 * blocks == end
    assert blocks * args.sure_room >= rule.k_select
    assert blocks * args.window_room >= numel / 8
    assert args.numel == numel <= args.chunk * 1024
    assert list(args.want) == [numel, numel]


def test_float64_takes_the_reference(device):
    places, pruned, rule = make((64,), RULE._replace(k_screen=0.5, k_select=0.2), device=device)
    places = Places._make((*(x.double() for x in places[:4]), places.bits))
    check(run_op, places, pruned, rule)


@pytest.mark.parametrize("view", [torch.Tensor.t, lambda x: x[:, 1:]], ids=["t", "slice"])
def test_op_on_views(view, device):
    rule = RULE._replace(k_screen=0.7, k_select=0.4)
    places, pruned, rule = make(view(torch.empty(40, 30)).shape, rule, device=device)
    bases = [torch.zeros(40, 30, device=device) for _ in range(4)]
    strided = Places._make((*(view(base) for base in bases), places.bits))
    for x, y in zip(strided[:4], places[:4], strict=True):
        x.copy_(y)
    check(run_op, strided, pruned, rule)


def test_nothing_pruned(device):
    places, _, _ = make((50,), RULE, device=device, density=1.1)
    before = [x.clone() for x in places]
    run_op(places, RULE._replace(k_screen=3, k_select=3))
    for x, y in zip(places, before, strict=True):
        assert_close(x, y, **EXACT)


@pytest.mark.parametrize("form", ["contiguous", "transposed"])
def test_opcheck(form, device):
    rule = RULE._replace(k_screen=0.5, k_select=0.2)
    places, pruned, rule = make((12, 12), rule, device=device)
    tensors = [x.t() if form == "transposed" else x for x in places[:4]]
    n_pruned = int(pruned.sum())
    torch.library.opcheck(
        torch.ops.resu_compile.selective_step_.default,
        (*tensors, places.bits),
        {"n_pruned": n_pruned, **rule._asdict()},
    )


# -- refusals --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.ones(3)}, r"grad: expected shape \(4, 5\) like weight, got \(3,\)"),
        ({"ema": torch.ones(5, 4)}, r"ema: expected shape \(4, 5\) like weight, got \(5, 4\)"),
        ({"ema_abs": torch.ones(4, 5).double()}, r"ema_abs: expected dtype torch\.float32"),
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, r"bits: expected uint8 of shape \(3,\)"),
        ({"n_pruned": 21}, r"n_pruned: expected an integer in \[0, 20\], got 21"),
        ({"n_pruned": 7}, r"n_pruned: expected 20 by bits, got 7"),
        ({"k_screen": -1}, r"k_screen: expected an integer of at least 0, got -1"),
        ({"k_select": -2}, r"k_select: expected an integer of at least 0, got -2"),
    ],
)
def test_refusals(changes, message):
    arguments = {name: torch.ones(4, 5) for name in ("weight", "grad", "ema", "ema_abs")}
    arguments |= {"bits": torch.zeros(3, dtype=torch.uint8), "n_pruned": 20, **RULE._asdict()}
    with pytest.raises(ArgumentError, match=message):
        selective_step_(**(arguments | changes))


# -- GPU -------------------------------------------------------------------------------------
@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", [run_op, selective_step_triton, run_cuda])
@pytest.mark.parametrize("gradient", ["normal", "grid", "all equal"])
@pytest.mark.parametrize("shares", [(0.5, 0.2), (0.2, 0.9), (1, 0.01)], ids=str)
def test_large(shares, gradient, impl):
    rule = RULE._replace(k_screen=shares[0], k_select=shares[1])
    check(impl, *make((2048 * 1024 + 2048 * 3 + 5,), rule, gradient, device="cuda"))


def sampled_places(numel):
    """The places that the sample of selective_step.cu looks at."""
    quads, sampled = numel // 4, SAMPLE_BLOCKS * 1024
    assert quads > sampled, "all are sampled"
    q = torch.arange(sampled)
    mixed = q * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    quad = q * quads // sampled + (mixed ^ (mixed >> 13)) % (quads // sampled)
    return (quad[:, None] * 4 + torch.arange(4)).flatten()


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("factor", "shares", "listed"),
    [
        pytest.param(1.0, (0.5, 0.2), 1, id="sample is right"),
        pytest.param(1.0, (0.2, 0.9), 1, id="screen decides"),
        pytest.param(1.0, (1, 1), 1, id="nothing limits"),
        pytest.param(2.0**-20, (0.5, 0.2), 0, id="threshold above"),
        pytest.param(2.0**20, (0.5, 0.2), 0, id="threshold below"),
        pytest.param(0.0, (0.5, 0.2), 0, id="sample is zero"),
    ],
)
def test_a_misleading_sample_is_noticed(factor, shares, listed, monkeypatch):
    numel = 2048 * 1024
    rule = RULE._replace(k_screen=shares[0], k_select=shares[1])
    places, pruned, rule = make((numel,), rule, "normal", device="cuda")
    places.grad[sampled_places(numel).cuda()] *= factor
    kept, original = [], selective_step.start_search

    def start_search(*args, **kwargs):
        kept.append(original(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(selective_step, "start_search", start_search)
    check(run_cuda, places, pruned, rule)
    assert int(kept[0][0][8]) == listed  # word 8 of struct State


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", [selective_step_triton, run_cuda])
def test_in_a_cuda_graph_without_waiting(impl):
    rule = RULE._replace(k_screen=0.5, k_select=0.2)
    places, pruned, rule = make((500, 601), rule, "normal", device="cuda")
    impl(places, rule)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        impl(places, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        impl(places, rule)
    for gradient in ("normal", "grid"):
        fresh, _, _ = make((500, 601), RULE, gradient, device="cuda")
        for x, y in zip(places[:4], fresh[:4], strict=True):
            x.copy_(y)
        check(lambda *_: graph.replay(), places, pruned, rule)

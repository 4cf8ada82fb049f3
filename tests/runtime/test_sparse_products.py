"""Which sites the sparse operator computes, which of them as one, and by which plan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resu_compile as resu
from resu_compile.config import CompileConfig
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel
from resu_compile.passes.find_weights import find_weights
from resu_compile.runtime import sparse_products
from resu_compile.runtime.plans import Plan
from resu_compile.runtime.sparse_products import choose_products, signature_of, sparse_plan
from tests.compiling import Backend, no_recompile
from tests.graphs import captured


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Attention(nn.Module):
    """q, k and v of one input, then gate and up of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=n == 64) for n in (64, 64, 128))
        self.gate, self.up = (nn.Linear(128, 64, bias=False) for _ in range(2))

    def forward(self, x):
        h = F.scaled_dot_product_attention(self.q(x)[None], self.k(x)[None], self.v(x)[None])[0]
        return F.silu(self.gate(h)) * self.up(h)


X = torch.randn(4, 64)


def sparse(sparsity=0.5, **options):
    model = resu.sparsify(Attention(), sparsity, compile=False, **options)
    return model, resu.controller(model)


def chosen(model, ctl, threshold=0.0, plans=None, dynamic=False, monkeypatch=None):
    """Names of the weights of each product; ``plans``: output features -> plan."""
    if plans is not None:
        monkeypatch.setattr(sparse_products, "choose_plan", lambda *args, **_: plans[args[1]])
    gm = captured(model, X, dynamic=dynamic)
    sites, _ = find_weights(gm, gm.parameters_at)
    by_parameter = {id(w.parameter): w for w in ctl.weights.values()}
    weights = {i: by_parameter[id(p)] for i, p in gm.parameters_at.items() if id(p) in by_parameter}
    products = choose_products(gm, sites, weights, CompileConfig(sparse_threshold=threshold))
    return {
        tuple(weights[i].name.split(".")[0] for i, _ in product.members): product
        for product in products
    }


def plan(kernel, ms=None, **others):
    kernels = [kernel] * len(BUCKET_ROWS)
    for bucket, own in others.items():
        kernels[int(bucket[1:])] = own
    times = {} if ms is None else {2: {kernel: ms}}  # 4 rows
    return Plan(tuple(kernels), times)


def test_layers_of_one_input_are_one_product():
    model, ctl = sparse()
    assert set(chosen(model, ctl)) == {("q", "k", "v"), ("gate", "up")}


def test_those_that_stay_dense_are_left_out():
    model, ctl = sparse(exclude=["k", "gate"])
    assert set(chosen(model, ctl)) == {("q", "v"), ("up",)}


def test_a_threshold_of_one_leaves_nothing():
    model, ctl = sparse()
    assert chosen(model, ctl, threshold=1.0) == {}


@pytest.mark.parametrize(
    ("together", "products"),
    [
        (plan(Kernel.CSR, 2.9), {("q", "k", "v")}),
        (plan(Kernel.CSR, 3.1), {("q",), ("k",), ("v",)}),
        (plan(Kernel.CSR), {("q", "k", "v")}),
        (plan(Kernel.DENSE, 1.0), {("q",), ("k",), ("v",)}),
        (plan(Kernel.CSR, 2.9, b0=Kernel.DENSE), {("q", "k", "v")}),  # no batch of 1 comes
    ],
    ids=["faster", "slower", "unmeasured", "dense", "dense elsewhere"],
)
def test_measured_times_decide(together, products, monkeypatch):
    model, ctl = sparse(exclude=["gate", "up"])
    plans = {64: plan(Kernel.CSR, 1.0), 128: plan(Kernel.CSR, 1.0), 256: together}
    assert set(chosen(model, ctl, plans=plans, monkeypatch=monkeypatch)) == products


def test_any_batch_size_has_to_be_sparse_where_all_may_come(monkeypatch):
    model, ctl = sparse(exclude=["gate", "up"])
    single, mixed = plan(Kernel.CSR), plan(Kernel.CSR, b9=Kernel.DENSE)
    plans = {64: single, 128: single, 256: mixed}
    apart = {("q",), ("k",), ("v",)}
    assert set(chosen(model, ctl, plans=plans, dynamic=True, monkeypatch=monkeypatch)) == apart
    plans[256] = single
    together = chosen(model, ctl, plans=plans, dynamic=True, monkeypatch=monkeypatch)
    assert set(together) == {("q", "k", "v")}


def test_sparsity_and_shape_of_a_merged_plan(monkeypatch):
    asked = []

    def record(*args, **others):
        asked.append((args[1:4], others))
        return plan(Kernel.CSR)

    monkeypatch.setattr(sparse_products, "choose_plan", record)
    model, ctl = sparse(exclude=["gate", "up"], overrides={"v.*": 0.75})
    product = chosen(model, ctl)["q", "k", "v"]
    assert ((256, 64, 0.625), {"cuda_graphs": False, "release_dense": False, "pattern": None}) in [
        (args, others) for args, others in asked
    ]
    weights = {i: w for i, w in enumerate(ctl.weights.values())}
    names = [name for name in ("q", "k", "v")]
    by_name = {w.name.split(".")[0]: i for i, w in weights.items()}
    members = tuple((by_name[name], False) for name in names)
    packed = sparse_products.replace(product, members=members).packed(weights)
    assert packed.shape == (256, 64)
    rows = torch.cat([model.q.weight, model.k.weight, model.v.weight])
    assert torch.equal(packed.unpack(), rows)


@pytest.mark.parametrize(
    ("pattern", "expected"), [("2:4", (2, 4)), ("1:4", (1, 4)), (None, None)], ids=str
)
def test_the_pattern_is_told(pattern, expected, monkeypatch):
    told = []

    def record(*_, **others):
        told.append(others["pattern"])
        return plan(Kernel.DENSE)

    monkeypatch.setattr(sparse_products, "choose_plan", record)
    model = resu.sparsify(Attention(), pattern=pattern, compile=False)
    chosen(model, resu.controller(model))
    assert set(told) == {expected}


def test_a_pattern_along_the_other_dimension_is_not(monkeypatch):
    told = []
    monkeypatch.setattr(
        sparse_products, "choose_plan", lambda *_, **others: told.append(others["pattern"])
    )
    model = nn.Linear(8, 8, bias=False)
    resu.sparsify(model, pattern="2:4", compile=False)
    weight = resu.controller(model).weights["weight"]
    gm = captured(lambda x: x @ model.weight, torch.randn(2, 8))
    (site,), _ = find_weights(gm, gm.parameters_at)
    sparse_plan(site, weight, CompileConfig())
    assert told == [None]


def test_merged_results_and_commits():
    """Differently masked, changed by a commit: the same numbers, nothing compiled again."""
    model, ctl = sparse(overrides={"v.*": 0.75}, exclude=["gate"])
    backend = Backend(threshold=0.0)
    call = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))
    (run,) = [binding.run for binding in backend.graphs[0]._bindings.values()]
    assert sorted(len(product.sites) for product, _ in run.products) == [1, 3]
    before = [signature_of(product.packed(run.binding.weights)) for product, _ in run.products]
    addresses = [tensor.data_ptr() for tensor in run.extra]
    with no_recompile():
        for _ in range(2):
            with ctl.resurrect(lr=0.1, init="normal", eps=1.0, budget=0.3) as phase:
                pass
            assert phase.report.resurrected
            with torch.no_grad():
                torch.testing.assert_close(call(X), model(X))
    assert backend.counts == [1]
    after = [signature_of(product.packed(run.binding.weights)) for product, _ in run.products]
    assert after == before
    assert [tensor.data_ptr() for tensor in run.extra] == addresses


def test_through_inductor():
    model, _ = sparse()
    expected = model(X).detach()
    resu.controller(model).compile_config = CompileConfig(sparse_threshold=0.0)
    resu.controller(model).compile()
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected)


class Feedforward(nn.Module):
    """A norm, gate and up of its result, down, and the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = (nn.Linear(64, 128, bias=False) for _ in range(2))
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_what_inductor_makes_around_products():
    """No kernel more than around dense ones: the parts of a merged product are not copied out."""
    from torch._inductor.utils import run_and_get_code

    model = resu.sparsify(Feedforward(), 0.5, sparse_threshold=0.0)
    # monkeypatch would take the setting away for good
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        out, (code,) = run_and_get_code(model, X)
    call = code[code.index("def call(") :]
    assert call.count("resu_compile.sparse_linear.default(") == 2
    kernels = [line for line in call.splitlines() if line.strip().startswith("cpp_fused")]
    assert len(kernels) == 3  # the norm; silu and the product with it; the sum
    torch.testing.assert_close(out, model.forward(X))


# -- CUDA --------------------------------------------------------------------------------------
class Decoder(nn.Module):
    """The layers of a small decoder: q, k and v, out, gate and up, down."""

    def __init__(self, width=512) -> None:
        super().__init__()
        sizes = {"q": width, "k": width // 2, "v": width // 2, "o": width}
        sizes |= {"gate": 2 * width, "up": 2 * width}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(width, size, bias=False))
        self.down = nn.Linear(2 * width, width)
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        h = self.q(x) + torch.cat([self.k(x), self.v(x)], -1).tanh()
        x = x + self.o(h)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return F.gelu(self.fc(x))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("mode", "release", "sparsity"),
    [
        (None, False, 0.5),
        (None, True, 0.9),
        ("reduce-overhead", False, 0.9),
        ("reduce-overhead", True, 0.5),
    ],
)
def test_cuda_decoding(mode, release, sparsity):
    """Both kernels, with and without CUDA graphs; a commit records none again."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = Decoder().cuda().bfloat16()
    options = {"mode": mode, "sparse_threshold": 0.4, "release_dense": release}
    resu.sparsify(model, sparsity, **options)
    ctl = resu.controller(model)
    twin = Decoder().cuda().bfloat16()
    with torch.no_grad():
        for rows in (1, 40):
            torch._dynamo.reset()
            for round_ in range(4):
                x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
                y = model(x).clone()
                twin.load_state_dict(model.state_dict())
                torch.testing.assert_close(y, twin(x), rtol=0.05, atol=0.05)
                if round_ == 2 and not release:
                    with ctl.resurrect(lr=0.1, init="normal", budget=0.3):
                        pass
    assert not counters["inductor"]["cudagraph_skips"]
    if release:
        assert not ctl.released.kept
        assert ctl.released.packed_bytes < ctl.released.freed_bytes

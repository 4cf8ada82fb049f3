from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.kernels.packed_linear import pack_linear
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel
from resu_compile.passes.find_weights import find_weights
from resu_compile.passes.merge_linears import find_mergeable
from resu_compile.passes.sparse_matmul import SparseCall, drop_unused, insert_sparse_matmuls
from tests.graphs import calls, captured, text

MASK = torch.rand(6, 8) > 0.6
W = nn.Parameter((torch.randn(6, 8) * MASK), requires_grad=False)
B = nn.Parameter(torch.randn(6), requires_grad=False)
B8 = nn.Parameter(torch.randn(8), requires_grad=False)
X, X6 = torch.randn(4, 8), torch.randn(4, 6)

# every way to a sparse product: call, input, transposed
FORMS = {
    "linear": (lambda x: F.linear(x, W), X, False),
    "linear with bias": (lambda x: F.linear(x, W, B), X, False),
    "linear by name": (lambda x: F.linear(bias=B, weight=W, input=x), X[None], False),
    "linear of a vector": (lambda x: F.linear(x, W, B), X[0], False),
    "linear of t": (lambda x: F.linear(x, W.t(), B8), X6, True),
    "x @ w": (lambda x: x @ W, X6, True),
    "x @ w.t": (lambda x: x @ W.t(), X[None, None], False),
    "x @ w.t.t": (lambda x: x @ W.t().t(), X6, True),
    "mm": (lambda x: torch.mm(x, mat2=W), X6, True),
    "w @ x": (lambda x: W @ x, X.t(), False),
    "w @ x in batches": (lambda x: (W @ x).view(-1), torch.randn(2, 3, 8, 5), False),
    "w.t @ x": (lambda x: torch.matmul(W.t(), x), X6.t(), True),
    "mm left": (lambda x: torch.mm(W, x), X.t(), False),
    "addmm": (lambda x: torch.addmm(B8, x, W), X6, True),
    "addmm of t": (lambda x: torch.addmm(B, x, W.t(), beta=1), X, False),
    "addmm method": (lambda x: B.addmm(x, W.t()), X, False),
    "aten": (lambda x: torch.ops.aten.addmm.default(B8, x, W), X6, True),
}


def sparse_call(gm, sites, positions, kernel=Kernel.CSR, *, keeps_dense=True):
    """(call, packed) of one site, or of several as one."""
    chosen = [sites[i] for i in positions]
    values = [gm.parameters_at[site.index].detach() for site in chosen]
    values = [v.t() if site.transposed else v for v, site in zip(values, chosen, strict=True)]
    packed = pack_linear(torch.cat(values), None, [kernel])
    source = tuple((site.index, site.transposed) for site in chosen)
    plan = (int(kernel),) * len(BUCKET_ROWS)
    rows = tuple(v.shape[0] for v in values)
    tensors, columns = len(packed.tensors()), values[0].shape[1]
    call = SparseCall(
        tuple(positions), source, packed.layout, tensors, rows, columns, plan, keeps_dense
    )
    return call, packed


def rewritten(call, x, kernel=Kernel.CSR, groups=None, **options):
    """(gm, result, sources, report, arguments, further arguments) of the pass on ``call``."""
    gm = captured(call, x)
    weights = [i for i, p in gm.parameters_at.items() if p.dim() == 2]
    sites, _ = find_weights(gm, weights)
    if groups is None:
        groups = [(i,) for i, site in enumerate(sites) if site.form is not None]
    made = [sparse_call(gm, sites, group, kernel, **options) for group in groups]
    result, sources, report = insert_sparse_matmuls(gm, sites, [call for call, _ in made])
    packed = {call.source: packed for call, packed in made}
    extra = [tensor for source in sources for tensor in packed[source].tensors()]
    count = len(gm.graph.find_nodes(op="placeholder"))
    args = [gm.parameters_at.get(i, x) for i in range(count)]
    return gm, result, sources, report, args, extra


@pytest.mark.parametrize("name", FORMS)
def test_product_is_that_of_the_dense_graph(name):
    call, x, transposed = FORMS[name]
    gm, result, sources, report, args, extra = rewritten(call, x)
    assert [flag for ((_, flag),) in sources] == [transposed]
    assert calls(result).count("sparse_linear_autocast") == 1
    assert not {"linear", "matmul", "mm", "addmm"} & set(calls(result))
    (expected,), (out,) = gm(*args), result(*args, *extra)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    assert list(report.rewritten.values()) == ["sparse_linear by CSR"]


def test_graph_before_and_after():
    gm, result, *_ = rewritten(lambda x: torch.tanh(F.linear(x, W, B)), X)
    assert calls(gm) == ["linear", "tanh"]
    assert calls(result) == ["sparse_linear_autocast", "tanh"]
    assert (
        "(l_x_, g_w_, [g_w__packed_0, g_w__packed_1, g_w__packed_2], [2, 3, 0], g_b_, [6, 8], "
        "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 'none')"
    ) in text(result)


def test_the_dense_weight_is_left_out_where_nothing_reads_it():
    _, result, sources, _, args, extra = rewritten(lambda x: x @ W.t(), X, keeps_dense=False)
    assert "(l_x_, None, [" in text(result)
    (((index, _),),) = sources
    assert drop_unused(result, [index]) == {index}
    assert calls(result) == ["sparse_linear_autocast"]
    (out,) = result(args[1 - index], *extra)
    torch.testing.assert_close(out, X @ W.t())


def test_a_weight_that_something_reads_is_not_dropped():
    _, result, *_ = rewritten(lambda x: F.linear(x, W) + W.t().sum(), X, keeps_dense=False)
    before = calls(result)
    assert drop_unused(result, [0, 1]) == set()
    assert calls(result) == before


def test_sites_of_one_orientation_share_their_inputs():
    _, result, sources, _, args, extra = rewritten(
        lambda x: F.linear(x, W) @ W + F.linear(x, W) @ W, X
    )
    assert sorted(flag for ((_, flag),) in sources) == [False, True]
    assert len(extra) == 6
    (out,) = result(*args, *extra)
    torch.testing.assert_close(out, 2 * F.linear(X, W) @ W)


def test_sites_that_were_not_chosen_stay_dense():
    gm, result, sources, report, *_ = rewritten(lambda x: F.linear(x, W), X, groups=[])
    assert calls(result) == ["linear"]
    assert sources == []
    assert list(report.skipped.values()) == ["dense measured faster"]


def test_sites_without_a_form_stay_dense():
    gm, result, sources, report, *_ = rewritten(lambda x: F.linear(x, W[:3]), X)
    assert calls(result) == calls(gm)
    assert sources == []
    assert list(report.skipped.values()) == ["weight is no whole matrix (getitem)"]


def test_a_dense_plan_reads_the_dense_weight():
    _, result, _, _, args, extra = rewritten(lambda x: F.linear(x, W), X, kernel=Kernel.DENSE)
    assert extra == []
    (out,) = result(*args)
    torch.testing.assert_close(out, F.linear(X, W))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_has_the_dtype_of_autocast(dtype):
    def call(x):
        with torch.autocast("cpu", dtype):
            return F.linear(x, W, B)

    gm, result, _, _, args, extra = rewritten(call, X)
    (expected,), (out,) = gm(*args), result(*args, *extra)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected)


# -- activations -------------------------------------------------------------------------------
ACTIVATED = {
    "relu": (lambda y: F.relu(y), "relu"),
    "relu method": (lambda y: y.relu(), "relu"),
    "relu in place": (lambda y: F.relu(y, inplace=True), "relu"),
    "gelu": (lambda y: F.gelu(y), "gelu"),
    "gelu tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "silu": (lambda y: F.silu(y), "silu"),
    "aten": (lambda y: torch.ops.aten.relu.default(y), "relu"),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_an_activation_goes_along(name):
    activate, known = ACTIVATED[name]
    gm, result, _, report, args, extra = rewritten(
        lambda x: F.linear(activate(F.linear(x, W, B)), Q.t()), X, keeps_dense=False
    )
    assert calls(result) == ["sparse_linear_autocast", "t", "sparse_linear_autocast"]
    assert f"'{known}')" in text(result)
    assert f"sparse_linear by CSR, then {known}" in report.rewritten.values()
    torch.testing.assert_close(result(*args, *extra), gm(*args))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: (y := F.linear(x, W)) + F.relu(y),  # read twice
        lambda x: F.linear(x, W).view(-1).relu(),
        lambda x: F.gelu(W @ x.t()),  # turned around afterwards
        lambda x: F.leaky_relu(F.linear(x, W)),
        lambda x: F.silu(F.linear(x, W).double()),
    ],
    ids=["read twice", "viewed", "left", "unknown", "cast"],
)
def test_other_activations_stay(call):
    gm, result, _, _, args, extra = rewritten(call, X)
    assert "'none')" in text(result)
    assert len(calls(result)) >= len(calls(gm))
    # those of fp32 for the fp64 result too: its product is one of fp32
    torch.testing.assert_close(result(*args, *extra), gm(*args), rtol=1.3e-6, atol=1e-5)


# -- several of one input ----------------------------------------------------------------------
Q, K, V = (nn.Parameter(torch.randn(n, 8) * (torch.rand(n, 8) > 0.5)) for n in (6, 2, 4))
BQ, BV = (nn.Parameter(torch.randn(n)) for n in (6, 4))
for parameter in (Q, K, V, BQ, BV):
    parameter.requires_grad_(False)


def merged(call, x, **options):
    """What ``rewritten`` gives, with all that can be merged as one."""
    gm = captured(call, x)
    sites, _ = find_weights(gm, [i for i, p in gm.parameters_at.items() if p.dim() == 2])
    groups = find_mergeable(gm, sites, range(len(sites)))
    single = [(i,) for i in range(len(sites)) if not any(i in group for group in groups)]
    return groups, rewritten(call, x, groups=[*groups, *single], keeps_dense=False, **options)


def qkv(x, bq=None, bv=None):
    return F.linear(x, Q, bq), F.linear(x, K), F.linear(x, V, bv)


@pytest.mark.parametrize("biases", [(None, None), (BQ, None), (BQ, BV)], ids=["no", "one", "two"])
@pytest.mark.parametrize("x", [X, X[0], X.view(2, 2, 8)], ids=["2d", "1d", "3d"])
def test_layers_of_one_input_become_one(x, biases):
    groups, (gm, result, sources, report, args, extra) = merged(lambda x: qkv(x, *biases), x)
    assert groups == [(0, 1, 2)]
    assert calls(result).count("sparse_linear_autocast") == 1
    assert calls(result).count("split") == 1
    assert "linear" not in calls(result)
    assert len(extra) == 3
    for out, expected in zip(result(*args, *extra), gm(*args), strict=True):
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()
    assert set(report.rewritten.values()) == {"sparse_linear by CSR, with 2 of the same input"}


def test_text_of_a_merged_call():
    _, (_, result, *_) = merged(lambda x: F.silu(F.linear(x, Q)) * F.linear(x, Q * 1 + 0, BQ), X)
    assert calls(result).count("linear") == 1  # a computed weight is no site
    _, (_, result, *_) = merged(lambda x: F.silu(F.linear(x, K)).sum() * F.linear(x, V), X)
    assert calls(result)[:4] == ["sparse_linear_autocast", "split", "getitem", "contiguous"]
    assert "split([2, 4], -1)" in text(result)
    assert "silu" in calls(result)


def test_a_part_may_be_the_input_of_the_next():
    def call(x):
        gate, up = F.linear(x, Q), F.linear(x, V)
        return (F.silu(gate)[:, :4] * up) @ V, F.linear(gate, W.t())

    groups, (gm, result, _, _, args, extra) = merged(call, X)
    assert groups == [(0, 1)]
    torch.testing.assert_close(result(*args, *extra), gm(*args))


def written_between(x):
    x = x + 0
    first = F.linear(x, Q)
    x.add_(1)
    return first, F.linear(x, K)


def autocast_between(x):
    first = F.linear(x, Q)
    with torch.autocast("cpu", torch.bfloat16):
        return first, F.linear(x, K)


@pytest.mark.parametrize(
    "call",
    [
        written_between,
        autocast_between,
        lambda x: (F.linear(x, Q), F.linear(x + 1, K)),
        lambda x: (F.linear(x, Q), F.linear(x, Q)),
        lambda x: (F.linear(x, Q), x @ K.t()),
        lambda x: (F.linear(x, Q, BQ + 1), F.linear(x, K)),
    ],
    ids=["written", "autocast", "other x", "same weight", "other form", "computed bias"],
)
def test_what_cannot_be_one_stays_apart(call):
    groups, (gm, result, _, _, args, extra) = merged(call, X)
    assert groups == []
    torch.testing.assert_close(result(*args, *extra), gm(*args))


def test_candidates_alone_are_merged():
    gm = captured(qkv, X)
    sites, _ = find_weights(gm)
    assert find_mergeable(gm, sites, [0, 2]) == [(0, 2)]
    assert find_mergeable(gm, sites, [1]) == []


def test_a_merged_call_has_no_dense_weight():
    with pytest.raises(ArgumentError, match="keeps_dense: expected False"):
        SparseCall((0, 1), "w", (0,), 0, (2, 2), 4, (0,) * 10)
    with pytest.raises(ArgumentError, match="rows: expected one number for each"):
        SparseCall((0, 1), "w", (0,), 0, (2,), 4, (0,) * 10, keeps_dense=False)

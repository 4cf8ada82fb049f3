from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resu_compile.kernels.sparse_linear import ALL_BUCKETS, csr_pack
from resu_compile.passes.find_weights import find_weights
from resu_compile.passes.sparse_matmul import insert_sparse_matmuls
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


def rewritten(call, x, buckets=ALL_BUCKETS):
    """(result, its further inputs, its arguments) of the pass on ``call``."""
    gm = captured(call, x)
    weights = [i for i, p in gm.parameters_at.items() if p is W]
    sites, _ = find_weights(gm, weights)
    result, csr, report = insert_sparse_matmuls(
        gm, sites, dict.fromkeys(range(len(sites)), buckets)
    )
    extra = []
    for _, transposed in csr:
        packed = csr_pack(W.t() if transposed else W)
        extra += [packed.ptr, packed.col, packed.val]
    count = len(gm.graph.find_nodes(op="placeholder"))
    args = [gm.parameters_at.get(i, x) for i in range(count)]
    return gm, result, csr, report, args, extra


@pytest.mark.parametrize("name", FORMS)
def test_product_is_that_of_the_dense_graph(name):
    call, x, transposed = FORMS[name]
    gm, result, csr, report, args, extra = rewritten(call, x)
    assert [flag for _, flag in csr] == [transposed]
    assert calls(result).count("sparse_linear_autocast") == 1
    assert not {"linear", "matmul", "mm", "addmm"} & set(calls(result))
    (expected,), (out,) = gm(*args), result(*args, *extra)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    assert list(report.rewritten.values()) == ["sparse_linear, buckets 111111"]


def test_graph_before_and_after():
    gm, result, *_ = rewritten(lambda x: F.relu(F.linear(x, W, B)), X)
    assert calls(gm) == ["linear", "relu"]
    assert calls(result) == ["sparse_linear_autocast", "relu"]
    assert "(l_x_, g_w_, g_w__ptr, g_w__col, g_w__val, g_b_, 63)" in text(result)


def test_sites_of_one_orientation_share_their_inputs():
    _, result, csr, _, args, extra = rewritten(lambda x: F.linear(x, W) @ W + F.linear(x, W) @ W, X)
    assert sorted(flag for _, flag in csr) == [False, True]
    assert len(extra) == 6
    (out,) = result(*args, *extra)
    torch.testing.assert_close(out, 2 * F.linear(X, W) @ W)


@pytest.mark.parametrize("buckets", [0, None])
def test_sites_that_were_not_chosen_stay_dense(buckets):
    gm = captured(lambda x: F.linear(x, W), X)
    sites, _ = find_weights(gm)
    result, csr, report = insert_sparse_matmuls(gm, sites, {} if buckets is None else {0: buckets})
    assert calls(result) == ["linear"]
    assert csr == []
    assert list(report.skipped.values()) == ["dense measured faster"]


def test_sites_without_a_form_stay_dense():
    gm, result, csr, report, *_ = rewritten(lambda x: F.linear(x, W[:3]), X)
    assert calls(result) == calls(gm)
    assert csr == []
    assert list(report.skipped.values()) == ["weight is no whole matrix (getitem)"]


def test_the_other_buckets_take_the_dense_product():
    _, result, _, _, args, extra = rewritten(lambda x: F.linear(x, W), X, buckets=0b1)
    wrong = [torch.zeros_like(part) for part in extra]  # 4 rows are bucket 1: never read
    (out,) = result(*args, *wrong)
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
